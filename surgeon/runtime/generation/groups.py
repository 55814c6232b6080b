"""Texts of an encoder-decoder by the step: those that came in between two steps begin together, as a group."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from surgeon.runtime.generation.halves import Halves
from surgeon.runtime.generation.rows import Row
from surgeon.runtime.generation.sources import Group, Parts, read_source
from surgeon.runtime.manifest import Generation
from surgeon.runtime.taskfile import Array


class Groups:
    """At most `most` groups that go on side by side, a product of their own each: while there are so many, texts wait,
    and then begin together. `halves` gives the two graphs with nothing bound.
    """

    def __init__(self, halves: Callable[[], Halves], generation: Generation, most: int = 1) -> None:
        self._halves, self._generation, self._most = halves, generation, most
        self._reading = halves()
        self._fresh: list[tuple[Row, Parts]] = []
        self._groups: list[Group] = []

    @property
    def rows(self) -> list[Row]:
        """Those that the next step lets go on, in its order."""
        return [row for group in self._groups for row in group.rows]

    @property
    def ready(self) -> bool:
        """Whether a group may begin now."""
        return sum(any(row.reason is None for row in group.rows) for group in self._groups) < self._most

    @property
    def going(self) -> list[Row]:
        """Rows that have not ended."""
        return [row for row in [*self.rows, *(row for row, _ in self._fresh)] if row.reason is None]

    def read(self, row: Row) -> None:
        """Read a row's source. Its first token comes with the step in which its group begins."""
        self._fresh.append((row, read_source(self._reading, row)))

    def renew(self) -> None:
        """Leave out rows that have ended, and let those that were read be a group."""
        for group in self._groups:
            kept = [i for i, row in enumerate(group.rows) if row.reason is None]
            if 0 < len(kept) < len(group.rows):
                group.keep(kept)
        self._groups = [group for group in self._groups if any(row.reason is None for row in group.rows)]
        fresh, self._fresh = [item for item in self._fresh if item[0].reason is None], []
        if fresh:
            rows, read = zip(*fresh, strict=True)
            self._groups.append(Group(self._halves(), self._generation, rows, read))

    def step(self) -> Array:
        """Let every row go on by its last token; logits `[rows, vocabulary]`."""
        return np.concatenate([g.step([(row.tokens or row.prompt)[-1] for row in g.rows]) for g in self._groups])
