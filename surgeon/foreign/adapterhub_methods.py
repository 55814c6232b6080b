"""AdapterHub's methods: bottleneck adapters and Compacter, LoRA and IA3, prefixes; each as pieces."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from surgeon.errors import DeltaError
from surgeon.foreign.files import Options
from surgeon.foreign.pieces import Bottleneck, Piece, Prefix, Product, Scaling, Targets
from surgeon.passes.compacter import kronecker

ACTIVATIONS = {"relu": "relu", "swish": "silu", "silu": "silu", "gelu": "gelu", "tanh": "tanh"}
# What else a bottleneck's configuration may say, each with the only value that is read.
PLAIN: dict[str, Any] = {
    "ln_before": False, "ln_after": False, "residual_before_ln": True, "adapter_residual_before_ln": False,
    "original_ln_after": True, "use_gating": False, "inv_adapter": None, 
}  # fmt: skip
TRAINING = (
    *("dropout", "stochastic_depth", "init_weights", "init_weights_seed", "inv_adapter_reduction_factor", "dtype"),
    *("factorized_phm_W", "factorized_phm_rule", "hypercomplex_nonlinearity", "learn_phm", "phm_bias", "phm_c_init"),
    *("phm_dim", "phm_init_range", "phm_rank", "shared_W_phm", "shared_phm_rule", "reduction_factor"),
)
"""Keys that matter to training, or to what is off."""
COMPACTER = {
    "factorized_phm_W": True, "shared_W_phm": False, "shared_phm_rule": True, "factorized_phm_rule": False,
    "phm_bias": True,
}  # fmt: skip
WEIGHTS = ("adapter_down.0.weight", "adapter_down.0.bias", "adapter_up.weight", "adapter_up.bias")
FACTORS = tuple(f"{side}.{part}" for side in ("adapter_down.0", "adapter_up") for part in ("W_left", "W_right", "b"))

Tensors = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class EveryLayer(Targets):
    """AdapterHub adapts each layer alike, but for those in `left_out`: a decoder's count goes on from the encoder's."""

    left_out: tuple[int, ...] = ()

    def wanted(self, paths: Collection[str]) -> frozenset[str]:
        """The sites of one layer in all layers that the base has."""
        found = (re.fullmatch(r"(.*?)\.\d+\.(.*)", path) for path in self.found)
        places = {(m[1], m[2]) for m in found if m}
        stacks: dict[str, list[int]] = {}
        for path in paths:  # in the order of the model, an encoder before its decoder
            before, _, number = path.rpartition(".")
            if number.isdecimal() and any(before == known for known, _ in places):
                stacks.setdefault(before, []).append(int(number))
        first = dict(zip(stacks, accumulate([0, *map(len, stacks.values())]), strict=False))
        return frozenset(
            f"{before}.{n}.{after}"
            for before, after in places
            for n in stacks.get(before, ())
            if first[before] + n not in self.left_out
        )


def split(left: Tensors, marker: str, name: str) -> dict[str, Tensors]:
    """Take `<path>.<marker>.<name>.<part>` out of `left`: the parts by path."""
    middle = f".{marker}.{name}."
    found: dict[str, Tensors] = {}
    for key in [key for key in left if middle in key]:
        path, _, part = key.partition(middle)
        found.setdefault(path, {})[part] = left.pop(key)
    return found


def plain(options: Options, values: Mapping[str, Any]) -> None:
    """Raise DeltaError where a key has another value than the one that is read."""
    for key, value in values.items():
        options.ignore(key)
        if options.config.get(key, value) != value:
            raise DeltaError(f"`{key}` is {options.config[key]!r}, and only {value!r} is read", where=options.where)


def _targets(options: Options, found: Collection[str]) -> EveryLayer:
    return EveryLayer(found=frozenset(found), left_out=tuple(options.get("leave_out", list, [])))


def bottleneck(options: Options, name: str, left: Tensors, where: str) -> tuple[list[Piece], Targets]:
    plain(options, PLAIN)
    options.ignore(*TRAINING, "mh_adapter", "output_adapter", "cross_adapter")
    before = options.need("original_ln_before", bool)
    placement = "parallel" if options.need("is_parallel", bool) else "pfeiffer" if before else "houlsby"
    if placement == "pfeiffer" and options.config.get("mh_adapter"):
        raise DeltaError("`original_ln_before` with an adapter behind attention is not read", where=options.where)
    activation, scaling = options.need("non_linearity", str), options.need("scaling", (int, float, str))
    if activation not in ACTIVATIONS:
        raise DeltaError(f"the activation '{activation}' is not read", where=options.where, there_is=ACTIVATIONS)
    rule = _rule(options, name, left, where) if options.get("phm_layer", bool, False) else None
    names = list(WEIGHTS if rule is None else FACTORS)
    names += ["scaling"] if isinstance(scaling, str) else []
    pieces: list[Piece] = []
    found = split(left, "adapters", name)
    for path, parts in found.items():
        if set(parts) != set(names):
            raise DeltaError(f"{path} has other parts than its configuration says", where=where, there_is=sorted(parts))
        down, down_bias, up, up_bias = _dense(parts) if rule is None else _kronecker(parts, rule)
        factor = parts.get("scaling", torch.tensor(1.0))  # a number, or one for each feature
        pieces.append(
            Bottleneck(
                path=path,
                weights=(down, down_bias, up * factor, up_bias * factor),
                placement=placement,
                activation=ACTIVATIONS[activation],
                scale=1.0 if isinstance(scaling, str) else float(scaling),
            )
        )
    return pieces, _targets(options, found)


def _dense(parts: Tensors) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    down, down_bias, up, up_bias = (parts[n] for n in WEIGHTS)
    return down.T, down_bias, up.T, up_bias


def _rule(options: Options, name: str, left: Tensors, where: str) -> Tensor:
    """Compacter's A `[n, n, n]`, which all layers share."""
    plain(options, COMPACTER)
    keys = [key for key in left if key.endswith(f".shared_parameters.{name}.phm_rule")]
    if len(keys) != 1:
        raise DeltaError("Compacter's phm_rule, which all layers share, is not there", where=where)
    return left.pop(keys[0])


