"""Makes a valid tiny configuration of any family from the family's own defaults.

No family is named here: sizes are told by what their fields are called (`num_hidden_layers` is a depth in any family),
and kept in relation: a width that equals the stream's stays equal to it, a larger one stays larger.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, PretrainedConfig

SPECIAL = re.compile(r".*(token_id|token_index|_idx|_index|token_ids)|lang_id")
MAIN = ("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embed_dim")
LAYERS = r"(\w+_)?(layers?|blocks?)|(\w+_)?depth|n_layers?_?\w*"
KEPT = (
    r".*(per_layer|every_n|interval|nextn|residual_layers|lstm_layers|feat_extract_layers|adapter_layers|output_layer|"
    r"feature_layer|per_block|random_blocks|mem_blocks|chunk_size_feed_forward|tokenizer_chunk_size|num_channels|"
    r"max_new_tokens|sampling_rate|num_labels|channels|index_\w*heads)"
)
"""What is left as it is. An index scores tokens by a sum over its heads, of what is above zero: of a few heads many
sums are zero, and which of equals are the highest is anybody's choice."""


@dataclass(frozen=True)
class Sizes:
    """What a tiny model is made of; no two of them equal where a test could confuse them."""

    layers: int = 2
    heads: int = 4
    stream: int = 64
    head: int | None = 16
    everything: bool = True
    """Whether more than depths, vocabularies and positions shrinks."""
    absent: bool = False
    """Whether sizes that the defaults leave open are chosen."""


ABSENT: dict[str, Callable[[Sizes], Any]] = {
    r"vocab_size": lambda _: 131,
    r"num_experts_per_tok|top_k": lambda _: 2,
    r"num_experts|num_local_experts|n_routed_experts": lambda _: 4,
    r"n_shared_experts|n_group|topk_group": lambda _: 1,
    r"head_dim": lambda sizes: sizes.head,
    r"num_key_value_heads": lambda sizes: sizes.heads // 2,
    r"layer_types": lambda sizes: ["full_attention"] * sizes.layers,
}
"""What a family may leave open and cannot be built without."""

