"""Rows whose caches stand together with their ends aligned; what is in front of a shorter one is masked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnxruntime import OrtValue

from surgeon.runtime.generation.decoding import Decoding
from surgeon.runtime.generation.rows import Row
from surgeon.runtime.taskfile import Array


class Aligned:
    """Rows that go on together, and their caches `[rows, heads, columns, width]`."""

    ready = True

    def __init__(self, decoding: Decoding) -> None:
        self._decoding = decoding
        self.rows: list[Row] = []
        self._fresh: list[tuple[Row, Sequence[OrtValue]]] = []
        self._cache: list[OrtValue] = []
        self._lengths: list[int] = []

    @property
    def going(self) -> list[Row]:
        """Rows that have not ended."""
        return [row for row in (*self.rows, *(row for row, _ in self._fresh)) if row.reason is None]

    def read(self, row: Row) -> Array:
        """Read the prompt of a row that is to come in; logits `[vocabulary]`."""
        ids = np.array([row.prompt], dtype=np.int64)
        both, cache = self._decoding.read(row, ids, np.ones_like(ids), None)
        self._fresh.append((row, cache))
        logits: Array = both[0]
        return logits

    def step(self) -> Array:
        """Let every row go on by its last token; logits `[rows, vocabulary]`."""
        columns = max(self._lengths) + 1
        self._lengths = [length + 1 for length in self._lengths]
        mask = (np.arange(columns) >= columns - np.array(self._lengths)[:, None]).astype(np.int64)
        ids = np.array([row.tokens[-1:] for row in self.rows])
        logits, self._cache = self._decoding.write(self.rows, ids, mask, self._cache)
        return logits

    def renew(self) -> None:
        """Leave out rows that have ended, and take in those that were read."""
        fresh, self._fresh = [(row, cache) for row, cache in self._fresh if row.reason is None], []
        kept = [i for i, row in enumerate(self.rows) if row.reason is None]
        if len(kept) == len(self.rows) and not fresh:
            return
        before = max(self._lengths, default=0)
        lengths = [self._lengths[i] for i in kept] + [cache[0].shape()[2] for _, cache in fresh]
        columns = max(lengths, default=0)
        arrays = []
        for at in range(len(self._cache) or len(fresh[0][1]) if lengths else 0):
            parts = [cache[at].numpy() for _, cache in fresh]
            if kept:
                parts.insert(0, self._cache[at].numpy()[kept, :, max(before - columns, 0) :])
            arrays.append(np.concatenate([_wide(part, columns) for part in parts]))
        self._cache = [OrtValue.ortvalue_from_numpy(array) for array in arrays]
        self.rows = [self.rows[i] for i in kept] + [row for row, _ in fresh]
        self._lengths = lengths


def _wide(part: Array, columns: int) -> Array:
    """Room in front up to so many columns."""
    return np.pad(part, ((0, 0), (0, 0), (columns - part.shape[2], 0), (0, 0)))
