"""PEFT's methods that change modules: LoRA and DoRA, AdaLoRA, IA3 and VeRA, each as pieces and the modules it selects.

Each reader takes its tensors out of `left`, of which the keys are `<module path>.lora_A.weight` and the like.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from surgeon.errors import DeltaError
from surgeon.foreign.files import Options
from surgeon.foreign.peft_targets import PeftTargets, by_pattern
from surgeon.foreign.pieces import Piece, Product, Scaling, Shared, Targets

KEPT_BASE = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""Values of `init_lora_weights` that leave the base's own tensors as they are."""
TABLE = ["lora_embedding_A", "lora_embedding_B"]

Tensors = dict[str, Tensor]


def lora(options: Options, left: Tensors, where: str) -> tuple[list[Piece], Targets]:
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


def adalora(options: Options, left: Tensors, where: str) -> tuple[list[Piece], Targets]:
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


def ia3(options: Options, left: Tensors, where: str) -> tuple[list[Piece], Targets]:
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


def vera(options: Options, left: Tensors, where: str) -> tuple[list[Piece], Targets]:
    """The shared matrices are in the file, or else are drawn from `projection_prng_key` once the base is known."""
    options.ignore("d_initial", "vera_dropout", "fan_in_fan_out", "init_weights")
    rank, key = options.need("r", int), options.need("projection_prng_key", int)
    saved = options.get("save_projection", bool, True)
    a, b = (left.pop(f"vera_{side}", None) for side in "AB")
    if (a is None or b is None) if saved else (a is None) != (b is None):
        raise DeltaError(
            "the shared matrices vera_A and vera_B are not both in the file",
            where=where,
            there_is=f"save_projection is {str(saved).lower()}",
        )
    if a is not None and b is not None and (a.dim() != 2 or b.dim() != 2 or len(a) != rank or b.shape[1] != rank):
        raise DeltaError(f"vera_A {list(a.shape)} and vera_B {list(b.shape)} are not of rank {rank}", where=where)
    matrices = None if a is None or b is None else (a.T, b.T)
    names = ["vera_lambda_d", "vera_lambda_b"]
    parts = _take(left, *names)
    pieces: list[Piece] = []
    for path, found in parts.items():
        _complete(found, names, path, where)
        between, behind = (found[name] for name in names)
        if between.shape != (rank,) or behind.dim() != 1:
            shapes = f"{list(between.shape)} and {list(behind.shape)}"
            raise DeltaError(f"{path} has vectors of {shapes} for a rank of {rank}", where=where)
        pieces.append(Shared(path=path, between=between, behind=behind, key=key, matrices=matrices))
    return pieces, _targets(options, frozenset(parts), where)


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
    _complete(found, names, path, where)
    a, b = found[names[0]], found[names[1]]
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
        raise DeltaError(f"{path}: {list(b.shape)} · {list(a.shape)} is no product of matrices", where=where)
    return [found[name] for name in names]


def _complete(found: Tensors, names: list[str], path: str, where: str) -> None:
    lost = [name for name in names if name not in found]
    if lost:
        raise DeltaError(f"{path}.{lost[0]} is missing", where=where, there_is=[f"{path}.{n}" for n in found])


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
    layers, biases = options.get("layers_to_transform", (list, int)), options.get("bias", str, "none")
    targets = PeftTargets(
        found=found,
        modules=_names(options, "target_modules"),
        excluded=_names(options, "exclude_modules"),
        saved=tuple(options.get("modules_to_save", list, [])),
        layers=(layers,) if isinstance(layers, int) else tuple(layers) if layers else None,
        layers_pattern=tuple(_listed(options.get("layers_pattern", (list, str), []))),
        biases="own" if biases.endswith("_only") else biases,
    )
    targets.check(where)
    return targets


def _names(options: Options, key: str) -> Any:
    found = options.get(key, (list, str), [])
    return found if isinstance(found, str) and key != "feedforward_modules" else tuple(_listed(found))


def _listed(value: list[str] | str) -> list[str]:
    return [value] if isinstance(value, str) else value