def _kronecker(parts: Tensors, rule: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compacter's matrices as the sums of products that they are: at run time it is an adapter like any other."""
    left, right, down_bias, left_up, right_up, up_bias = (parts[n] for n in FACTORS)
    down, up = (
        kronecker(rule, s.flatten(0, 1), t.movedim(0, 1).flatten(1)) for s, t in ((left, right), (left_up, right_up))
    )
    return down, down_bias, up, up_bias


def lora(options: Options, name: str, left: Tensors, where: str) -> tuple[list[Piece], Targets]:
    plain(options, {"use_gating": False, "use_dora": False, "vera_b": None, "vera_d": None})
    options.ignore(*TRAINING, "selfattn_lora", "intermediate_lora", "output_lora")
    r, alpha = options.need("r", int), options.need("alpha", (int, float))
    if options.need("composition_mode", str) == "scale":
        return _ia3(options, split(left, "loras", name), r, alpha, where)
    plain(options, {"composition_mode": "add"})
    sides = [side for side in "qkv" if side in options.need("attn_matrices", list)]
    pieces: list[Piece] = []
    found = split(left, "loras", name)
    for path, parts in found.items():
        if set(parts) != {"lora_A", "lora_B"} or parts["lora_A"].shape[0] % r or parts["lora_B"].shape[1] != r:
            raise DeltaError(f"{path} is no LoRA of rank {r}", where=where, there_is=sorted(parts))
        a, b = parts["lora_A"], parts["lora_B"]
        if a.shape[0] > r:
            if a.shape[0] != r * len(sides):
                count = a.shape[0] // r
                raise DeltaError(f"{path} has {count} products for the sides {', '.join(sides)}", where=where)
            b = _apart(b, r, sides)
        pieces.append(Product(path=path, a=a.T, b=b.T, scale=alpha / r))
    return pieces, _targets(options, found)


def _ia3(options: Options, found: dict[str, Tensors], r: int, alpha: float, where: str) -> tuple[list[Piece], Targets]:
    """Vectors that multiply what the modules give; AdapterHub's feed-forward is scaled before its activation."""
    options.ignore("attn_matrices")
    for path, parts in found.items():
        if set(parts) != {"lora_B"} or r != 1 or parts["lora_B"].shape[1:] != (1,):
            raise DeltaError(f"{path} is no vector of IA3", where=where, there_is=sorted(parts))
    pieces: list[Piece] = [
        Scaling(path=path, vector=parts["lora_B"].flatten() * alpha, inward=False) for path, parts in found.items()
    ]
    return pieces, _targets(options, found)


def _apart(b: Tensor, r: int, sides: list[str]) -> Tensor:
    """B of a fused projection, whose sides have products of their own, as the blocks of one for all three sides."""
    count = len(sides)
    width = b.shape[0] // count
    whole = b.new_zeros(3 * width, r * count)
    for i, side in enumerate(sides):
        start = "qkv".index(side) * width
        whole[start : start + width, i * r : (i + 1) * r] = b[i * width : (i + 1) * width]
    return whole


def prefix(options: Options, name: str, left: Tensors, where: str) -> tuple[list[Piece], None]:
    plain(options, {"use_gating": False, "leave_out": []})
    options.ignore(*TRAINING, "encoder_prefix", "cross_prefix", "shared_gating", "bottleneck_size")
    found = split(left, "prefix_tunings", name)
    pools = [path for path in found if not path.endswith(".pool")]
    copies = [path for path in found if path.endswith(".pool")]
    if len(pools) != 1 or not copies:
        raise DeltaError("a prefix has one pool, and a copy of it in each layer", where=where, there_is=sorted(found))
    parts = found[pools[0]]
    for copy in copies:
        if found[copy].keys() != parts.keys() or not all(found[copy][key].equal(parts[key]) for key in parts):
            raise DeltaError("the layers' copies of the prefix differ from it", where=where)
    layers = _layers(copies)
    places = {key.partition(".")[0] for key in parts}
    if places - layers.keys():
        what = "of a single stack, or of both with their cross-attention,"
        raise DeltaError(f"only prefixes {what} are read", where=where, there_is=sorted(places))
    pieces: list[Piece] = []
    for place in sorted(places):
        own = {key.removeprefix(f"{place}."): t for key, t in parts.items() if key.startswith(f"{place}.")}
        stack, count = layers[place]
        keys, values = _pairs(_rows(options, own, where), count, where)
        cross = place == "cross_prefix"
        pieces.append(Prefix(keys=keys, values=values, shift=False, distances="first", stack=stack, cross=cross))
    return pieces, None


def _layers(copies: list[str]) -> dict[str, tuple[str | None, int]]:
    """By place of a prefix: its stack and how many layers that has, told by the attentions with a copy of the pool.

    Attentions of one kind are in one list of layers; of two lists, the one with two kinds is the decoder's.
    """
    kinds = Counter(re.sub(r"\.\d+\.", ".*.", path, count=1) for path in copies)
    lists: dict[str, list[int]] = {}
    for kind, count in kinds.items():
        lists.setdefault(kind.partition(".*.")[0], []).append(count)
    match sorted(lists.values(), key=len):
        case [[count]]:
            return {"self_prefix": (None, count)}
        case [[encoder], [decoder, cross]] if decoder == cross:
            own = ("decoder", decoder)
            return {"encoder_prefix": ("encoder", encoder), "self_prefix": own, "cross_prefix": own}
        case _:
            return {}


def _rows(options: Options, parts: Tensors, where: str) -> Tensor:
    """The rows of a prefix `[n, 2 · layers · d]`: as they are, or from its MLP."""
    length, flat = options.need("prefix_length", int), options.need("flat", bool)
    form = ["control_trans"] if flat else [f"control_trans.{i}.{p}" for i in (0, 2) for p in ("weight", "bias")]
    names = form if flat else ["wte.weight", *form]
    if set(names) != set(parts):
        what = f"the configuration says `flat: {str(flat).lower()}`, and the tensors are of the other form"
        raise DeltaError(what, where=where, there_is=sorted(parts))
    options.ignore("non_linearity")
    rows = parts[names[0]].reshape(length, -1)
    if flat:
        return rows
    if options.get("non_linearity", str) != "tanh":
        raise DeltaError("a prefix's MLP is read with tanh only", where=options.where)
    w1, b1, w2, b2 = (parts[n] for n in names[1:])
    return torch.tanh(rows @ w1.T + b1) @ w2.T + b2


def _pairs(rows: Tensor, layers: int, where: str) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Keys and values of every layer."""
    if rows.shape[1] % (2 * layers):
        raise DeltaError(f"a prefix of {rows.shape[1]} numbers a token is not one of {layers} layers", where=where)
    slots = rows.reshape(len(rows), layers, 2, -1)
    return slots[:, :, 0].unbind(1), slots[:, :, 1].unbind(1)
