"""The models of the papers, as configurations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
_ROBERTA = {"model_type": "roberta", "vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
_DEBERTA = {"model_type": "deberta-v2", "vocab_size": 128100}
_XXL = {"hidden_size": 1536, "num_hidden_layers": 48, "num_attention_heads": 24, "intermediate_size": 6144}
_GPT3 = {"hidden_size": 12288, "word_embed_proj_dim": 12288, "ffn_dim": 49152}
_LLAMA = {"hidden_size": 4096, "num_attention_heads": 32, "intermediate_size": 11008, "vocab_size": 32000}
_LLAMA_13B = {**_LLAMA, "hidden_size": 5120, "num_attention_heads": 40, "intermediate_size": 13824}


@dataclass(frozen=True)
class Model:
    """A base without weights. `depth` is its number of layers in each stack, `keys` where the configuration has it."""

    config: Mapping[str, Any]
    depth: int
    keys: tuple[str, ...] = ("num_hidden_layers",)
    head: Literal["sequence-classification", "causal-lm", "seq2seq-lm"] = "sequence-classification"

    def spec(self, depth: int) -> dict[str, Any]:
        """The `base` of a spec with so many layers in each stack."""
        return {"config": {**self.config, **dict.fromkeys(self.keys, depth)}, "head": self.head}


def _t5(depth: int, **sizes: int | str) -> Model:
    """T5 of version 1.1; its input and output embeddings are tied here, and were not there."""
    gated = {"d_kv": 64, "vocab_size": 32128, "feed_forward_proj": "gated-gelu"}
    return Model({"model_type": "t5", **gated, **sizes}, depth, ("num_layers", "num_decoder_layers"), "seq2seq-lm")


def _gpt2(width: int, depth: int, heads: int) -> Model:
    return Model({"model_type": "gpt2", "n_embd": width, "n_head": heads}, depth, ("n_layer",), "causal-lm")


BASES: dict[str, Model] = {
    "BERT-base": Model({"model_type": "bert", "vocab_size": 28996}, 12),
    "BERT-large": Model({"model_type": "bert", "vocab_size": 28996, **_LARGE}, 24),
    "RoBERTa-base": Model(_ROBERTA, 12),
    "RoBERTa-large": Model(_ROBERTA | _LARGE, 24),
    # Without their disentangled attention, which uses the same matrices again (`share_att_key`).
    "DeBERTaV3-base": Model(_DEBERTA | _BASE, 12),
    "DeBERTa-XXL": Model(_DEBERTA | _XXL, 48),
    "GPT-2 medium": _gpt2(1024, 24, 16),
    "GPT-2 large": _gpt2(1280, 36, 20),
    "GPT-3's shape": Model({"model_type": "opt", "num_attention_heads": 96, **_GPT3}, 96, head="causal-lm"),
    "LLaMA-7B": Model({"model_type": "llama", **_LLAMA}, 32, head="causal-lm"),
    "LLaMA-13B": Model({"model_type": "llama", **_LLAMA_13B}, 40, head="causal-lm"),
    "BART-large": Model({"model_type": "bart"}, 12, ("encoder_layers", "decoder_layers"), "seq2seq-lm"),
    "T5-base": Model(
        {"model_type": "t5", "d_model": 768, "d_ff": 3072, "num_heads": 12, "vocab_size": 32128},
        12,
        ("num_layers", "num_decoder_layers"),
        "seq2seq-lm",
    ),
    "T5.1.1-small": _t5(8, d_model=512, d_ff=1024, num_heads=6),
    "T5.1.1-base": _t5(12, d_model=768, d_ff=2048, num_heads=12),
    "T5.1.1-large": _t5(24, d_model=1024, d_ff=2816, num_heads=16),
    "T5.1.1-XL": _t5(24, d_model=2048, d_ff=5120, num_heads=32),
    "T5.1.1-XXL": _t5(24, d_model=4096, d_ff=10240, num_heads=64),
    "T0-3B": _t5(24, d_model=2048, d_ff=5120, num_heads=32),
    "T0-11B": _t5(24, d_model=4096, d_ff=10240, num_heads=64),
}
