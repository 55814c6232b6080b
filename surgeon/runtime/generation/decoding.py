"""What rows go on with: a graph, and the tensors of their tasks; one task for all rows, or a task a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from onnxruntime import InferenceSession, OrtValue

from surgeon.runtime.bank import Bank, Held
from surgeon.runtime.generation.decoder import Decoder
from surgeon.runtime.generation.rows import Row
from surgeon.runtime.manifest import Generation, Manifest
from surgeon.runtime.taskfile import Array
from surgeon.runtime.tasks import RunnableTask

Step = tuple[Array, list[OrtValue]]
"""Logits `[rows, vocabulary]`, and the cache."""


class Decoding(Protocol):
    """The same for both: a prompt is read with all of its task, every later token without what acts once."""

    def read(self, row: Row, ids: Array, mask: Array, past: Sequence[OrtValue] | None) -> Step:
        """Read a row's prompt, into a cache or, without one, into a new one."""

    def write(self, rows: Sequence[Row], ids: Array, mask: Array, past: Sequence[OrtValue]) -> Step:
        """Let rows go on by a token."""

    def front(self, row: Row) -> Sequence[Array]:
        """What a row's cache begins with, `[heads, n, width]` for every tensor of it; nothing where it begins empty."""


class OneTask:
    """All rows are of the task of these tensors."""

    def __init__(
        self, session: InferenceSession, manifest: Manifest, generation: Generation, deltas: Mapping[str, OrtValue]
    ) -> None:
        once = {delta.name for delta in manifest.deltas if delta.once}
        self._reading, self._writing = Decoder(session, generation), Decoder(session, generation)
        self._reading.bind(deltas)
        self._writing.bind({name: value for name, value in deltas.items() if name not in once})
        begun = [deltas[t.start] for t in generation.cache if t.start is not None and deltas]
        self._front = [value.numpy() for value in begun]

    def read(self, row: Row, ids: Array, mask: Array, past: Sequence[OrtValue] | None) -> Step:
        """Read a row's prompt."""
        return self._reading.step(ids, mask, self._reading.empty() if past is None else past)

    def write(self, rows: Sequence[Row], ids: Array, mask: Array, past: Sequence[OrtValue]) -> Step:
        """Let rows go on by a token."""
        return self._writing.step(ids, mask, past)

    def front(self, row: Row) -> Sequence[Array]:
        """The task's prefix."""
        return self._front


class TaskPerRow:
    """Every row is of its own task, or of none; the bank has them at hand in every step."""

    def __init__(self, session: InferenceSession, manifest: Manifest, generation: Generation, bank: Bank) -> None:
        self._bank, self._generation = bank, generation
        self._once = frozenset(delta.name for delta in manifest.deltas if delta.once)
        self._inside = frozenset(t.start for t in generation.cache if t.start is not None)
        special = [delta for delta in manifest.deltas if delta.name in self._once | self._inside]
        self._symbols = {*manifest.positions, *(symbol for delta in special for symbol in delta.free.values())}
        self._behind = {s: bank.base_sizes[s] for d in special if d.once for s in d.free.values()}
        self._reading, self._writing = Decoder(session, generation), Decoder(session, generation)
        self._known: dict[Decoder, object] = {}

    def read(self, row: Row, ids: Array, mask: Array, past: Sequence[OrtValue] | None) -> Step:
        """Read a row's prompt, of the bank no more positions than it has of its own."""
        return self._step(self._reading, [row], ids, mask, self._reading.empty() if past is None else past)

    def write(self, rows: Sequence[Row], ids: Array, mask: Array, past: Sequence[OrtValue]) -> Step:
        """Let rows go on by a token."""
        return self._step(self._writing, rows, ids, mask, past)

    def front(self, row: Row) -> Sequence[Array]:
        """The prefix of a row's task."""
        if row.task is None or not self._inside:
            return ()
        with self._bank.holding([row.task]) as held:
            arrays, place = self._bank.cut(held, self._sizes([row.task])), held.places[row.task]
            return [arrays[t.start][place].copy() for t in self._generation.cache if t.start is not None]

    def _step(self, decoder: Decoder, rows: Sequence[Row], ids: Array, mask: Array, past: Sequence[OrtValue]) -> Step:
        tasks = [row.task for row in rows if row.task is not None]
        with self._bank.holding(tasks) as held:
            self._bind(decoder, held, tasks)
            places = [0 if row.task is None else held.places[row.task] for row in rows]
            return decoder.step(ids, mask, past, np.array(places, np.int64))

    def _bind(self, decoder: Decoder, held: Held, tasks: Sequence[RunnableTask]) -> None:
        """What the bank has now, unless it is bound already. A prefix is in the cache, and need not be read."""
        behind = decoder is self._writing
        sizes = self._sizes(tasks) | (self._behind if behind else {})
        if self._known.get(decoder) != (held.version, sizes):
            arrays = self._bank.cut(held, sizes, self._once if behind else frozenset())
            decoder.bind_arrays({name: array for name, array in arrays.items() if name not in self._inside})
            self._known[decoder] = held.version, sizes

    def _sizes(self, tasks: Sequence[RunnableTask]) -> dict[str, int]:
        """No more than these tasks need of what takes positions, in the text or in the cache."""
        return {symbol: max((task.info.sizes.get(symbol, 0) for task in tasks), default=0) for symbol in self._symbols}
