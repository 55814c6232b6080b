"""Rows with a slot each in one buffer, which the graph writes in place.

A slot `[heads, room, width]` begins with the task's prefix, if it has one; then come the row's own columns, each behind
the other. A prompt is read straight into its slot, all slots go on together, and a slot whose row has ended takes the
last one's columns, so that those in use stand first. Nothing is copied from token to token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from onnxruntime import OrtValue

from surgeon.runtime.generation.decoder import Decoder
from surgeon.runtime.generation.rows import Row
from surgeon.runtime.manifest import Generation
from surgeon.runtime.taskfile import Array


class Slots:
    """The rows that go on together, and the buffers of their caches `[slots, heads, room, width]`."""

    def __init__(self, generation: Generation, deltas: Mapping[str, OrtValue], rows: Sequence[Row], batch: int) -> None:
        self.rows: list[Row] = []
        self._lengths: list[int] = []
        begin = [None if t.start is None or not deltas else deltas[t.start].numpy() for t in generation.cache]
        self._front = max((start.shape[1] for start in begin if start is not None), default=0)
        room = self._front + max((len(row.prompt) + row.limit for row in rows), default=0)
        slots = min(batch, len(rows))
        self._buffers = [np.zeros(t.shape(batch=slots, past=room), t.past.dtype) for t in generation.cache]
        for buffer, start in zip(self._buffers, begin, strict=True):
            if start is not None:
                buffer[:, :, : self._front] = start
        self._views: dict[tuple[int, int], list[OrtValue]] = {}

    @property
    def going(self) -> int:
        """Rows that have not ended."""
        return sum(row.reason is None for row in self.rows)

    def read(self, decoder: Decoder, row: Row) -> Array:
        """Read the prompt of a row that comes in; logits `[vocabulary]`."""
        self.renew()
        slot = len(self.rows)
        ids = np.array([row.prompt], dtype=np.int64)
        logits: Array = decoder.step(ids, np.ones_like(ids), self._view(slot, slot + 1))[0][0]
        self.rows.append(row)
        self._lengths.append(len(row.prompt))
        return logits

    def renew(self) -> None:
        """Leave out rows that have ended."""
        for slot in reversed([i for i, row in enumerate(self.rows) if row.reason is not None]):
            last, length = self.rows.pop(), self._lengths.pop()
            if slot < len(self.rows):
                self.rows[slot], self._lengths[slot] = last, length
                columns = slice(self._front, self._front + length)
                for buffer in self._buffers:
                    buffer[slot, :, columns] = buffer[len(self.rows), :, columns]

    def step(self, decoder: Decoder) -> Array:
        """Let every row go on by its last token; logits `[rows, vocabulary]`."""
        self._lengths = [length + 1 for length in self._lengths]
        mask = (np.arange(max(self._lengths)) < np.array(self._lengths)[:, None]).astype(np.int64)
        ids = np.array([row.tokens[-1:] for row in self.rows])
        return decoder.step(ids, mask, self._view(0, len(self.rows)))[0]

    def _view(self, first: int, end: int) -> list[OrtValue]:
        """The buffers of some slots: their memory itself."""
        if (first, end) not in self._views:
            self._views[first, end] = [OrtValue.ortvalue_from_numpy(buffer[first:end]) for buffer in self._buffers]
        return self._views[first, end]
