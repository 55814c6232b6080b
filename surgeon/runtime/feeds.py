"""What a caller gives to a run, checked against the graph's inputs and completed. ONNX Runtime checks less than one
expects: sizes of different inputs are not compared, and a negative token id means "from the end" to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from surgeon.errors import DataError, did_you_mean
from surgeon.runtime.manifest import Port
from surgeon.runtime.taskfile import Array

SEQUENCE = "sequence"  # the axis that the base's max_length limits


def complete(
    ports: Sequence[Port], inputs: Mapping[str, Any], max_length: int | None, taken: Callable[[str], int]
) -> dict[str, Array]:
    """Arrays for all inputs of the graph: those given, and those it can fill in. Raises DataError.

    `taken` says how many of the `max_length` positions of an axis the task's own tokens take.
    """
    if not isinstance(inputs, Mapping):
        raise DataError(
            f"inputs are a mapping from name to array, not {type(inputs).__name__}", there_is=_listed(ports)
        )
    known = [port.name for port in ports]
    for name in inputs:
        if name not in known:
            raise DataError(f"there is no input '{name}'", there_is=_listed(ports), try_=did_you_mean(str(name), known))
    sizes: dict[str, tuple[int, str]] = {}
    feed = {}
    for port in ports:
        if port.name in inputs:
            feed[port.name] = array = _array(port, inputs[port.name])
            _measure(port, array, sizes)
            _check_room(port, array, max_length, taken)
        elif port.fill is None:
            raise DataError(f"input '{port.name}' is missing", there_is=_listed(ports))
    for port in ports:
        if port.name not in feed:
            feed[port.name] = _filled(port, sizes)
    return feed


def _array(port: Port, value: object) -> Array:
    """An array of the port's dtype. Lists convert by kind (any floats, any integers), arrays only without loss."""
    if not isinstance(value, np.ndarray | np.generic | list | tuple):
        raise DataError(
            f"input '{port.name}' is a {type(value).__name__}, not a numpy array",
            there_is=_wanted(port),
            try_="give a numpy array or a list of numbers",
        )
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise DataError(f"the rows of input '{port.name}' have different lengths", try_="pad them, and mask") from error
    dtype = np.dtype(port.dtype)
    if array.size == 0:
        raise DataError(f"input '{port.name}' is empty: its shape is {list(array.shape)}", there_is=_wanted(port))
    rule = "safe" if isinstance(value, np.ndarray) else "same_kind"
    if not np.can_cast(array.dtype, dtype, rule):  # type: ignore[arg-type]
        raise DataError(f"input '{port.name}' has dtype {array.dtype}", there_is=_wanted(port))
    array = np.ascontiguousarray(array, dtype=dtype)
    if dtype.kind == "i" and array.min() < 0:
        raise DataError(
            f"input '{port.name}' holds {array.min()}, and negative numbers are no ids", there_is=_wanted(port)
        )
    return array


def _measure(port: Port, array: Array, sizes: dict[str, tuple[int, str]]) -> None:
    """Compare an array's sizes with those of the inputs before it, and remember new ones."""
    if array.ndim != len(port.axes):
        raise DataError(
            f"input '{port.name}' has {array.ndim} axes, {list(array.shape)}",
            there_is=_wanted(port),
            try_="a single text is a batch of one: array[None]" if array.ndim == len(port.axes) - 1 else None,
        )
    for place, (axis, size) in enumerate(zip(port.axes, array.shape, strict=True)):
        expected, source = (axis, "the graph") if isinstance(axis, int) else sizes.setdefault(axis, (size, port.name))
        if size != expected:
            called = axis if isinstance(axis, str) else f"axis {place}"
            raise DataError(
                f"input '{port.name}' is {list(array.shape)}: its {called} is {size}",
                there_is=f"{expected} in {source}; {_wanted(port)}",
            )


def _check_room(port: Port, array: Array, max_length: int | None, taken: Callable[[str], int]) -> None:
    """Does the text fit beside the tokens of the task? Past the table of positions an answer may be garbage."""
    for axis, size in zip(port.axes, array.shape, strict=True):
        own = taken(axis) if isinstance(axis, str) else 0
        if max_length is None or not (axis == SEQUENCE or own) or size + own <= max_length:
            continue
        raise DataError(
            f"input '{port.name}' has {size} tokens, the base takes {max_length} at most",
            there_is=f"tokens of the task's own: {own}, which leaves {max_length - own}" if own else None,
            try_="cut the text: `Session.encode(texts, task=…)` does",
        )


def _filled(port: Port, sizes: Mapping[str, tuple[int, str]]) -> Array:
    unknown = [axis for axis in port.axes if isinstance(axis, str) and axis not in sizes]
    if unknown:
        raise DataError(f"input '{port.name}' is missing, and nothing given tells its {', '.join(map(str, unknown))}")
    shape = [axis if isinstance(axis, int) else sizes[axis][0] for axis in port.axes]
    return np.full(shape, port.fill, dtype=port.dtype)


def _wanted(port: Port) -> str:
    return f"{port.name} {port.dtype}[{', '.join(str(axis) for axis in port.axes)}]"


def _listed(ports: Sequence[Port]) -> str:
    return "; ".join(_wanted(port) + ("" if port.fill is None else f" (else {port.fill})") for port in ports)
