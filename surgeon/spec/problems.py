"""What is wrong with a spec, as a person reads it: every mistake at once, each with its line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from surgeon.errors import SpecError, shorten

Loc = tuple[str | int, ...]

MARGIN = 60
"""Characters of a long line shown on either side of a mistake."""


def dotted(path: Loc) -> str | None:
    """A path as Python writes it: `surgery[0].lora.rank`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".") or None


@dataclass(frozen=True)
class Excerpt:
    """A line of a spec and the columns at fault, counted from 0."""

    text: str
    line: int
    start: int
    end: int

    def render(self, note: str) -> list[str]:
        """The line, and below it carets with a note."""
        left = max(0, self.start - MARGIN)
        shown = "".join(c if c.isprintable() else " " for c in self.text[left : self.start + MARGIN])
        width = max(1, min(self.end, left + len(shown)) - self.start)
        indent = " " * (self.start - left)
        gutter = f"{self.line + 1:>7}"
        return [f"{gutter} | {shown}", f"{'':>7} | {indent}{'^' * width}{'  ' + note if note else ''}"]


@dataclass(frozen=True)
class Problem:
    """One mistake."""

    what: str
    where: str | None = None
    there_is: str | None = None
    try_: str | None = None
    excerpt: Excerpt | None = None

    def render(self) -> str:
        """The mistake, its line with a caret, and what there is instead."""
        note = "  ".join(part for part in (self.try_, f"there is: {self.there_is}" if self.there_is else None) if part)
        told = self.where is None or self.what.startswith(self.where)
        head = self.what if told else f"{self.where}: {self.what}"
        if self.excerpt:
            return "\n".join([head, *self.excerpt.render(note)])
        return f"{head}\n        {note}" if note else head

    def to_dict(self) -> dict[str, str | None]:
        """The same, for `--json`."""
        return {"what": self.what, "where": self.where, "there_is": self.there_is, "try": self.try_}


class SpecProblems(SpecError):
    """All the mistakes of a spec."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        first = self.problems[0]
        super().__init__(first.what, where=first.where, there_is=first.there_is, try_=first.try_)

    def render(self) -> str:
        """Each mistake in turn."""
        return "\n".join(problem.render() for problem in self.problems)

    def to_dict(self) -> dict[str, Any]:
        """The first mistake's fields as any error has them, and the list of all."""
        return {**super().to_dict(), "problems": [problem.to_dict() for problem in self.problems]}


def listed(names: Sequence[str]) -> str | None:
    """Names for `there_is`, or None where there are none."""
    return shorten(names, 12) if names else None