ROPE = {"rope_type": "default", "rope_theta": 1e4}
MISSING: dict[str, dict[str, Any]] = {
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},  # the model reads the one, and clips by the other
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE | {"mrope_section": [4, 2, 2]}}},
    "efficientnet": {  # its sizes are factors
        **{"depth_coefficient": 0.3, "width_coefficient": 0.25, "hidden_dim": 320, "image_size": 96},
    },
    "perceiver": {"num_latents": 12, "d_latents": 64, "num_self_attends_per_block": 2},  # the sizes of its stream
    "qwen4_exp_text": {  # an indexer of keys
        **{"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16},
        **{"indexer_budget": 16, "indexer_compress_ratio": 4},
    },
    "zamba": {  # two attentions at least, of one weight
        **{"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
        **{"hidden_size": 64, "num_attention_heads": 4, "attention_hidden_size": 128, "attention_head_dim": 32},
    },
    "xmod": {"default_language": "en_XX"},  # of its adapters one has to be chosen
}
"""What some families' defaults lack, so that no model can be built of them; and what is large by a name of its own."""

LADDER = (
    Sizes(),
    Sizes(absent=True),
    Sizes(layers=4),
    Sizes(head=None),
    Sizes(stream=96, head=24),
    Sizes(heads=8, stream=128),
    Sizes(layers=8),
    Sizes(everything=False),
)


def tiny(kind: str, sizes: Sizes) -> PretrainedConfig:
    """The family's default configuration, shrunk. Raises whatever its class raises on values it does not take."""
    default = AutoConfig.for_model(kind)
    shrunk = _Shrinker(sizes, default).arguments(default) | MISSING.get(kind, {})
    config = AutoConfig.for_model(kind, **shrunk)
    for part in parts(config):
        _settle(part)
    return config


def parts(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """A configuration and all those in it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PretrainedConfig):
            yield from parts(value)


def depths(config: PretrainedConfig) -> dict[str, int]:
    """The fields of a text model's configuration that say how many layers there are."""
    text = config.get_text_config()
    found = {}
    for name in ("encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers"):
        value = getattr(text, name, None)
        if isinstance(value, int):
            found[name] = value
    total = getattr(text, "num_hidden_layers", None)
    return ({"num_hidden_layers": total} if isinstance(total, int) else {}) | found


def _settle(config: PretrainedConfig) -> None:
    """What a trace wants of every family, set where the family has it."""
    for name, value in list(vars(config).items()):
        if name.endswith("layerdrop") or name in {"drop_path_rate", "stochastic_depth_rate"}:
            off = [0.0] * len(value) if isinstance(value, (list, tuple)) else 0  # some classes take no fraction here
            setattr(config, name, type(value if value is not None else 0.0)(off))
        if name == "use_cache":
            config.use_cache = False
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = 0
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 1


def _is_depth(name: str) -> bool:
    return bool(re.fullmatch(LAYERS, name)) and not re.fullmatch(KEPT, name)


class _Shrinker:
    def __init__(self, sizes: Sizes, default: PretrainedConfig) -> None:
        self.sizes = sizes
        self.widths = {
            value
            for part in parts(default)
            for name in MAIN
            if isinstance(value := getattr(part, name, None), int) and not isinstance(value, bool)
        }
        self.depths = {
            value
            for part in parts(default)
            for name, value in vars(part).items()
            if isinstance(value, int) and _is_depth(name)
        }

    def arguments(self, config: PretrainedConfig) -> dict[str, Any]:
        """Constructor arguments for every field of `config` that is to differ."""
        fields = {n: v for n, v in vars(config).items() if not n.startswith("_") and not isinstance(v, bool)}
        lists = {n: v for n, v in fields.items() if isinstance(v, (list, tuple)) and not SPECIAL.fullmatch(n)}
        found = {n: self._value(n, v, fields) for n, v in fields.items() if n not in lists}
        changed = {n: new for n, new in found.items() if new is not None and new != fields[n]}
        changed |= self._total(fields | changed, fields)
        names = [n for n, v in fields.items() if isinstance(v, int) and _is_depth(n)]
        names.sort(key="num_hidden_layers".__eq__)
        depths = {fields[n]: changed.get(n, fields[n]) for n in names}  # where several are equal, that of all layers
        shorter = {n: self._list(v, depths.get(len(v), self.sizes.layers)) for n, v in lists.items()}
        return changed | {n: new for n, new in shorter.items() if new is not None and new != fields[n]}

    def _total(self, new: Mapping[str, Any], old: Mapping[str, Any]) -> dict[str, int]:
        """A depth that is the sum of all others stays their sum."""
        total = "num_hidden_layers"
        parts = [n for n in old if _is_depth(n) and n != total and isinstance(old[n], int)]
        summed = len(parts) > 1 and old.get(total) == sum(old[n] for n in parts)
        return {total: sum(new[n] for n in parts)} if summed else {}

    def _value(self, name: str, value: Any, fields: Mapping[str, Any]) -> Any:
        if isinstance(value, PretrainedConfig):
            return {"model_type": value.model_type, **self.arguments(value)}
        if SPECIAL.fullmatch(name):
            return _special(name, value)
        if value is None and self.sizes.absent:
            return next((size(self.sizes) for pattern, size in ABSENT.items() if re.fullmatch(pattern, name)), None)
        if not isinstance(value, int) or value <= 0:
            return None
        return self._number(name, value, fields)

    def _list(self, value: list[Any] | tuple[Any, ...], layers: int) -> list[Any] | None:
        """As many entries as there are layers: one of each kind first, then as they come."""
        if len(value) not in self.depths or len(value) <= layers or isinstance(value, tuple):
            return None
        if all(isinstance(v, int) and not isinstance(v, bool) for v in value) and value == sorted(set(value)):
            return [v for v in value if v < layers]
        kinds = list(dict.fromkeys(map(str, value)))
        first = [next(v for v in value if str(v) == kind) for kind in kinds]
        return (first + list(value))[:layers]

    def _number(self, name: str, value: int, fields: Mapping[str, Any]) -> int | None:
        if re.fullmatch(KEPT, name):
            return None
        for pattern, size, always in RULES:
            if re.fullmatch(pattern, name):
                if not always and not self.sizes.everything:
                    return None
                return size(self, value, fields)
        return None

    def _width(self, value: int, _: Mapping[str, Any]) -> int:
        stream = self.sizes.stream
        if value in self.widths:
            return stream
        return stream // 2 if value < max(self.widths, default=value) else stream + stream // 2

    def _heads(self, value: int, fields: Mapping[str, Any]) -> int:
        return 1 if value == 1 else self.sizes.heads

    def _kv_heads(self, value: int, fields: Mapping[str, Any]) -> int:
        equal = value in (fields.get(n) for n in ("num_attention_heads", "n_head", "n_heads", "num_heads"))
        return min(value, self.sizes.heads if equal else self.sizes.heads // 2)


def _at_most(limit: int) -> Callable[[_Shrinker, int, Mapping[str, Any]], int]:
    return lambda shrinker, value, fields: min(value, limit)


def _head(shrinker: _Shrinker, value: int, fields: Mapping[str, Any]) -> int:
    if value == fields.get("qk_rope_head_dim"):
        return min(value, 8)
    return value if shrinker.sizes.head is None else shrinker.sizes.head


# The first that matches a field's name says its new size; the last entry: whether it shrinks on the ladder's last rung.
RULES: tuple[tuple[str, Callable[[_Shrinker, int, Mapping[str, Any]], int], bool], ...] = (
    (
        r"max_window_layers|first_k_dense_replace|num_dense_layers|decoder_sparse_step|encoder_sparse_step",
        _at_most(1),
        True,
    ),
    (r"(\w+_)?loops", _at_most(1), True),  # a depth is told by layers, not by calls
    (r"\w+_shared_layers", lambda s, v, f: v * s.sizes.layers // f.get("num_hidden_layers", v), True),
    (LAYERS, lambda s, v, _: min(v, s.sizes.layers), True),
    (r"(\w+_)?vocab_size(_\w+)?|ngram_vocab_size_base|unpadded_vocab_size", _at_most(131), True),
    (r"codebook_size", _at_most(128), True),
    (
        r"(\w+_)?(max_\w*position\w*|n_positions|n_ctx|context_length|max_seq_len|max_length|model_max_length)",
        _at_most(128),
        True,
    ),
    (r"(\w+_)?(num_experts|num_local_experts|n_routed_experts|moe_num_experts|num_moe_experts)", _at_most(4), True),
    (r"(\w+_)?(num_experts_per_tok|num_experts_per_token|topk|top_k|moe_k)", _at_most(2), False),
    (r"n_group|num_expert_group|topk_group", _at_most(1), False),
    (r"(\w+_)?(num_key_value_heads|kv_n_heads|num_kv_heads)", _Shrinker._kv_heads, False),
    (r"qk_head_dim", lambda s, v, _: 24, False),
    (r"qk_rope_head_dim|(\w+_)?rotary_dim", _at_most(8), False),
    (r"(\w+_)?(head_dim|d_kv|dim_head|d_head|head_size|kv_channels|headdim|attention_head_size)", _head, False),
    (r"(\w+_)?(num_\w*heads|n_head|n_heads|attention_heads|num_heads|n_attn_heads)", _Shrinker._heads, False),
    (r"(\w+_)?lora_rank|(\w+_)?lowrank|(\w+_)?_rank|dt_rank", _at_most(24), False),
    (
        r"(\w+_)?(sliding_window\w*|local_attention|window_size|attention_window\w*|chunk_size|block_size)",
        _at_most(8),
        False,
    ),
    (r"(\w+_)?(state_size|d_state)", _at_most(8), False),
    (r"(\w+_)?image_size", _at_most(32), False),
    (r"(\w+_)?patch_size", _at_most(8), False),
    (
        r"(\w+_)?(ffn_dim|d_ff|dff|dim_ff|n_inner|d_inner|ffn_hidden_size|feed_forward_size|intermediate_size\w*)",
        lambda s, v, _: s.sizes.stream + s.sizes.stream // 2,
        False,
    ),
    (
        r"(\w+_)?(hidden_size(_\w+)?|d_model|n_embd|dim|hidden_dim|emb_dim|embed_dim|embedding_size|embedding_dim|width|proj_dim|size_per_layer_input)",
        _Shrinker._width,
        False,
    ),
    (r"\w+_(size|dim|width)", lambda s, v, _: s.sizes.stream if v in s.widths else v, False),
)


def _special(name: str, value: Any) -> Any:
    """Ids below the vocabulary; those of the text's own frame first, others far from them."""
    usual = {"pad": 0, "bos": 1, "eos": 2, "sep": 2, "cls": 1}
    if isinstance(value, (list, tuple)):
        return [2] if value and all(isinstance(v, int) for v in value) else None
    if not isinstance(value, int) or value < 131:
        return None
    return next((v for k, v in usual.items() if k in name), 100 + sum(map(ord, name)) % 30)
