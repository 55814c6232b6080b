"""Reads a folder that AdapterHub's `save_adapter` wrote: `adapter_config.json`, the adapter's tensors, maybe a head's.

Keys are those of adapters 1.3 (`<module path>.adapters.NAME.adapter_down.0.weight`). A key of the configuration that is
not understood must have the value with which it changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from surgeon.errors import DeltaError, shorten
from surgeon.foreign.adapterhub_heads import HEAD, kind_of, read_head
from surgeon.foreign.adapterhub_methods import bottleneck, lora, prefix
from surgeon.foreign.files import Options, read_config, read_tensors
from surgeon.foreign.pieces import Checkpoint, Piece, Whole

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter.safetensors", "pytorch_adapter.bin")

Tensors = dict[str, Tensor]
READERS: Mapping[str, Callable[[Options, str, Tensors, str], tuple[list[Piece], Any]]] = {
    "bottleneck": bottleneck,
    "lora": lora,
    "prefix_tuning": prefix,
}


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
    if method not in READERS:
        raise DeltaError(f"'{method}' is a method that cannot be read", where=options.where, there_is=READERS)
    pieces, targets = READERS[method](options, name, left, where)
    options.finish(f"AdapterHub's {method}")
    if left:
        what = f"{len(left)} of {len(tensors)} tensors are none that the configuration calls for: {shorten(left)}"
        raise DeltaError(what, where=where, try_="the adapter_config.json that was saved with these weights")
    head = kind_of(model_class)
    labels: tuple[str, ...] | None = None
    if (folder / HEAD).is_file():
        own, kind, labels = read_head(folder, allow_pickle=allow_pickle)
        # Of a model whose inner part has no name, as T5's, AdapterHub takes the pool of a prefix for a head's tensor.
        own = [p for p in own if not (isinstance(p, Whole) and p.name in tensors and p.tensor.equal(tensors[p.name]))]
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
