"""Task files as ONNX Runtime loads them: written whole or not at all, read only with their checksum and base.

The format holds named tensors and two integers that ONNX Runtime never compares with anything. Here they bind the
file to its content and its base: `adapter_version` is a checksum, `model_version` the start of the base's fingerprint.
"""

from __future__ import annotations

import os
import re
import secrets
import struct
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from onnxruntime import AdapterFormat, OrtValue

from surgeon.errors import BuildError, DeltaError
from surgeon.runtime.ort import ORT_ERRORS

Array = NDArray[Any]
Bytes = bytes | memoryview

SUFFIX = ".onnx_adapter"
DTYPES = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
NAMES = {np.dtype(name): name for name in DTYPES}


@dataclass(frozen=True)
class TaskFile:
    """The content of a task file whose checksum was right."""

    tensors: Mapping[str, Array]
    model_version: int


def checksum(tensors: Mapping[str, Array]) -> int:
    """CRC-32 over names, dtypes, shapes and values, in 31 bits. It finds accidents; tampering is the manifest's job."""
    crc = 0
    for name in sorted(tensors):
        array = tensors[name]
        crc = zlib.crc32(f"{name}{dtype_name(array)}{list(array.shape)}".encode(), crc)
        crc = zlib.crc32(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).data, crc)
    return crc & 0x7FFFFFFF


def dtype_name(array: Array) -> str:
    """The dtype's name; numpy composes it anew each time, which costs more than the checksum of a small tensor."""
    return NAMES.get(array.dtype) or str(array.dtype)


def model_version(fingerprint: str) -> int:
    """The part of a base's fingerprint that a task file can hold."""
    return int(fingerprint[:8], 16) & 0x7FFFFFFF


def write_adapter(path: str | Path, tensors: Mapping[str, Array], fingerprint: str) -> None:
    """Write a task file for the base of this fingerprint. A file of that name is replaced, never written into:
    ONNX Runtime maps loaded files into memory, so a change in place would change or kill whoever runs them.
    """
    path = Path(path)
    arrays = {name: _storable(name, tensors[name], str(path)) for name in sorted(tensors)}
    crc = checksum(arrays)
    form = AdapterFormat()
    form.set_adapter_version(crc)
    form.set_model_version(model_version(fingerprint))
    form.set_parameters({name: OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()})
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        form.export_adapter(str(temporary))
        _flush(temporary)
        os.replace(temporary, path)
        if os.name == "posix":
            _flush(path.parent)
    except OSError as error:
        raise BuildError(f"cannot be written: {error.strerror}", where=str(path)) from error
    except ORT_ERRORS as error:
        raise BuildError(
            "cannot be written",
            where=str(path),
            there_is=f"ONNX Runtime says: {_first_line(error)}",
            try_="is there such a directory, and room on the disk?",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def read_adapter(path: str | Path) -> TaskFile:
    """Read a task file into memory and check it. Raises DeltaError where it is damaged."""
    with tempfile.TemporaryDirectory(prefix="surgeon-") as directory:
        copy, data = private_copy(Path(path), Path(directory))
        return parse_adapter(copy, data, str(path))


def private_copy(path: Path, directory: Path) -> tuple[Path, bytes]:
    """Copy a task file under a fresh name. What is read here is what is checked and run, whatever becomes of `path`."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DeltaError(f"the task file cannot be read: {error.strerror}", where=str(path)) from error
    with private_file(directory) as file:
        file.write(data)
    return Path(file.name), data


@contextmanager
def private_file(directory: Path) -> Iterator[IO[bytes]]:
    """A file under a fresh name, to be written. It goes again where what is done within fails."""
    try:
        with tempfile.NamedTemporaryFile(suffix=SUFFIX, dir=directory, delete=False) as file:
            try:
                yield file
                file.flush()
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        raise BuildError(f"no private copy of the task can be made: {error.strerror}", where=str(directory)) from error


def read_checked(path: Path) -> dict[str, Array]:
    """The tensors of a private file that was checked when it came."""
    return _copies(AdapterFormat.read_adapter(str(path)))


def _copies(form: AdapterFormat) -> dict[str, Array]:
    # `numpy()` is a view that keeps nothing alive: it dangles as soon as its OrtValue is gone.
    return {name: value.numpy().copy() for name, value in form.get_parameters().items()}


def parse_adapter(copy: Path, data: bytes, where: str) -> TaskFile:
    """The checked content of a task file that lies at `copy` and has the bytes `data`."""
    try:
        form = AdapterFormat.read_adapter(str(copy))
        tensors = _copies(form)
    except ORT_ERRORS as error:
        raise DeltaError(
            "is not a task file, or is damaged or cut",
            where=where,
            there_is=f"{len(data)} bytes; ONNX Runtime says: {_first_line(error)}",
            try_="write it again with `surgeon pack`",
        ) from error
    # Two tensors of one name would make the checked one and the one that runs differ.
    if _count(data) != len(tensors) or checksum(tensors) != form.get_adapter_version():
        raise DeltaError(
            "the task file was changed after it was written: its checksum does not hold",
            where=where,
            try_="copy it again, or write it again with `surgeon pack`",
        )
    return TaskFile(tensors, form.get_model_version())


def _storable(name: str, array: Array, where: str) -> Array:
    if not name or array.ndim == 0 or str(array.dtype) not in DTYPES:
        raise DeltaError(
            f"'{name}' ({array.dtype}, {array.ndim} axes) cannot be stored in a task file",
            where=where,
            there_is=f"tensors with a name, at least one axis, and one of these types: {', '.join(DTYPES)}",
        )
    return np.ascontiguousarray(array)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _count(data: bytes) -> int:
    """Length of the vector of parameters, the fourth field of the FlatBuffer's root table. It was verified already."""
    (root,) = struct.unpack_from("<I", data, 0)
    vtable = root - struct.unpack_from("<i", data, root)[0]
    field = 4 + 2 * 3
    if struct.unpack_from("<H", data, vtable)[0] <= field:
        return 0
    (offset,) = struct.unpack_from("<H", data, vtable + field)
    if offset == 0:
        return 0
    at = root + offset
    return int(struct.unpack_from("<I", data, at + struct.unpack_from("<I", data, at)[0])[0])


def _first_line(error: Exception) -> str:
    """ONNX Runtime's own words, without the place in its sources that they begin with."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"^\S+:\d+ .*[)>] (?=\w)", "", lines[0])
