"""The loop: prompts are read one by one, then all rows go on together, a token a step.

A prompt is read alone and without padding, so its neighbours change nothing in it, nor do virtual tokens that a task
puts anywhere. The rows' caches then stand together with their ends aligned, and what is in front of a shorter one is
masked. A row that ends gives its place to the next prompt. Where the graph writes its cache in place, rows have a slot
each instead: see `slots`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from onnxruntime import OrtValue

from surgeon.errors import DataError
from surgeon.runtime.generation.decoding import Decoding
from surgeon.runtime.generation.rows import Row
from surgeon.runtime.generation.slots import Slots
from surgeon.runtime.manifest import Generation
from surgeon.runtime.taskfile import Array


class Batch:
    """Rows that go on together, and their caches `[rows, heads, columns, width]`, with their ends aligned."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self._fresh: list[tuple[Row, Sequence[OrtValue]]] = []
        self._cache: list[OrtValue] = []
        self._lengths: list[int] = []

    @property
    def going(self) -> list[Row]:
        """Rows that have not ended."""
        return [row for row in (*self.rows, *(row for row, _ in self._fresh)) if row.reason is None]

    def read(self, decoding: Decoding, row: Row) -> Array:
        """Read the prompt of a row that is to come in; logits `[vocabulary]`."""
        ids = np.array([row.prompt], dtype=np.int64)
        both, cache = decoding.read(row, ids, np.ones_like(ids), None)
        self._fresh.append((row, cache))
        logits: Array = both[0]
        return logits

    def step(self, decoding: Decoding) -> Array:
        """Let every row go on by its last token; logits `[rows, vocabulary]`."""
        columns = max(self._lengths) + 1
        self._lengths = [length + 1 for length in self._lengths]
        mask = (np.arange(columns) >= columns - np.array(self._lengths)[:, None]).astype(np.int64)
        ids = np.array([row.tokens[-1:] for row in self.rows])
        logits, self._cache = decoding.write(self.rows, ids, mask, self._cache)
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


class Writer:
    """At most `batch` rows that go on together; others may come in whenever one has ended.

    `failed` hears of a row that cannot go on, or whose listener raises: it ends, and the others go on. Without, the
    error ends them all.
    """

    def __init__(
        self,
        decoding: Decoding,
        generation: Generation,
        batch: int,
        failed: Callable[[Row, Exception], None] | None = None,
    ) -> None:
        self._decoding, self._ends, self._batch, self._failed = decoding, generation.ends, batch, failed
        self._together = Slots(generation, batch) if generation.shared else Batch()

    @property
    def rows(self) -> list[Row]:
        """Those that have not ended."""
        return self._together.going

    @property
    def full(self) -> bool:
        """Whether no other row can come in now."""
        return len(self.rows) >= self._batch

    def expect(self, rows: Sequence[Row]) -> None:
        """Have room for all these rows, and no others, from the beginning."""
        if isinstance(self._together, Slots) and rows:
            own = {row.task: row for row in rows}.values()
            fronts = [front[0].shape[1] if (front := self._decoding.front(row)) else 0 for row in own]
            self._together.expect(rows, max(fronts), min(self._batch, len(rows)))

    def take(self, row: Row) -> None:
        """Read a row's prompt; it has its first token then."""
        try:
            self._go_on(row, self._together.read(self._decoding, row))
        except Exception as error:
            self._end(row, error)

    def step(self) -> bool:
        """Let every row go on by a token; False where there is none."""
        self._together.renew()
        rows = list(self._together.rows)
        if not rows:
            return False
        for row, logits in zip(rows, self._together.step(self._decoding), strict=True):
            try:
                if row.reason is None:  # else its request has ended with another of its rows
                    self._go_on(row, logits)
            except Exception as error:
                self._end(row, error)
        return True

    def _end(self, row: Row, error: Exception) -> None:
        if self._failed is None:
            raise error
        row.reason = "gone"
        self._failed(row, error)

    def _go_on(self, row: Row, logits: Array) -> None:
        if not np.isfinite(logits).all():
            raise DataError(
                f"the model gives NaN or infinity after {len(row.prompt) + len(row.tokens)} tokens of row {row.number}"
            )
        row.push(row.choice.next(logits, [*row.prompt, *row.tokens], row.rng), self._ends)


def write(rows: Sequence[Row], writer: Writer) -> None:
    """Write all rows to their ends."""
    writer.expect(rows)
    waiting, going = iter(rows), True
    while going:
        while not writer.full and (row := next(waiting, None)) is not None:
            writer.take(row)
        going = writer.step()
