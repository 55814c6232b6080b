"""What an encoder-decoder's texts go on from: every source is read once, and what the decoder reads of it is kept.

A source is read alone and without padding, so its neighbours change nothing in it. What the decoder reads of a group's
sources then stands together, padded behind and masked. All texts of a group are equally long, and one that ends leaves.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from surgeon.runtime.generation.halves import Halves
from surgeon.runtime.generation.rows import Row
from surgeon.runtime.manifest import Generation
from surgeon.runtime.taskfile import Array

Parts = Sequence[Array]
"""What the decoder reads of a source: its mask `[1, columns]`, keys and values `[1, heads, columns, width]`."""


def read_source(halves: Halves, row: Row) -> Parts:
    """Run the encoder on a row's source."""
    ids = np.array([row.source], np.int64)
    return [value.numpy().copy() for value in halves.read(row, {"input_ids": ids, "attention_mask": np.ones_like(ids)})]


class Group:
    """Texts that begin together: what the decoder reads of their sources, and its own cache."""

    def __init__(self, halves: Halves, generation: Generation, rows: Sequence[Row], read: Sequence[Parts]) -> None:
        assert generation.source is not None
        self.rows = list(rows)
        self._halves, self._cache = halves, generation.cache
        self._names = [port.name for port in generation.source.bridge]
        self._columns = [parts[0].shape[_columns(parts[0])] for parts in read]
        width = max(self._columns)
        self._bridge = [np.concatenate([_wide(part, width) for part in parts]) for parts in zip(*read, strict=True)]
        self._past = [np.zeros(t.shape(batch=len(read), past=0), t.past.dtype) for t in self._cache]

    def step(self, tokens: Sequence[int]) -> Array:
        """Let the text of every row go on by a token; logits `[rows, vocabulary]`."""
        fed = {"decoder_input_ids": np.array(tokens, np.int64)[:, None]}
        fed |= dict(zip(self._names, self._bridge, strict=True))
        fed |= {tensor.past.name: array for tensor, array in zip(self._cache, self._past, strict=True)}
        logits, *self._present = self._halves.write(self.rows, fed)
        self._past = [value.numpy() for value in self._present]  # their memory goes with the OrtValues
        last: Array = logits.numpy()[:, -1].copy()
        return last

    def keep(self, order: Sequence[int], *, sources: bool = True) -> None:
        """Go on with these texts, which may be there several times; without `sources` each has that of its place."""
        self._past = [array[list(order)] for array in self._past]
        if not sources:
            return
        self.rows = [self.rows[i] for i in order]
        self._columns = [self._columns[i] for i in order]
        width = max(self._columns)
        self._bridge = [_narrow(array, width)[list(order)] for array in self._bridge]


def _columns(part: Array) -> int:
    """The axis of the source's columns."""
    return 1 if part.ndim == 2 else 2


def _wide(part: Array, width: int) -> Array:
    """Zeros behind, up to so many columns: masked ones in the mask."""
    axis = _columns(part)
    return np.pad(part, [(0, width - part.shape[axis] if at == axis else 0) for at in range(part.ndim)])


def _narrow(part: Array, width: int) -> Array:
    return np.ascontiguousarray(part[:, :width] if part.ndim == 2 else part[:, :, :width])
