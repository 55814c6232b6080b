"""Writing with an encoder-decoder: every source is read once, then the texts of a group go on together.

A source is read alone and without padding, so its neighbours change nothing in it. What the decoder reads of a group's
sources then stands together, padded behind and masked. All texts of a group are equally long, and one that ends leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from surgeon.errors import DataError, SpecError
from surgeon.runtime.generation.beams import Beams, Search
from surgeon.runtime.generation.halves import Halves
from surgeon.runtime.generation.rows import Row
from surgeon.runtime.generation.rules import ruled
from surgeon.runtime.manifest import Cached, Generation, Source
from surgeon.runtime.taskfile import Array


class Group:
    """Texts that go on together: what the decoder reads of their sources, and its own cache."""

    def __init__(
        self, halves: Halves, cache: Sequence[Cached], source: Source, read: Sequence[Sequence[Array]]
    ) -> None:
        self._halves, self._cache, self._names = halves, cache, [port.name for port in source.bridge]
        self._columns = [parts[0].shape[_columns(parts[0])] for parts in read]
        width = max(self._columns)
        self._bridge = [np.concatenate([_wide(part, width) for part in parts]) for parts in zip(*read, strict=True)]
        self._past = [np.zeros(t.shape(batch=len(read), past=0), t.past.dtype) for t in cache]

    def step(self, rows: Sequence[Row], tokens: Sequence[int]) -> Array:
        """Let the text of every row go on by a token; logits `[rows, vocabulary]`."""
        fed = {"decoder_input_ids": np.array(tokens, np.int64)[:, None]}
        fed |= dict(zip(self._names, self._bridge, strict=True))
        fed |= {tensor.past.name: array for tensor, array in zip(self._cache, self._past, strict=True)}
        logits, *self._present = self._halves.write(rows, fed)
        self._past = [value.numpy() for value in self._present]  # their memory goes with the OrtValues
        last: Array = logits.numpy()[:, -1].copy()
        return last

    def keep(self, order: Sequence[int], *, sources: bool = True) -> None:
        """Go on with these texts, which may be there several times; without `sources` each has that of its place."""
        self._past = [array[list(order)] for array in self._past]
        if not sources:
            return
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


def write_from(rows: Sequence[Row], halves: Halves, generation: Generation, *, beams: Beams | None, batch: int) -> None:
    """Write all rows to their ends, each from its source, `batch` at a time."""
    assert generation.source is not None
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        read = [_read(halves, row) for row in part]
        writer = Writer(part, Group(halves, generation.cache, generation.source, read), generation)
        if beams is None:
            writer.write()
        else:
            writer.search(beams)


def _read(halves: Halves, row: Row) -> list[Array]:
    """What the decoder reads of a source: its mask `[1, columns]`, keys and values `[1, heads, columns, width]`."""
    ids = np.array([row.source], np.int64)
    return [value.numpy().copy() for value in halves.read(row, {"input_ids": ids, "attention_mask": np.ones_like(ids)})]


class Writer:
    """The texts of a group in the making."""

    def __init__(self, rows: Sequence[Row], group: Group, generation: Generation) -> None:
        assert generation.source is not None
        self.rows, self.group = rows, group
        self.ends, self.source = generation.ends, generation.source

    def write(self) -> None:
        """A token a step, each text's own."""
        rows = list(self.rows)
        while rows:
            found = self.group.step(rows, [(row.tokens or row.prompt)[-1] for row in rows])
            for row, logits in zip(rows, found, strict=True):
                _check(row, logits, len(row.tokens))
                scores = self._ruled(logits, row, row.tokens)
                row.push(row.choice.next(scores, [*row.prompt, *row.tokens], row.rng), self.ends)
            kept = [i for i, row in enumerate(rows) if row.reason is None]
            if kept and len(kept) < len(rows):
                self.group.keep(kept)
            rows = [rows[i] for i in kept]

    def search(self, beams: Beams) -> None:
        """Beam search, each text's own; the beams of one stand together."""
        searches = [(row, Search(beams, row.limit, self.ends, self._scored(row))) for row in self.rows]
        found = self.group.step(self.rows, [row.prompt[-1] for row in self.rows])
        if (most := found.shape[1] // max(2, 1 + len(self.ends))) < beams.count:
            raise SpecError(f"beams: there are not {beams.count} continuations of a text", there_is=f"room for {most}")
        first = True
        while searches:
            order, kept, at = [], [], 0
            for row, search in searches:
                logits = found[at : at + len(search.running)]
                _check(row, logits, len(search.running[0]))
                places = [at + origin for origin in search.step(logits)]
                at += len(logits)
                if search.done:
                    for token in search.best:
                        row.push(token, self.ends)
                else:
                    order += places
                    kept.append((row, search))
            if kept:
                self.group.keep(order, sources=first or len(kept) < len(searches))
                running = [(row, tokens[-1]) for row, search in kept for tokens in search.running]
                found = self.group.step([row for row, _ in running], [token for _, token in running])
            searches, first = kept, False

    def _ruled(self, scores: Array, row: Row, written: Sequence[int]) -> Array:
        source = self.source
        return ruled(scores, source.rules, written, start=source.start, limit=row.limit, ends=self.ends)

    def _scored(self, row: Row) -> Callable[[Array, list[int]], Array]:
        def scored(scores: Array, written: list[int]) -> Array:
            return self._ruled(row.choice.penalised(scores, [*row.prompt, *written]), row, written)

        return scored


def _check(row: Row, logits: Array, written: int) -> None:
    if not np.isfinite(logits).all():
        raise DataError(f"the model gives NaN or infinity after {written} tokens of row {row.number}")
