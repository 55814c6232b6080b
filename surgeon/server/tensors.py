"""Tensors on the wire: the Open Inference Protocol's JSON, and the binary extension as Triton's clients speak it.

A body with the header `Inference-Header-Content-Length` is that many bytes of JSON and then the tensors one after the
other, each as long as its `binary_data_size` says; elements of BYTES have their length in front, four bytes each.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from surgeon.errors import DataError, shorten
from surgeon.runtime.taskfile import Array

DATATYPES = {
    "BOOL": "bool", "UINT8": "uint8", "UINT16": "uint16", "UINT32": "uint32", "UINT64": "uint64", "INT8": "int8",
    "INT16": "int16", "INT32": "int32", "INT64": "int64", "FP16": "float16", "FP32": "float32", "FP64": "float64",
    "BYTES": "object",
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DATATYPES.items()}
KINDS = {"BOOL": "b", "BYTES": "OSU"}
LENGTH = struct.Struct("<I")


@dataclass(frozen=True)
class Wanted:
    """An output that a request names."""

    name: str
    binary: bool


@dataclass(frozen=True)
class Asked:
    """A request, its tensors as arrays; BYTES are arrays of `bytes`. Without `outputs`, all are wanted."""

    id: str | None
    parameters: Mapping[str, Any]
    inputs: Mapping[str, Array]
    outputs: tuple[Wanted, ...] | None
    binary: bool


def read_request(body: bytes, header: str | None = None) -> Asked:
    """Read an inference request; `header` is the JSON's length where tensors follow it. Raises DataError."""
    length = _length(header, len(body))
    doc = read_json(body[:length])
    binary = memoryview(body)[length:]
    parameters = _object(doc.get("parameters", {}), "parameters")
    default = parameters.get("binary_data_output", False) is True
    inputs: dict[str, Array] = {}
    at = 0
    for item in _list(doc.get("inputs"), "inputs"):
        name, array, used = _tensor(item, binary[at:])
        if name in inputs:
            raise DataError(f"there are two inputs '{name}'")
        inputs[name] = array
        at += used
    if not inputs:
        raise DataError("the request has no inputs", try_='"inputs": [{"name", "datatype", "shape", "data"}]')
    if at != len(binary):
        raise DataError(f"{len(binary)} bytes follow the JSON, and the inputs have {at} of them")
    named = doc.get("outputs")
    outputs = None if named is None else tuple(_wanted(item, default) for item in _list(named, "outputs"))
    identity = doc.get("id")
    if identity is not None and not isinstance(identity, str):
        raise DataError("'id' is not a string")
    return Asked(identity, parameters, inputs, outputs or None, default)


