"""A checkpoint that stays where it is: its files are mapped into memory, and ONNX Runtime reads its weights from them.

ONNX Runtime itself refuses weights outside of a model's folder, so they are given to it one by one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnxruntime import OrtValue

from surgeon.errors import BuildError, shorten
from surgeon.runtime.fields import REBUILD, Fields

BFLOAT16 = 16
"""ONNX's number of a type that numpy does not have."""
AGAIN = "the checkpoint as it was, or compile again for the one there is"
WORDS = {"float": "float32", "double": "float64"}
"""ONNX's names of types where numpy has others."""


@dataclass(frozen=True)
class Tensor:
    """A weight of the base, and where it lies."""

    file: str
    offset: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """The files by name, each with its hash and size, and what each ONNX model reads of them."""

    folder: str
    files: Mapping[str, tuple[str, int]]
    tensors: Mapping[str, Mapping[str, Tensor]]

    def read(self, graph: str, *, verify: bool) -> tuple[list[str], list[OrtValue]]:
        """The weights that a model of the build reads from the files, mapped into memory.

        Raises BuildError where the checkpoint is not the one the build was made from: by size, and with `verify` by
        hash. What is changed in place later changes answers.
        """
        data = {name: self._map(name) for name in self.files}
        if verify:
            faults = [n for n, (sha256, _) in self.files.items() if hashlib.sha256(data[n].data).hexdigest() != sha256]
            self._refuse([f"{name} has other content (its hash differs)" for name in faults])
        wanted = self.tensors.get(graph, {})
        return list(wanted), [_value(data[tensor.file], tensor) for tensor in wanted.values()]

    def _map(self, name: str) -> NDArray[np.uint8]:
        path, (_, size) = Path(self.folder, name), self.files[name]
        try:
            found = path.stat().st_size
            if found == size:
                return np.memmap(path, np.uint8, "r")
        except FileNotFoundError as error:
            raise BuildError(
                f"{name} of the base's checkpoint is not where it was when the build was made",
                where=self.folder,
                try_="put it back, or a symbolic link to where it is now; `export: {weights: link}` makes a build that "
                "keeps it",
            ) from error
        except OSError as error:
            raise BuildError(
                f"{name} of the base's checkpoint cannot be read: {error.strerror}", where=self.folder
            ) from error
        raise self._changed([f"{name} has {found} bytes instead of {size}"])

    def _refuse(self, faults: list[str]) -> None:
        if faults:
            raise self._changed(faults)

    def _changed(self, faults: list[str]) -> BuildError:
        what = "the base's checkpoint is not the one that the build was made from"
        return BuildError(what, where=self.folder, there_is=shorten(faults), try_=AGAIN)


def _value(data: NDArray[np.uint8], tensor: Tensor) -> OrtValue:
    """A tensor over the mapped bytes."""
    bfloat = tensor.dtype == "bfloat16"
    kind = np.dtype(np.uint16 if bfloat else WORDS.get(tensor.dtype, tensor.dtype))
    size = prod(tensor.shape) * kind.itemsize
    part = data[tensor.offset : tensor.offset + size]
    if part.size != size or tensor.offset < 0:
        raise BuildError(
            f"a weight lies past the end of {tensor.file}", there_is=f"at {tensor.offset}: {tensor}", try_=REBUILD
        )
    aligned = part if tensor.offset % kind.itemsize == 0 else part.copy()
    array: NDArray[Any] = aligned.view(kind).reshape(tensor.shape)
    if bfloat:
        return OrtValue.ortvalue_from_numpy_with_onnx_type(array, BFLOAT16)
    return OrtValue.ortvalue_from_numpy(array)


def parse_checkpoint(item: Fields) -> Checkpoint:
    """The manifest's record of it."""
    files = {
        item.inside(n): (file.get("sha256", str), file.get("bytes", int)) for n, file in item.named("files").items()
    }
    tensors = {
        graph: MappingProxyType({name: _tensor(entry, files) for name, entry in read.items()})
        for graph in item.get("tensors", dict)
        if (read := item.fields("tensors").named(graph)) is not None
    }
    return Checkpoint(item.get("folder", str), MappingProxyType(files), MappingProxyType(tensors))


def _tensor(item: Fields, files: Mapping[str, Any]) -> Tensor:
    shape, file, dtype = item.get("shape", list), item.get("file", str), item.get("dtype", str)
    if not all(isinstance(size, int) and size >= 0 for size in shape):
        raise item.fault("shape", "a list of sizes")
    if file not in files:
        raise item.fault("file", "a file of the checkpoint")
    if dtype not in {*WORDS, "bfloat16", "float16", "int64", "int32", "int8", "uint8", "bool"}:
        raise item.fault("dtype", "a type of tensors")
    return Tensor(file, item.get("offset", int), dtype, tuple(shape))
