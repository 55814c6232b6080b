"""Reads a folder that PEFT's `save_pretrained` wrote: `adapter_config.json` beside `adapter_model.safetensors`.

The keys are PEFT 0.21's (`base_model.model.<module path>.lora_A.weight`). What PEFT does in silence is an error here:
a key that the configuration does not call for, a tensor that it does, a scale that cannot be known.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from surgeon.errors import DeltaError, shorten
from surgeon.foreign.files import Options, read_config, read_tensors
from surgeon.foreign.peft_targets import PeftTargets, by_pattern
from surgeon.foreign.pieces import Checkpoint, Piece, Prefix, Product, Prompt, Same, Scaling, Targets, Whole
from surgeon.spec import HeadName

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")
HEADS: dict[str, HeadName] = {
    "SEQ_CLS": "sequence-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "CAUSAL_LM": "causal-lm",
    "SEQ_2_SEQ_LM": "seq2seq-lm",
    "FEATURE_EXTRACTION": "feature-extraction",
}
CLASSIFIERS: dict[str, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Modules that PEFT adds to `modules_to_save` by itself; any one of them is what the base calls its head."""
KEPT_BASE = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""Values of `init_lora_weights` that leave the base's own tensors as they are."""

Tensors = dict[str, Tensor]


def reads(folder: Path) -> bool:
    """Whether this is a PEFT folder."""
    path = folder / CONFIG
    return path.is_file() and "model_class" not in read_config(path)


def read(folder: Path, *, allow_pickle: bool = False) -> Checkpoint:
    """The checkpoint in `folder`. Raises DeltaError unless all of it is understood."""
    where = str(folder)
    options = Options(read_config(folder / CONFIG), str(folder / CONFIG))
    method = options.need("peft_type", str)
    if method not in READERS:
        raise DeltaError(f"'{method}' is a method that cannot be read", where=options.where, there_is=READERS)
    tensors, fingerprint = read_tensors(folder, WEIGHTS, allow_pickle=allow_pickle)
    options.ignore("auto_mapping", "peft_version", "inference_mode", "runtime_config")
    task = options.get("task_type", str)
    revision, base = options.get("revision", str), options.get("base_model_name_or_path", str)
    left = {key.removeprefix("base_model."): tensor for key, tensor in tensors.items()}
    if method not in PROMPTS:
        left = {key.removeprefix("model."): tensor for key, tensor in left.items()}
    if len(left) < len(tensors):
        raise DeltaError("two tensors have one name once PEFT's prefix is gone", where=where)
    pieces, targets = READERS[method](options, left, where)
    pieces += _saved(options, left, targets, task, where)
    options.finish(method)
    if left:
        raise DeltaError(
            f"{len(left)} of {len(tensors)} tensors are none that the configuration calls for: {shorten(left)}",
            where=where,
            there_is=f"peft_type {method}",
            try_="the adapter_config.json that was saved with these weights",
        )
    return Checkpoint(
        where=where,
        method=method,
        pieces=tuple(pieces),
        base=base or None,
        revision=revision,
        fingerprint=fingerprint,
        head=HEADS.get(task or ""),
        targets=targets,
    )


# -- methods: each takes its tensors out of `left` -------------------------------------------------------------------


def _lora(options: Options, left: Tensors, where: str) -> tuple[list[Piece], Targets]:
    rank, alpha = options.need("r", int), options.need("lora_alpha", (int, float))
    ranks, alphas = options.get("rank_pattern", dict, {}), options.get("alpha_pattern", dict, {})
    stabilised = options.get("use_rslora", bool, False)
    _unchanged_base(options)
    names = ["lora_A.weight", "lora_B.weight"]
    names += ["lora_B.bias"] if options.get("lora_bias", bool, False) else []
    names += ["lora_magnitude_vector"] if options.get("use_dora", bool, False) else []
    tables = _take(left, *TABLE)
    parts = _take(left, *names) | tables
    pieces: list[Piece] = []
    for path, found in parts.items():
        a, b, *more = _parts(found, TABLE if path in tables else names, path, where)
        own = by_pattern(ranks, path, rank)
        if a.shape[0] != own or b.shape[1] != own:
            raise DeltaError(
                f"{path} has rank {a.shape[0]} in the file and {own} in the configuration",
                where=where,
                try_="its scale alpha / r cannot be known: after `hotswap`, PEFT saves the old configuration",
            )
        scale = by_pattern(alphas, path, alpha) / (math.sqrt(own) if stabilised else own)
        own_parts = dict(zip((names[2:] if path not in tables else ()), more, strict=True))
        pieces.append(
            Product(
                path=path,
                a=a.T,
                b=b.T,
                scale=scale,
                bias=own_parts.get("lora_B.bias"),
                magnitude=own_parts.get("lora_magnitude_vector"),
                table=path in tables,
            )
        )
    return pieces, _targets(options, frozenset(parts), where)


