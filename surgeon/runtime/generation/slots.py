"""Rows with a slot each in one buffer, which the graph writes in place.

A slot `[heads, room, width]` begins with the prefix of its row's task, if it has one; then come the row's own columns,
each behind the other. A prompt is read straight into its slot, all slots go on together, and a slot whose row has ended
takes the last one's columns, so that those in use stand first. Nothing is copied from token to token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnxruntime import OrtValue

from surgeon.runtime.generation.decoding import Decoding
from surgeon.runtime.generation.rows import Row
from surgeon.runtime.manifest import Generation
from surgeon.runtime.taskfile import Array

STEP = 64
"""Columns that room grows by."""


class Slots:
    """The rows that go on together, and the buffers of their caches `[slots, heads, room, width]`.

    Where these rows are `expected`, and no others, there is room for all of them from the beginning.
    """

    ready = True

    def __init__(self, decoding: Decoding, generation: Generation, slots: int, expected: Sequence[Row] = ()) -> None:
        self.rows: list[Row] = []
        self._decoding = decoding
        self._lengths: list[int] = []
        self._fronts: list[int] = []
        self._cache, self._slots = generation.cache, min(slots, len(expected) or slots)
        self._buffers: list[Array] = []
        self._views: dict[tuple[int, int], list[OrtValue]] = {}
        if expected:
            self._widen(expected, max(self._front(row) for row in {row.task: row for row in expected}.values()))

    @property
    def going(self) -> list[Row]:
        """Rows that have not ended."""
        return [row for row in self.rows if row.reason is None]

    def read(self, row: Row) -> Array:
        """Read the prompt of a row that comes in; logits `[vocabulary]`."""
        self.renew()
        begin = self._decoding.front(row)
        front = begin[0].shape[1] if begin else 0
        self._widen([*self.rows, row], max([*self._fronts, front]))
        slot = len(self.rows)
        for buffer, start in zip(self._buffers, begin, strict=False):
            buffer[slot, :, :front] = start
        ids = np.array([row.prompt], dtype=np.int64)
        logits: Array = self._decoding.read(row, ids, np.ones_like(ids), self._view(slot, slot + 1))[0][0]
        self.rows.append(row)
        self._lengths.append(len(row.prompt))
        self._fronts.append(front)
        return logits

    def _front(self, row: Row) -> int:
        """Columns that a row's cache begins with."""
        begin = self._decoding.front(row)
        return begin[0].shape[1] if begin else 0

    def renew(self) -> None:
        """Leave out rows that have ended."""
        for slot in reversed([i for i, row in enumerate(self.rows) if row.reason is not None]):
            last, length, front = self.rows.pop(), self._lengths.pop(), self._fronts.pop()
            if slot < len(self.rows):
                self.rows[slot], self._lengths[slot], self._fronts[slot] = last, length, front
                for buffer in self._buffers:
                    buffer[slot, :, : front + length] = buffer[len(self.rows), :, : front + length]

    def step(self) -> Array:
        """Let every row go on by its last token; logits `[rows, vocabulary]`."""
        self._lengths = [length + 1 for length in self._lengths]
        mask = (np.arange(max(self._lengths)) < np.array(self._lengths)[:, None]).astype(np.int64)
        ids = np.array([row.tokens[-1:] for row in self.rows])
        return self._decoding.write(self.rows, ids, mask, self._view(0, len(self.rows)))[0]

    def _widen(self, rows: Sequence[Row], front: int) -> None:
        """Have room for the longest of these rows behind the longest prefix: the operator counts columns so."""
        room = front + max((len(row.prompt) + row.limit for row in rows), default=0)
        if self._buffers and self._buffers[0].shape[2] >= room:
            return
        room = -(-room // STEP) * STEP
        used = max((f + n for f, n in zip(self._fronts, self._lengths, strict=True)), default=0)
        buffers = [np.zeros(t.shape(batch=self._slots, past=room), t.past.dtype) for t in self._cache]
        for buffer, before in zip(buffers, self._buffers, strict=False):
            buffer[: len(self.rows), :, :used] = before[: len(self.rows), :, :used]
        self._buffers, self._views = buffers, {}

    def _view(self, first: int, end: int) -> list[OrtValue]:
        """The buffers of some slots: their memory itself."""
        if (first, end) not in self._views:
            self._views[first, end] = [OrtValue.ortvalue_from_numpy(buffer[first:end]) for buffer in self._buffers]
        return self._views[first, end]
