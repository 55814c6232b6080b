"""Where the weights of an ONNX model lie: in its own data file, or in files that have them already.

Tensors are found by their bytes, so it does not matter how a checkpoint names them, nor in how many files it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from surgeon.base.checkpoint import Checkpoint

Key = tuple[ir.DataType, bytes]
Held = Mapping[Key, ir.ExternalTensor]

DATA = "model.onnx.data"
SMALL = 256
"""Bytes up to which a constant stays in the graph."""
TYPES = {
    "F64": ir.DataType.DOUBLE,
    "F32": ir.DataType.FLOAT,
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
    "I64": ir.DataType.INT64,
    "I32": ir.DataType.INT32,
    "I8": ir.DataType.INT8,
    "U8": ir.DataType.UINT8,
    "BOOL": ir.DataType.BOOL,
}
HALVES = {"F16": torch.float16, "BF16": torch.bfloat16}


def held_by(checkpoint: Checkpoint) -> dict[Key, ir.ExternalTensor]:
    """The tensors of a checkpoint by their bytes, each as the build's ONNX models will name its place."""
    found: dict[Key, ir.ExternalTensor] = {}
    files = {file: np.memmap(checkpoint.folder / file, np.uint8, "r") for file in checkpoint.files}
    for place in checkpoint.tensors():
        if place.length <= SMALL or place.dtype not in TYPES:
            continue
        kind = TYPES[place.dtype]
        data = files[place.file][place.offset : place.offset + place.length]
        location = str(Path(checkpoint.inside, place.file))
        shape = ir.Shape([int(place.length / kind.itemsize)])
        tensor = ir.ExternalTensor(location, place.offset, place.length, kind, shape=shape, name=place.name)
        found.setdefault((kind, hashlib.sha256(data.data).digest()), tensor)
    return found


def key(tensor: Any) -> Key:
    """Type and bytes of a tensor of a model."""
    array = np.ascontiguousarray(tensor.numpy())
    return tensor.dtype, hashlib.sha256(array.reshape(-1).view(np.uint8).data).digest()


def place(model: ir.Model, held: Held, halves: Collection[str] = (), *, but: Collection[str] = ()) -> None:
    """Let the model's tensors be those `held`, and hold fp32 ones in a type of `halves` that has the same numbers.

    What is in half precision is read through a `Cast`, which ONNX Runtime computes once, when a session starts.
    Initializers named in `but` stay.
    """
    for value in list(model.graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or tensor.nbytes <= SMALL or value.name in but:
            continue
        if held and (found := held.get(key(tensor))):
            value.const_value = _placed(found, value, tensor)
            continue
        half = next((h for h in halves if tensor.dtype == ir.DataType.FLOAT and _fits(tensor, HALVES[h])), None)
        if half is None:
            continue
        narrow = ir.LazyTensor(
            partial(_narrowed, tensor, HALVES[half]),
            dtype=TYPES[half],
            shape=ir.Shape(tensor.shape.numpy()),
            name=str(value.name),
        )
        found = held.get(key(narrow)) if held else None
        _cast(model, value, narrow if found is None else _placed(found, value, tensor))


def _placed(place: ir.ExternalTensor, value: ir.Value, like: Any) -> ir.ExternalTensor:
    """The same bytes in the shape and with the name of an initializer."""
    return ir.ExternalTensor(
        place.location,
        place.offset,
        place.length,
        place.dtype,
        shape=ir.Shape(like.shape.numpy()),
        name=str(value.name),
        base_dir=place.base_dir,
    )


def _torch(tensor: Any) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(tensor.numpy()))


def _fits(tensor: Any, dtype: torch.dtype) -> bool:
    wide = _torch(tensor)
    return torch.equal(wide.to(dtype).float(), wide)


def _narrowed(tensor: Any, dtype: torch.dtype) -> Any:
    return ir.tensor(_torch(tensor).to(dtype))


def _cast(model: ir.Model, value: ir.Value, narrow: Any) -> None:
    """Let the readers of an initializer read it through a `Cast`."""
    graph, name = model.graph, str(value.name)
    half = ir.Value(name=f"{name}.half", shape=value.shape, type=ir.TensorType(narrow.dtype), const_value=narrow)
    wide = ir.DataType.FLOAT
    node = ir.Node("", "Cast", [half], [ir.AttrInt64("to", wide)], num_outputs=1)
    del graph.initializers[name]
    output = node.outputs[0]
    output.name, output.shape, output.type = name, value.shape, ir.TensorType(wide)
    value.replace_all_uses_with(output)
    graph.initializers[str(half.name)] = half
    graph.insert_before(graph[0], node)


def save(model: ir.Model, path: Path) -> None:
    """Write a model, and what has no place yet into the data file beside it."""
    loose = [
        value
        for value in model.graph.initializers.values()
        if value.const_value is not None
        and not isinstance(value.const_value, ir.ExternalTensor)
        and value.const_value.nbytes > SMALL
    ]
    tensors = [value.const_value for value in loose if value.const_value is not None]
    if tensors:
        placed = ir.external_data.convert_tensors_to_external(tensors, path.parent, DATA)
        for value, tensor in zip(loose, placed, strict=True):
            value.const_value = tensor
    ir.save(model, path)


def outside(model: ir.Model) -> dict[str, dict[str, Any]]:
    """Initializers that lie in other files than the model's own: their file, place, type and shape."""
    return {
        name: {
            "file": str(value.const_value.location),
            "offset": value.const_value.offset,
            "dtype": value.const_value.dtype.name.lower(),
            "shape": list(value.const_value.shape.numpy()),
        }
        for name, value in model.graph.initializers.items()
        if isinstance(value.const_value, ir.ExternalTensor) and str(value.const_value.location) != DATA
    }