def _adalora(options: Options, left: Tensors, where: str) -> tuple[list[Piece], Targets]:
    """The scale is of the initial rank: whatever was pruned since, and `r`, play no part in it."""
    rank, alpha = options.need("init_r", int), options.need("lora_alpha", (int, float))
    _unchanged_base(options)
    options.ignore("r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step")
    ranks = options.get("rank_pattern", dict, {})
    names = ["lora_A", "lora_B", "lora_E"]
    parts = _take(left, *names)
    pieces: list[Piece] = []
    for path, found in parts.items():
        a, b, e = _parts(found, names, path, where)
        kept = ranks.get(f"{path}.lora_E")
        if e.shape != (len(a), 1) or (kept is not None and sum(kept) != len(a)):
            raise DeltaError(f"{path} has {len(a)} ranks, {list(e.shape)} values and other ranks kept", where=where)
        pieces.append(Product(path=path, a=a.T, b=b.T, scale=alpha / (rank + 1e-5), values=e.flatten()))
    return pieces, _targets(options, frozenset(parts), where)


def _ia3(options: Options, left: Tensors, where: str) -> tuple[list[Piece], Targets]:
    options.ignore("init_ia3_weights", "fan_in_fan_out")
    inward = _names(options, "feedforward_modules")
    pieces: list[Piece] = []
    parts = _take(left, "ia3_l")
    for path, found in parts.items():
        vector = found["ia3_l"]
        inside = any(path == name or path.endswith(f".{name}") for name in inward)
        if vector.dim() != 2 or vector.shape[0 if inside else 1] != 1:
            takes = "[1, in]" if inside else "[out, 1]"
            raise DeltaError(f"{path}.ia3_l is {list(vector.shape)}, the configuration says {takes}", where=where)
        pieces.append(Scaling(path=path, vector=vector.flatten(), inward=inside))
    return pieces, _targets(options, frozenset(parts), where)


def _prefix(options: Options, left: Tensors, where: str) -> tuple[list[Piece], None]:
    # A projection is folded before PEFT saves, so it makes no difference here.
    options.ignore("encoder_hidden_size", "prefix_projection", "init_weights")
    rows = _virtual(options, left, where, stacks=1)
    layers, heads, width = (options.need(k, int) for k in ("num_layers", "num_attention_heads", "token_dim"))
    if rows.shape[1] != 2 * layers * width or width % heads:
        raise DeltaError(f"{rows.shape[1]} numbers a token are not 2 · {layers} layers · {width}", where=where)
    slots = rows.reshape(len(rows), layers, 2, width)
    keys, values = (slots[:, :, i].unbind(1) for i in (0, 1))
    return [Prefix(keys=keys, values=values, shift=True)], None


def _prompt(options: Options, left: Tensors, where: str) -> tuple[list[Piece], None]:
    options.ignore("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs")
    options.ignore("encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout")
    options.ignore("token_dim", "num_layers", "num_attention_heads")
    # An encoder-decoder's second half is never read: the prompt stands before the encoder's text alone.
    return [Prompt(rows=_virtual(options, left, where, stacks=2)[: options.need("num_virtual_tokens", int)])], None


READERS: Mapping[str, Callable[[Options, Tensors, str], tuple[list[Piece], Any]]] = {
    "LORA": _lora,
    "ADALORA": _adalora,
    "IA3": _ia3,
    "PREFIX_TUNING": _prefix,
    "PROMPT_TUNING": _prompt,
    "P_TUNING": _prompt,
}
TABLE = ["lora_embedding_A", "lora_embedding_B"]
PROMPTS = ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING")


# -- parts -----------------------------------------------------------------------------------------------------------


def _take(left: Tensors, *endings: str) -> dict[str, Tensors]:
    """Take the tensors with these endings out of `left`, by module path."""
    taken: dict[str, Tensors] = {}
    for key in list(left):
        for ending in endings:
            if key.endswith(f".{ending}"):
                taken.setdefault(key.removesuffix(f".{ending}"), {})[ending] = left.pop(key)
    return taken


def _parts(found: Tensors, names: list[str], path: str, where: str) -> list[Tensor]:
    """The tensors of a module, the first two of them the factors of a product."""
    lost = [name for name in names if name not in found]
    if lost:
        raise DeltaError(f"{path}.{lost[0]} is missing", where=where, there_is=[f"{path}.{n}" for n in found])
    a, b = found[names[0]], found[names[1]]
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
        raise DeltaError(f"{path}: {list(b.shape)} · {list(a.shape)} is no product of matrices", where=where)
    return [found[name] for name in names]


def _unchanged_base(options: Options) -> None:
    """Raise DeltaError for a start that changed the base's own weights, which are not in the folder."""
    start = options.config.get("init_lora_weights")
    options.ignore("init_lora_weights", "lora_dropout", "fan_in_fan_out", "megatron_core", "qalora_group_size")
    options.ignore("ensure_weight_tying")
    if start is not None and start not in KEPT_BASE:
        raise DeltaError(
            f"`init_lora_weights` is '{start}', which changes the base's own weights",
            where=options.where,
            there_is=f"it is read with {', '.join(map(str, KEPT_BASE))}",
            try_="save it with `path_initial_model_for_weight_conversion`, which makes a plain LoRA of it",
        )


