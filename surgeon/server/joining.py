"""Requests to one batch and back: what may stand together, how shorter rows are filled up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from surgeon.errors import BuildError
from surgeon.runtime import Manifest, Session
from surgeon.runtime.feeds import SEQUENCE
from surgeon.runtime.taskfile import Array

MASK = "attention_mask"
SHORT, LONG = "a", " ".join(["a"] * 16)


@dataclass(frozen=True)
class Padding:
    """What the build's own tokenizer fills shorter rows up with, and on which side."""

    values: Mapping[str, int]
    left: bool

    def fill(self, name: str, array: Array, length: int) -> Array:
        """The array `[rows, length]`."""
        missing = length - array.shape[1]
        if missing == 0:
            return array
        sides = (missing, 0) if self.left else (0, missing)
        return np.pad(array, ((0, 0), sides), constant_values=self.values[name])


def find_padding(session: Session) -> Padding | None:
    """How the tokenizer pads: seen from two texts. None where rows of different lengths must not share a batch."""
    manifest = session.manifest
    along = {port.name for port in manifest.inputs if SEQUENCE in port.axes}
    # An answer for every token would have to be cut again, and where virtual tokens stand is the graph's business.
    if MASK not in along or any(SEQUENCE in port.axes for port in manifest.outputs):
        return None
    if any(port.axes != ("batch", SEQUENCE) for port in manifest.inputs if port.name in along):
        return None
    try:
        arrays = session.encode([SHORT, LONG])
    except BuildError:  # no tokenizer, or one that does not pad
        return None
    mask = arrays[MASK][0]
    if set(arrays) != along or mask[0] == mask[-1]:
        return None
    left = bool(mask[0] == 0)
    return Padding({name: int(array[0, 0 if left else -1]) for name, array in arrays.items()}, left)


def form_of(manifest: Manifest, arrays: Mapping[str, Array], padding: Padding | None) -> tuple[object, ...]:
    """What rows must have in common to stand in one batch: all sizes but the batch's, and the padded one's."""
    free = {} if padding is None else padding.values
    return tuple(
        (port.name, None if port.name in free else arrays[port.name].shape[1:])
        for port in manifest.inputs
        if port.name in arrays
    )


def join(parts: Sequence[Mapping[str, Array]], padding: Padding | None) -> dict[str, Array]:
    """Rows of several requests as one batch."""
    if len(parts) == 1:
        return dict(parts[0])
    joined = {}
    for name in parts[0]:
        arrays = [part[name] for part in parts]
        if padding is not None and name in padding.values:
            length = max(array.shape[1] for array in arrays)
            arrays = [padding.fill(name, array, length) for array in arrays]
        joined[name] = np.concatenate(arrays)
    return joined


def length_of(arrays: Mapping[str, Array]) -> int:
    """Positions of a row, of the input that has most."""
    return max((array.shape[1] for array in arrays.values() if array.ndim > 1), default=1)
