"""Runs passes in the spec's order and verifies the invariants after every one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from surgeon.errors import InvariantError, SurgeonError
from surgeon.passes import Pass
from surgeon.program import Program
from surgeon.verify import reference, renewed, verify

Locate = Callable[[int], str | None]


def run_passes(program: Program, passes: Sequence[Pass], locate: Locate = lambda _: None) -> Program:
    """Apply `passes` in order.

    A failure names its pass and, through `locate`, the line of the spec. Raises InvariantError where a pass broke
    the program: a bug of ours, not of the spec.
    """
    before = reference(program)
    identity = True
    for index, step in enumerate(passes):
        line, stored = locate(index), len(program.stored)
        try:
            with program.author(step.name, line or f"surgery[{index}]"):
                step.requires(program)
                step.call(program)
                step.ensures(program)
                program.graph_module.recompile()
            identity = identity and step.identity_at_birth
            if len(program.stored) > stored:
                before = renewed(program, before)
            verify(program, before, identity=identity)
        except InvariantError as error:
            raise InvariantError(
                f"after pass {index + 1} of {len(passes)}, '{step.name}': {error.what}",
                where=error.where or line,
                try_="this is a bug in Surgeon, not in your spec",
            ) from error
        except SurgeonError as error:
            if error.where is None and line:
                raise type(error)(error.what, where=line, there_is=error.there_is, try_=error.try_) from error
            raise
        program.applied.append(step.name)
    return program
