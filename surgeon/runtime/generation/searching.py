"""Beam search for the texts of an encoder-decoder: all beams of a group's texts go on together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from surgeon.errors import SpecError
from surgeon.runtime.generation.beams import Beams, Search
from surgeon.runtime.generation.halves import Halves
from surgeon.runtime.generation.rows import Row
from surgeon.runtime.generation.rules import check_finite, ruled
from surgeon.runtime.generation.sources import Group, read_source
from surgeon.runtime.manifest import Generation
from surgeon.runtime.taskfile import Array


def search(rows: Sequence[Row], halves: Halves, generation: Generation, beams: Beams) -> None:
    """Write all rows to their ends; the beams of one stand together."""
    searches = [(row, Search(beams, row.limit, generation.ends, _scored(generation, row))) for row in rows]
    group = Group(halves, generation, rows, [read_source(halves, row) for row in rows])
    found = group.step([row.prompt[-1] for row in rows])
    if (most := found.shape[1] // max(2, 1 + len(generation.ends))) < beams.count:
        raise SpecError(f"beams: there are not {beams.count} continuations of a text", there_is=f"room for {most}")
    first = True
    while searches:
        order, kept, at = [], [], 0
        for row, one in searches:
            logits = found[at : at + len(one.running)]
            check_finite(logits, row.number, len(row.prompt) + len(one.running[0]))
            places = [at + origin for origin in one.step(logits)]
            at += len(logits)
            if one.done:
                for token in one.best:
                    row.push(token, generation.ends)
            else:
                order += places
                kept.append((row, one))
        if kept:
            group.keep(order, sources=first or len(kept) < len(searches))
            found = group.step([tokens[-1] for _, one in kept for tokens in one.running])
        searches, first = kept, False


def _scored(generation: Generation, row: Row) -> Callable[[Array, list[int]], Array]:
    def scored(scores: Array, written: list[int]) -> Array:
        return ruled(row.choice.penalised(scores, [*row.prompt, *written]), generation, written, row.limit)

    return scored
