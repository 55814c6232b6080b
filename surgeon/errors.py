"""The one error type: what is wrong, where, what there is, what to try."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, ClassVar


class SurgeonError(Exception):
    """A fault a person can act on.

    `what` is one sentence; `where` names the file and line, node or site; `there_is` lists what exists
    instead; `try_` is the next thing to do. `exit_code` is 1 for data or files that do not fit, 2 for a
    wrong command or spec, 3 for a fault of Surgeon's own.
    """

    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        there_is: str | Iterable[str] | None = None,
        try_: str | None = None,
    ) -> None:
        self.what = what
        self.where = where
        self.there_is = there_is if there_is is None or isinstance(there_is, str) else shorten(there_is)
        self.try_ = try_
        super().__init__(self.render())

    def render(self) -> str:
        """The message as a person reads it."""
        lines = [f"{self.where}: {self.what}" if self.where else self.what]
        if self.there_is:
            lines.append(f"  there is: {self.there_is}")
        if self.try_:
            lines.append(f"  try: {self.try_}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The same, for `--json`."""
        return {
            "error": type(self).__name__,
            "what": self.what,
            "where": self.where,
            "there_is": self.there_is,
            "try": self.try_,
            "exit_code": self.exit_code,
        }


class SpecError(SurgeonError):
    """The spec or the command is wrong."""

    exit_code = 2


class UnknownTaskError(SpecError):
    """No task has the name."""


class SelectorError(SpecError):
    """A selector matches nothing, or is not one."""


class CompositionError(SpecError):
    """Two passes do not go together, or not in this order."""


class BaseError(SurgeonError):
    """The base model is missing, damaged, or another one."""


class TraceError(SurgeonError):
    """The base cannot be traced, or its structure is not understood."""


class DeltaError(SurgeonError):
    """Tensors of a task do not fit."""


class BuildError(SurgeonError):
    """A build directory is damaged, of a newer format, or cannot be written."""


class DataError(SurgeonError):
    """Training data do not fit."""


class InvariantError(SurgeonError):
    """An invariant of the compiler does not hold: a bug of ours."""

    exit_code = 3


def shorten(names: Iterable[str], limit: int = 10) -> str:
    """Join names for an error message: the first `limit`, then a count."""
    listed = list(names)
    more = f", … ({len(listed) - limit} more)" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """`did you mean 'x'?` for the closest known word, or None."""
    close = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else None
