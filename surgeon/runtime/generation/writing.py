"""The loop: prompts are read one by one, then all rows go on together, a token a step.

A prompt is read alone and without padding, so its neighbours change nothing in it, nor do virtual tokens that a task
puts anywhere. How rows stand together is for others to say: with a slot each in one buffer (`slots`), with their ends
aligned (`aligned`), or in groups that begin together (`groups`). A row that ends gives its place to the next prompt, in
groups when one has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from surgeon.runtime.generation.rows import Row
from surgeon.runtime.generation.rules import check_finite, ruled
from surgeon.runtime.manifest import Generation
from surgeon.runtime.taskfile import Array


class Together(Protocol):
    """Rows that go on together, and what they have read so far."""

    @property
    def rows(self) -> Sequence[Row]:
        """Those that the next step lets go on, in its order."""

    @property
    def ready(self) -> bool:
        """Whether others may come in now."""

    @property
    def going(self) -> list[Row]:
        """Rows that have not ended."""

    def read(self, row: Row) -> Array | None:
        """Read what a row goes on from; the logits `[vocabulary]` of its first token, where they are known by that."""

    def renew(self) -> None:
        """Leave out rows that have ended, and take in those that were read."""

    def step(self) -> Array:
        """Let every row go on by its last token; logits `[rows, vocabulary]`."""


class Writer:
    """At most `batch` rows that go on together; others may come in when one has ended, as `together` is ready for them.

    `failed` hears of a row that cannot go on, or whose listener raises: it ends, and the others go on. Without, the
    error ends them all, as one of a step does.
    """

    def __init__(
        self,
        together: Together,
        generation: Generation,
        batch: int,
        failed: Callable[[Row, Exception], None] | None = None,
    ) -> None:
        self._together, self._generation, self._batch, self._failed = together, generation, batch, failed

    @property
    def rows(self) -> list[Row]:
        """Those that have not ended."""
        return self._together.going

    @property
    def full(self) -> bool:
        """Whether no other row can come in now."""
        return len(self.rows) >= self._batch or not self._together.ready

    def take(self, row: Row) -> None:
        """Read a row's prompt, which may give its first token."""
        try:
            logits = self._together.read(row)
            if logits is not None:
                self._go_on(row, logits)
        except Exception as error:
            self._end(row, error)

    def step(self) -> bool:
        """Let every row go on by a token; False where there is none."""
        self._together.renew()
        rows = list(self._together.rows)
        if not rows:
            return False
        for row, logits in zip(rows, self._together.step(), strict=True):
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
        check_finite(logits, row.number, len(row.prompt) + len(row.tokens))
        scores = ruled(logits, self._generation, row.tokens, row.limit)
        row.push(row.choice.next(scores, [*row.prompt, *row.tokens], row.rng), self._generation.ends)


def write(rows: Sequence[Row], writer: Writer) -> None:
    """Write all rows to their ends."""
    waiting, going = iter(rows), True
    while going:
        while not writer.full and (row := next(waiting, None)) is not None:
            writer.take(row)
        going = writer.step()


def follow(rows: Sequence[Row], texts: Sequence[Sequence[int]], together: Together) -> Array:
    """The logits `[rows, 1 + tokens, vocabulary]` after the prompts, and after every token of texts that are given."""
    first = [logits for row in rows if (logits := together.read(row)) is not None]
    found = [np.stack(first) if first else _stepped(together)]
    for tokens in zip(*texts, strict=True):
        for row, token in zip(rows, tokens, strict=True):
            row.tokens.append(token)
        found.append(_stepped(together))
    return np.stack(found, 1)


def _stepped(together: Together) -> Array:
    together.renew()
    return together.step()
