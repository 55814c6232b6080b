"""Middle end: one file per technique, and the contract they all keep.

A technique is a frozen pydantic model. Its fields are the options of the spec; `call` inserts what the paper
describes and enters the deltas in the program's ledger. Nothing downstream knows which technique made a delta.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict

from surgeon.errors import CompositionError
from surgeon.program import Program

__all__ = ["Pass", "PassResult"]


@dataclass(frozen=True)
class PassResult:
    """What a pass gives back: the program, and whether it changed."""

    program: Program
    modified: bool


def _written_defaults(schema: dict[str, Any], technique: type[BaseModel]) -> None:
    """Let the JSON schema show defaults as a user writes them: selectors as text."""
    written = technique.model_construct().model_dump(mode="json")
    for name, entry in schema.get("properties", {}).items():
        if "default" in entry:
            entry["default"] = written[name]


class Pass(BaseModel, ABC):
    """A rewrite. `requires`, `call` and `ensures` are run in that order, and then the invariants are verified."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, json_schema_extra=_written_defaults)

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    identity_at_birth: ClassVar[bool]
    """Fresh deltas leave the base's output exactly as it is."""
    after: ClassVar[tuple[str, ...]] = ()
    """Techniques one of which must come earlier in the spec."""

    def requires(self, program: Program) -> None:
        """Raise where the program is not one this pass can act on."""
        if self.after and not set(self.after) & set(program.applied):
            raise CompositionError(
                f"'{self.name}' needs one of {', '.join(self.after)} before it, and none comes before it",
                there_is=f"before it: {', '.join(program.applied) or 'nothing'}",
                try_="move it further down in `surgery`; passes run in the order written",
            )

    @abstractmethod
    def call(self, program: Program) -> PassResult:
        """Rewrite the program in place."""

    def reopened(self) -> Self:
        """The same pass for a build that holds every task's weights: it reads no files for starting values."""
        return self

    def ensures(self, program: Program) -> None:
        """Raise InvariantError where this pass did not keep its own promise."""
