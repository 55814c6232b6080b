"""Reads a folder that AdapterHub's `save_adapter` wrote: `adapter_config.json`, the adapter's tensors, maybe a head's.

Keys are those of adapters 1.3 (`<module path>.adapters.NAME.adapter_down.0.weight`). Bottleneck adapters, LoRA and
prefixes are read, with the head that stands beside them. A key of the configuration that is not understood must have
the value with which it changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgeon.errors import DeltaError, shorten
from surgeon.foreign.files import Options, read_config, read_tensors
from surgeon.foreign.pieces import Bottleneck, Checkpoint, Classifier, Piece, Prefix, Product, Targets, Whole
from surgeon.spec import HeadName

CONFIG, HEAD = "adapter_config.json", "head_config.json"
WEIGHTS = ("adapter.safetensors", "pytorch_adapter.bin")
HEAD_WEIGHTS = ("model_head.safetensors", "pytorch_model_head.bin")
CLASSES: dict[str, HeadName] = {
    "ForSequenceClassification": "sequence-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
}
ACTIVATIONS = {"relu": "relu", "swish": "silu", "silu": "silu", "gelu": "gelu", "tanh": "tanh"}
# What else a bottleneck's configuration may say, each with the only value that is read.
PLAIN: dict[str, Any] = {
    "ln_before": False, "ln_after": False, "residual_before_ln": True, "adapter_residual_before_ln": False,
    "original_ln_after": True, "phm_layer": False, "use_gating": False, "inv_adapter": None, "cross_adapter": False,
}  # fmt: skip
TRAINING = (
    *("dropout", "stochastic_depth", "init_weights", "init_weights_seed", "inv_adapter_reduction_factor", "dtype"),
    *("factorized_phm_W", "factorized_phm_rule", "hypercomplex_nonlinearity", "learn_phm", "phm_bias", "phm_c_init"),
    *("phm_dim", "phm_init_range", "phm_rank", "shared_W_phm", "shared_phm_rule", "reduction_factor"),
)
"""Keys that matter to training, or to what is off."""

Tensors = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class EveryLayer(Targets):
    """AdapterHub adapts each layer alike, but for those in `left_out`."""

    left_out: tuple[int, ...] = ()

    def wanted(self, paths: Collection[str]) -> frozenset[str]:
        """The sites of one layer in all layers that the base has."""
        found = (re.fullmatch(r"(.*?)\.\d+\.(.*)", path) for path in self.found)
        places = {(m[1], m[2]) for m in found if m}
        layers = {before: [p[len(before) + 1 :] for p in paths if p.startswith(f"{before}.")] for before, _ in places}
        return frozenset(
            f"{before}.{n}.{after}"
            for before, after in places
            for n in layers[before]
            if n.isdecimal() and int(n) not in self.left_out
        )


def reads(folder: Path) -> bool:
    """Whether this is a folder of AdapterHub."""
    path = folder / CONFIG
    return path.is_file() and "model_class" in read_config(path)


def read(folder: Path, *, allow_pickle: bool = False) -> Checkpoint:
    """The checkpoint in `folder`. Raises DeltaError unless all of it is understood."""
    where = str(folder)
    outer = Options(read_config(folder / CONFIG), str(folder / CONFIG))
    outer.need("version", str)  # without it, names of activations mean others
    name, model_class = outer.need("name", str), outer.need("model_class", str)
    options = Options(outer.need("config", dict), outer.where)
    tensors, fingerprint = read_tensors(folder, WEIGHTS, allow_pickle=allow_pickle)
    left = dict(tensors)
    method = options.get("architecture", str, "bottleneck")
    readers = {"bottleneck": _bottleneck, "lora": _lora, "prefix_tuning": _prefix}
    if method not in readers:
        raise DeltaError(f"'{method}' is a method that cannot be read", where=options.where, there_is=readers)
    pieces, targets = readers[method](options, name, left, where)
    options.finish(f"AdapterHub's {method}")
    if left:
        what = f"{len(left)} of {len(tensors)} tensors are none that the configuration calls for: {shorten(left)}"
        raise DeltaError(what, where=where, try_="the adapter_config.json that was saved with these weights")
    head = next((kind for ending, kind in CLASSES.items() if model_class.endswith(ending)), None)
    labels: tuple[str, ...] | None = None
    if (folder / HEAD).is_file():
        own, kind, labels = _head(folder, allow_pickle=allow_pickle)
        pieces, head = [*pieces, *own], kind or head
    return Checkpoint(
        where=where,
        method=f"AdapterHub {method}",
        pieces=tuple(pieces),
        base=outer.get("model_name", str) or None,
        fingerprint=fingerprint,
        head=head,
        targets=targets,
        labels=labels if head == "sequence-classification" else None,
    )


def _split(left: Tensors, marker: str, name: str) -> dict[str, Tensors]:
    """Take `<path>.<marker>.<name>.<part>` out of `left`: the parts by path."""
    middle = f".{marker}.{name}."
    found: dict[str, Tensors] = {}
    for key in [key for key in left if middle in key]:
        path, _, part = key.partition(middle)
        found.setdefault(path, {})[part] = left.pop(key)
    return found


def _plain(options: Options, values: Mapping[str, Any]) -> None:
    """Raise DeltaError where a key has another value than the one that is read."""
    for key, value in values.items():
        options.ignore(key)
        if options.config.get(key, value) != value:
            raise DeltaError(f"`{key}` is {options.config[key]!r}, and only {value!r} is read", where=options.where)


def _targets(options: Options, found: Collection[str]) -> EveryLayer:
    return EveryLayer(found=frozenset(found), left_out=tuple(options.get("leave_out", list, [])))


def _bottleneck(options: Options, name: str, left: Tensors, where: str) -> tuple[list[Piece], Targets]:
    _plain(options, PLAIN)
    options.ignore(*TRAINING, "mh_adapter", "output_adapter")
    before = options.need("original_ln_before", bool)
    placement = "parallel" if options.need("is_parallel", bool) else "pfeiffer" if before else "houlsby"
    if placement == "pfeiffer" and options.config.get("mh_adapter"):
        raise DeltaError("`original_ln_before` with an adapter behind attention is not read", where=options.where)
    activation, scaling = options.need("non_linearity", str), options.need("scaling", (int, float, str))
    if activation not in ACTIVATIONS:
        raise DeltaError(f"the activation '{activation}' is not read", where=options.where, there_is=ACTIVATIONS)
    names = ["adapter_down.0.weight", "adapter_down.0.bias", "adapter_up.weight", "adapter_up.bias"]
    names += ["scaling"] if isinstance(scaling, str) else []
    pieces: list[Piece] = []
    found = _split(left, "adapters", name)
    for path, parts in found.items():
        if set(parts) != set(names):
            raise DeltaError(f"{path} has other parts than its configuration says", where=where, there_is=sorted(parts))
        down, down_bias, up, up_bias, *learned = (parts[n] for n in names)
        factor = learned[0] if learned else torch.tensor(1.0)  # a number, or one for each feature
        own = (down.T, down_bias, up.T * factor, up_bias * factor)
        pieces.append(
            Bottleneck(
                path=path,
                weights=own,
                placement=placement,
                activation=ACTIVATIONS[activation],
                scale=1.0 if isinstance(scaling, str) else float(scaling),
            )
        )
    return pieces, _targets(options, found)


def _lora(options: Options, name: str, left: Tensors, where: str) -> tuple[list[Piece], Targets]:
    _plain(options, {"composition_mode": "add", "use_gating": False, "use_dora": False, "vera_b": None, "vera_d": None})
    options.ignore(*TRAINING, "selfattn_lora", "intermediate_lora", "output_lora")
    r, alpha = options.need("r", int), options.need("alpha", (int, float))
    sides = [side for side in "qkv" if side in options.need("attn_matrices", list)]
    pieces: list[Piece] = []
    found = _split(left, "loras", name)
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


def _apart(b: Tensor, r: int, sides: list[str]) -> Tensor:
    """B of a fused projection, whose sides have products of their own, as the blocks of one for all three sides."""
    count = len(sides)
    width = b.shape[0] // count
    whole = b.new_zeros(3 * width, r * count)
    for i, side in enumerate(sides):
        start = "qkv".index(side) * width
        whole[start : start + width, i * r : (i + 1) * r] = b[i * width : (i + 1) * width]
    return whole


def _prefix(options: Options, name: str, left: Tensors, where: str) -> tuple[list[Piece], None]:
    _plain(options, {"use_gating": False, "leave_out": []})
    options.ignore(*TRAINING, "encoder_prefix", "cross_prefix", "shared_gating", "bottleneck_size")
    length, flat = options.need("prefix_length", int), options.need("flat", bool)
    found = _split(left, "prefix_tunings", name)
    pools = [path for path in found if not path.endswith(".pool")]
    copies = [found[path] for path in found if path.endswith(".pool")]
    if len(pools) != 1 or not copies:
        raise DeltaError("a prefix has one pool, and a copy of it in each layer", where=where, there_is=sorted(found))
    parts = found[pools[0]]
    for copy in copies:
        if copy.keys() != parts.keys() or not all(copy[key].equal(parts[key]) for key in parts):
            raise DeltaError("the layers' copies of the prefix differ from it", where=where)
    if not all(key.startswith("self_prefix.") for key in parts):
        raise DeltaError("only the prefix of a single stack is read", where=where, there_is=sorted(parts))
    form = ["control_trans"] if flat else [f"control_trans.{i}.{p}" for i in (0, 2) for p in ("weight", "bias")]
    names = [f"self_prefix.{part}" for part in (form if flat else ["wte.weight", *form])]
    if set(names) != set(parts):
        what = f"the configuration says `flat: {str(flat).lower()}`, and the tensors are of the other form"
        raise DeltaError(what, where=where, there_is=sorted(parts))
    rows = parts[names[0]].reshape(length, -1)
    if not flat:
        if options.get("non_linearity", str) != "tanh":
            raise DeltaError("a prefix's MLP is read with tanh only", where=options.where)
        w1, b1, w2, b2 = (parts[n] for n in names[1:])
        rows = torch.tanh(rows @ w1.T + b1) @ w2.T + b2
    options.ignore("non_linearity")
    slots = rows.reshape(length, len(copies), 2, -1)
    keys, values = (slots[:, :, i].unbind(1) for i in (0, 1))
    return [Prefix(keys=keys, values=values, shift=False)], None


def _head(folder: Path, *, allow_pickle: bool) -> tuple[list[Piece], HeadName | None, tuple[str, ...] | None]:
    """The head beside an adapter: the base's own class, or AdapterHub's two layers on the first token."""
    options = Options(read_config(folder / HEAD), str(folder / HEAD))
    tensors, _ = read_tensors(folder, HEAD_WEIGHTS, allow_pickle=allow_pickle)
    if options.get("config", dict) is None:
        return [Whole(name=name, tensor=tensor) for name, tensor in tensors.items()], None, _names(options)
    own, name = Options(options.need("config", dict), options.where), options.need("name", str)
    if own.need("head_type", str) != "classification":
        raise DeltaError(f"a head of type '{own.config['head_type']}' is not read", where=options.where)
    _plain(own, {"layers": 2, "activation_function": "tanh", "use_pooler": False, "bias": True})
    own.ignore("dropout_prob", "num_labels")
    labels = _names(own)
    own.finish("AdapterHub's head")
    keys = [f"heads.{name}.{i}.{part}" for i in (1, 4) for part in ("weight", "bias")]
    if set(keys) != set(tensors):
        raise DeltaError("the head is not of two layers", where=str(folder), there_is=sorted(tensors))
    dense, dense_bias, weight, bias = (tensors[key] for key in keys)
    return [Classifier(dense=(dense, dense_bias), out=(weight, bias))], "sequence-classification", labels


def _names(options: Options) -> tuple[str, ...] | None:
    """The names of the labels, in their order."""
    named = options.get("label2id", dict)
    return tuple(sorted(named, key=lambda label: named[label])) if named else None
