"""Reads a fusion that AdapterHub wrote: the fusion layers, and the adapters that they mix, each in a folder of its own.

`save_adapter_setup` puts all of it into one folder, with a head if asked to; `save_adapter_fusion` writes the layers
alone, and the adapters are then looked for in that folder and beside it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from surgeon.errors import DeltaError, shorten
from surgeon.foreign import adapterhub
from surgeon.foreign.adapterhub_heads import HEAD, kind_of, read_head
from surgeon.foreign.adapterhub_methods import plain, split
from surgeon.foreign.files import Options, read_config, read_tensors
from surgeon.foreign.pieces import Bottleneck, Checkpoint, Fused, Piece

SETUP, CONFIG = "adapter_setup.json", "adapter_fusion_config.json"
WEIGHTS = ("model_adapter_fusion.safetensors", "pytorch_model_adapter_fusion.bin")
PLAIN = {"query": True, "key": True, "query_before_ln": False, "residual_before": False, "temperature": False}


def reads(folder: Path) -> bool:
    """Whether this is a folder of a fusion."""
    return (folder / SETUP).is_file() or (folder / CONFIG).is_file()


def read(folder: Path, *, allow_pickle: bool = False) -> Checkpoint:
    """The fusion in `folder` with its adapters and its head. Raises DeltaError unless all of it is understood."""
    setup = _setup(folder) if (folder / SETUP).is_file() else None
    layers = folder if setup is None else folder / ",".join(setup)
    outer = Options(read_config(layers / CONFIG), str(layers / CONFIG))
    outer.need("version", str)
    names, name = outer.need("adapter_names", list), outer.need("name", str)
    if setup is not None and setup != names:
        raise DeltaError(f"the setup fuses {', '.join(setup)}, and the layers {', '.join(names)}", where=str(folder))
    adapters = [_adapter(each, layers, allow_pickle=allow_pickle) for each in names]
    if others := {a.base for a in adapters} - {outer.get("model_name", str)}:
        raise DeltaError(
            "the adapters and the fusion are of several bases", where=str(folder), there_is=sorted(map(str, others))
        )
    pieces = _layers(layers, outer, name, adapters, allow_pickle=allow_pickle)
    head, labels = kind_of(outer.need("model_class", str)), None
    if (folder / HEAD).is_file():
        own, kind, labels = read_head(folder, allow_pickle=allow_pickle)
        pieces, head = [*pieces, *own], kind or head
    elif head is not None and not head.endswith("-lm"):
        raise DeltaError(
            "the head that was trained with the fusion is not there",
            where=str(folder),
            there_is=sorted(path.name for path in folder.iterdir()),
            try_="`save_adapter_setup(..., head_setup=True)`, or `save_head` into this folder",
        )
    return Checkpoint(
        where=str(folder),
        method="AdapterHub fusion",
        pieces=tuple(pieces),
        base=outer.get("model_name", str) or None,
        head=head,
        targets=adapters[0].targets,
        labels=labels if head == "sequence-classification" else None,
    )


def _setup(folder: Path) -> list[str]:
    """The names of the adapters that a setup fuses."""
    options = Options(read_config(folder / SETUP), str(folder / SETUP))
    block = options.need("adapter_setup", dict)
    children = block.get("children", [])
    names = [child["children"][0] for child in children if isinstance(child, dict) and child.get("type") == "single"]
    if block.get("type") != "Fuse" or len(names) != len(children) or not names:
        raise DeltaError("only a setup that fuses adapters is read", where=options.where, there_is=str(block)[:200])
    return [str(name) for name in names]


def _adapter(name: str, layers: Path, *, allow_pickle: bool) -> Checkpoint:
    """One of the adapters; the head beside it belongs to its own task."""
    places = [place / name for place in (layers, layers.parent) if adapterhub.reads(place / name)]
    if not places:
        raise DeltaError(
            f"the fused adapter '{name}' is not there",
            where=str(layers),
            there_is=sorted(path.name for path in layers.parent.iterdir()),
            try_="`save_adapter_setup`, which writes the adapters too; or their folders beside this one",
        )
    found = adapterhub.read(places[0], allow_pickle=allow_pickle)
    wrong = [p for p in found.pieces if isinstance(p, Bottleneck) and p.placement != "pfeiffer"]
    if found.method != "AdapterHub bottleneck" or wrong:
        what = wrong[0].placement if wrong else found.method
        raise DeltaError(
            f"'{name}' is an adapter ({what}) that cannot be fused here",
            where=str(places[0]),
            there_is="`fusion` is of adapters behind the feed-forward's join (`seq_bn`)",
        )
    return found


def _layers(folder: Path, outer: Options, name: str, adapters: list[Checkpoint], *, allow_pickle: bool) -> list[Piece]:
    options = Options(outer.need("config", dict), outer.where)
    plain(options, PLAIN)
    options.ignore("regularization", "value_initialized", "dropout_prob", "value_before_softmax")
    valued = options.need("value", bool)
    options.finish("AdapterHub's fusion")
    left, _ = read_tensors(folder, WEIGHTS, allow_pickle=allow_pickle)
    found = split(left, "adapter_fusion_layer", name)
    if left:
        raise DeltaError(f"{len(left)} tensors are of no fusion '{name}': {shorten(left)}", where=str(folder))
    by_path = [{p.path: p for p in a.pieces if isinstance(p, Bottleneck)} for a in adapters]
    for own in by_path:
        if own.keys() != found.keys():
            raise DeltaError(
                "the fusion and its adapters are at other places",
                where=str(folder),
                there_is=f"{shorten(sorted(found))}; {shorten(sorted(own))}",
            )
    names = {f"{part}.{leaf}" for part in ("query", "key") for leaf in ("weight", "bias")}
    names |= {"value.weight"} if valued else set()
    pieces: list[Piece] = []
    for path, parts in found.items():
        if set(parts) != names:
            raise DeltaError(
                f"{path} has other parts than its configuration says", where=str(folder), there_is=sorted(parts)
            )
        query = parts["query.weight"]
        value: Tensor = parts["value.weight"] if valued else torch.eye(len(query), dtype=query.dtype)
        pieces.append(
            Fused(
                path=path,
                adapters=tuple(own[path] for own in by_path),
                query=(query.T, parts["query.bias"]),
                key=(parts["key.weight"].T, parts["key.bias"]),
                value=value.T,
            )
        )
    return pieces
