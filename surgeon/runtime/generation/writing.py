"""The loop: prompts are read one by one, then all rows go on together, a token a step.

A prompt is read alone and without padding, so its neighbours change nothing in it, nor do virtual tokens that a task
puts anywhere. The rows' caches then stand together with their ends aligned, and what is in front of a shorter one is
masked. A row that ends gives its place to the next prompt. Where the graph writes its cache in place, rows have a slot
each instead: see `slots`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from onnxruntime import InferenceSession, OrtValue

from surgeon.errors import DataError
from surgeon.runtime.generation.decoder import Decoder
from surgeon.runtime.generation.options import Choice
from surgeon.runtime.generation.rows import Row
from surgeon.runtime.generation.slots import Slots
from surgeon.runtime.manifest import Generation, Manifest
from surgeon.runtime.taskfile import Array


class Batch:
    """Rows that go on together, and their caches `[rows, heads, columns, width]`, with their ends aligned."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self._fresh: list[tuple[Row, Sequence[OrtValue]]] = []
        self._cache: list[OrtValue] = []
        self._lengths: list[int] = []

    @property
    def going(self) -> int:
        """Rows that have not ended."""
        return sum(row.reason is None for row in (*self.rows, *(row for row, _ in self._fresh)))

    def read(self, decoder: Decoder, row: Row) -> Array:
        """Read the prompt of a row that is to come in; logits `[vocabulary]`."""
        ids = np.array([row.prompt], dtype=np.int64)
        both, cache = decoder.step(ids, np.ones_like(ids), decoder.empty())
        self._fresh.append((row, cache))
        logits: Array = both[0]
        return logits

    def step(self, decoder: Decoder) -> Array:
        """Let every row go on by its last token; logits `[rows, vocabulary]`."""
        columns = max(self._lengths) + 1
        self._lengths = [length + 1 for length in self._lengths]
        mask = (np.arange(columns) >= columns - np.array(self._lengths)[:, None]).astype(np.int64)
        logits, self._cache = decoder.step(np.array([row.tokens[-1:] for row in self.rows]), mask, self._cache)
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


def write(
    rows: Sequence[Row],
    session: InferenceSession,
    manifest: Manifest,
    generation: Generation,
    deltas: Mapping[str, OrtValue],
    *,
    choice: Choice,
    batch: int,
) -> None:
    """Write all rows to their ends, at most `batch` at a time, as the task of these tensors does.

    The prompts are read with all of the task, every later token without what acts once.
    """
    once = {delta.name for delta in manifest.deltas if delta.once}
    reading = Decoder(session, generation, deltas)
    writing = Decoder(session, generation, {name: value for name, value in deltas.items() if name not in once})
    together = Slots(generation, deltas, rows, batch) if generation.shared else Batch()
    waiting = iter(rows)
    while True:
        while together.going < batch and (row := next(waiting, None)) is not None:
            _go_on(row, together.read(reading, row), choice, generation.ends)
        together.renew()
        if not together.rows:
            return
        for row, logits in zip(together.rows, together.step(writing), strict=True):
            _go_on(row, logits, choice, generation.ends)


def _go_on(row: Row, logits: Array, choice: Choice, ends: frozenset[int]) -> None:
    if not np.isfinite(logits).all():
        raise DataError(
            f"the model gives NaN or infinity after {len(row.prompt) + len(row.tokens)} tokens of row {row.number}"
        )
    row.push(choice.next(logits, [*row.prompt, *row.tokens], row.rng), ends)