def _targets(options: Options, found: frozenset[str], where: str) -> PeftTargets:
    options.need("target_modules", (list, str))
    layers = options.get("layers_to_transform", (list, int))
    targets = PeftTargets(
        found=found,
        modules=_names(options, "target_modules"),
        excluded=_names(options, "exclude_modules"),
        saved=tuple(options.get("modules_to_save", list, [])),
        layers=(layers,) if isinstance(layers, int) else tuple(layers) if layers else None,
        layers_pattern=tuple(_listed(options.get("layers_pattern", (list, str), []))),
        biases=options.get("bias", str, "none"),
    )
    targets.check(where)
    return targets


def _names(options: Options, key: str) -> Any:
    found = options.get(key, (list, str), [])
    return found if isinstance(found, str) and key != "feedforward_modules" else tuple(_listed(found))


def _listed(value: list[str] | str) -> list[str]:
    return [value] if isinstance(value, str) else value


def _virtual(options: Options, left: Tensors, where: str, *, stacks: int) -> Tensor:
    """The rows of virtual tokens, `num_virtual_tokens` for each of the stacks."""
    count, sets = options.need("num_virtual_tokens", int), options.get("num_transformer_submodules", int, 1)
    if sets > stacks:
        raise DeltaError(
            "a prefix of an encoder-decoder cannot be read",
            where=where,
            try_="PEFT gives its decoder's layers i and i + L/2 one prefix and its encoder none: train it again here",
        )
    rows = left.pop("prompt_embeddings", None)
    if rows is None:
        raise DeltaError("prompt_embeddings is missing", where=where, there_is=left or "no tensors")
    if rows.dim() != 2 or len(rows) != count * sets:
        raise DeltaError(f"prompt_embeddings is {list(rows.shape)} for {count} virtual tokens", where=where)
    return rows


def _saved(options: Options, left: Tensors, targets: Targets | None, task: str | None, where: str) -> list[Piece]:
    """Take out of `left` what is no part of a method: modules saved whole, biases, copies of the base's own."""
    names = list(dict.fromkeys(options.get("modules_to_save", list, [])))
    saved: Tensors = {}
    pieces: list[Piece] = []
    for key in list(left):
        owner, _, leaf = key.rpartition(".")
        if owner.endswith(".base_layer"):
            module = owner.removesuffix(".base_layer")
            if leaf == "bias" and targets is not None and targets.biases != "none":
                saved[f"{module}.bias"] = left.pop(key)
            elif leaf == "weight" and targets is not None and module in targets.found:
                pieces.append(Same(name=f"{module}.weight", tensor=left.pop(key)))
        elif any(holds(name, owner) for name in names) or (targets and targets.biases == "all" and leaf == "bias"):
            saved[key] = left.pop(key)
    pieces += [Whole(name=name, tensor=tensor) for name, tensor in _once(saved, where).items()]
    _all_saved(names, saved, task, where)
    return pieces


def _once(saved: Tensors, where: str) -> Tensors:
    """Each tensor once: beside a bias of a saved module PEFT may write the base's and its own inner copy too."""
    once = {key: t for key, t in saved.items() if not re.search(r"\.(original_module|modules_to_save)\.", key)}
    for key in saved.keys() - once.keys():
        name = re.sub(r"\.(original_module|modules_to_save)\.", ".", key)
        differs = ".modules_to_save." in key and name in once and not saved[key].equal(once[name])
        if name not in once or differs:
            raise DeltaError(f"{key} is there and {name} is {'another' if differs else 'not'}", where=where)
    return once


def holds(name: str, owner: str) -> bool:
    """Whether PEFT saves the module at `owner`, or one around it, for this entry: it goes by the bare end of a path."""
    parts = owner.split(".")
    return any(".".join(parts[: i + 1]).endswith(name) for i in range(len(parts)))


def _all_saved(names: list[str], saved: Tensors, task: str | None, where: str) -> None:
    """Raise DeltaError where an entry of `modules_to_save` has no tensor."""
    owners = {key.rpartition(".")[0] for key in saved}
    idle = [name for name in names if not any(holds(name, owner) for owner in owners)]
    classifiers = CLASSIFIERS.get(task or "", ())
    if set(names) & set(classifiers) - set(idle):
        idle = [name for name in idle if name not in classifiers]
    if idle:
        raise DeltaError(
            f"`modules_to_save` names what no tensor belongs to: {', '.join(idle)}",
            where=where,
            there_is=sorted(saved) or "no module saved whole",
            try_="PEFT says nothing when a name matches no module: it was not trained, and is not here",
        )