def read_json(body: bytes) -> dict[str, Any]:
    """A JSON object. Raises DataError."""
    try:
        doc = json.loads(body, parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        raise DataError(f"the request is not JSON: {error}", try_="a JSON object in UTF-8") from error
    return _object(doc, "the request")


def write_response(
    head: Mapping[str, Any], outputs: Mapping[str, Array], binary: Mapping[str, bool]
) -> tuple[bytes, int | None]:
    """The body of an answer, and the length of its JSON where tensors follow it."""
    listed, tail = [], []
    for name, array in outputs.items():
        item: dict[str, Any] = {"name": name, "datatype": datatype(array), "shape": list(array.shape)}
        if binary.get(name):
            data = _bytes(array)
            item["parameters"] = {"binary_data_size": len(data)}
            tail.append(data)
        else:
            item["data"] = _plain(array)
        listed.append(item)
    text = json.dumps({**head, "outputs": listed}, ensure_ascii=False).encode()
    return b"".join([text, *tail]), len(text) if tail else None


def datatype(array: Array) -> str:
    """The protocol's name of an array's type."""
    return NAMES[str(array.dtype)]


def _tensor(item: Any, rest: memoryview) -> tuple[str, Array, int]:
    """An input's name and array, and how many of the following bytes are its own."""
    fields = _object(item, "an input")
    name = fields.get("name")
    if not isinstance(name, str) or not name:
        raise DataError("an input has no name")
    kind, shape = fields.get("datatype"), fields.get("shape")
    if not isinstance(kind, str) or kind not in DATATYPES:
        raise DataError(f"input '{name}' has datatype {kind!r}", there_is=shorten(DATATYPES, 13))
    if not isinstance(shape, list) or len(shape) > 8 or not all(type(size) is int and size >= 0 for size in shape):
        raise DataError(f"input '{name}' has no shape that is a list of sizes", there_is=repr(shape)[:80])
    count = math.prod(shape)
    parameters = _object(fields.get("parameters", {}), f"parameters of input '{name}'")
    if any(key.startswith("shared_memory") for key in parameters):
        raise DataError(f"input '{name}' lies in shared memory, which this server does not read", try_="send it")
    size = parameters.get("binary_data_size")
    if size is None:
        return name, _from_json(name, kind, shape, count, fields.get("data")), 0
    if type(size) is not int or not 0 <= size <= len(rest):
        raise DataError(f"input '{name}' says {size!r} bytes, and {len(rest)} are left in the request")
    return name, _from_bytes(name, kind, rest[:size], count).reshape(shape), size


def _from_json(name: str, kind: str, shape: list[int], count: int, data: Any) -> Array:
    if not isinstance(data, list):
        raise DataError(f"input '{name}' has no data", try_='"data": [...], flat or as nested as the shape')
    try:
        array = np.array(data, dtype=object if kind == "BYTES" else None)
    except ValueError as error:
        raise DataError(f"the rows of input '{name}' have different lengths") from error
    if array.size != count:
        raise DataError(f"input '{name}' has {array.size} elements, its shape {shape} has {count}")
    if kind == "BYTES":
        return _texts(name, array).reshape(shape)
    dtype = np.dtype(DATATYPES[kind])
    allowed = {"b": "b", "u": "iu", "i": "iu", "f": "iuf"}[dtype.kind]
    if array.size and array.dtype.kind not in allowed:
        raise DataError(f"input '{name}' is {kind}, and its data are not", there_is=repr(data)[:80])
    if array.size and dtype.kind in "iu" and not np.iinfo(dtype).min <= array.min() <= array.max() <= _top(dtype):
        raise DataError(f"input '{name}' holds numbers that {kind} does not")
    return array.astype(dtype).reshape(shape)


def _top(dtype: np.dtype[Any]) -> int:
    return int(np.iinfo(dtype).max)


def _from_bytes(name: str, kind: str, data: memoryview, count: int) -> Array:
    if kind != "BYTES":
        dtype = np.dtype(DATATYPES[kind]).newbyteorder("<")
        if len(data) != count * dtype.itemsize:
            raise DataError(f"input '{name}' has {len(data)} bytes, its shape {count} elements of {dtype.itemsize}")
        return np.frombuffer(data, dtype).astype(dtype.newbyteorder("="))
    found: list[bytes] = []
    at = 0
    while at < len(data) and len(found) <= count:
        if at + LENGTH.size > len(data):
            break
        (length,) = LENGTH.unpack_from(data, at)
        found.append(bytes(data[at + LENGTH.size : at + LENGTH.size + length]))
        at += LENGTH.size + length
    if at != len(data) or len(found) != count:
        raise DataError(f"the bytes of input '{name}' are not {count} elements, each behind its length")
    array = np.empty(count, object)
    array[:] = found
    return array


def _texts(name: str, array: Array) -> Array:
    flat = np.empty(array.size, object)
    for i, value in enumerate(array.ravel()):
        if not isinstance(value, str):
            raise DataError(f"input '{name}' is BYTES, so its data are strings", there_is=repr(value)[:80])
        flat[i] = value.encode("utf-8", "surrogatepass")
    return flat


def _bytes(array: Array) -> bytes:
    if array.dtype != object:
        return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
    return b"".join(LENGTH.pack(len(value)) + value for value in array.ravel())


def _plain(array: Array) -> list[Any]:
    """Flat, row after row. What JSON has no number for is a string, as Triton writes it."""
    if array.dtype == object:
        return [value.decode() for value in array.ravel()]
    if array.dtype.kind == "f":
        return [value if math.isfinite(value) else str(value) for value in array.ravel().tolist()]
    return list(array.ravel().tolist())


def _wanted(item: Any, default: bool) -> Wanted:
    fields = _object(item, "an output")
    name = fields.get("name")
    if not isinstance(name, str):
        raise DataError("an output has no name")
    parameters = _object(fields.get("parameters", {}), f"parameters of output '{name}'")
    if parameters.get("classification"):
        raise DataError(f"output '{name}' is asked for as a classification", try_="the outputs 'label' and 'score'")
    if any(key.startswith("shared_memory") for key in parameters):
        raise DataError(f"output '{name}' is wanted in shared memory, which this server does not write")
    return Wanted(name, parameters.get("binary_data", default) is True)


def _length(header: str | None, total: int) -> int:
    if header is None:
        return total
    if not header.isdecimal() or len(header) > 12 or int(header) > total:
        raise DataError(f"the header says {header[:20]!r} bytes of JSON, and the request has {total}")
    return int(header)


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{what} is not a JSON object", there_is=repr(value)[:80])
    return value


def _list(value: Any, what: str) -> Sequence[Any]:
    if not isinstance(value, list):
        raise DataError(f"'{what}' is missing or is not a list")
    return value


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
