"""AdapterDrop: no adapters in the lowest layers.

    specialised    layers: n         the first n layers have none, in training, in the task file and in the graph
    robust         layers: random    every step draws n from 0 to L − 1; the task has all, and runs without any first n

Below the lowest adapter there is no gradient. What a call leaves out of a task that has all is a branch that ONNX
Runtime does not take.

Rücklé et al., "AdapterDrop: On the Efficiency of Adapters in Transformers" (arXiv:2010.11918), section 3.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field, NonNegativeInt, WithJsonSchema
from pydantic_core import PydanticCustomError

from surgeon.errors import CompositionError, SpecError
from surgeon.ledger import Schedule
from surgeon.passes import Pass, PassResult
from surgeon.program import Program

RANDOM: Literal["random"] = "random"


def _layers(value: object) -> object:
    """A number of layers, or `random`."""
    if value == RANDOM or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        return value
    raise PydanticCustomError(
        "layers", "must be a number of layers from 0 up, or `random`, got {got}", {"got": repr(value)[:60]}
    )


Layers = Annotated[
    NonNegativeInt | Literal["random"],
    BeforeValidator(_layers),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0}, {"const": RANDOM}]}),
]


class Drop(Pass):
    """Leave out the adapters of the lowest layers, always or at random in training; inserts nothing of its own.

    It acts on every technique before it whose deltas can be dropped by layer. Raises SpecError where no adapter would
    be left.
    """

    name: ClassVar[str] = "drop"
    title: ClassVar[str] = "AdapterDrop"
    paper: ClassVar[str] = "arXiv:2010.11918"
    identity_at_birth: ClassVar[bool] = True
    after: ClassVar[tuple[str, ...]] = ("adapter", "fusion", "compacter")

    layers: Layers = Field(
        RANDOM, description="How many of the lowest layers have no adapters; `random` draws it anew for every step."
    )

    def call(self, program: Program) -> PassResult:
        if self.name in program.applied:
            raise CompositionError("'drop' was applied already", try_="one number of layers")
        depth = program.ledger.depth
        if isinstance(self.layers, str):
            if depth < 2:
                raise SpecError(f"drop.layers: there is nothing to draw from {depth} layers", try_="leave `drop` out")
            program.schedule(lambda: RandomDrop(depth))
        else:
            if self.layers >= depth:
                raise SpecError(
                    f"drop.layers {self.layers} leaves no adapter",
                    there_is=f"adapters in {depth} layers, of the shallowest stack where there are several",
                    try_=f"at most {depth - 1}",
                )
            program.leave_out(self.layers)
        return PassResult(program, modified=True)


class RandomDrop(Schedule):
    """A new number of layers for every step, from torch's generator, which training seeds and checkpoints."""

    def __init__(self, depth: int) -> None:
        self.depth = depth

    def before(self, model: Any, step: int) -> None:
        """Draw from 0 to L − 1: at least one layer trains."""
        model.drop(int(torch.randint(self.depth, ())))

    def after(self, model: Any, step: int) -> None:
        """All of it again, for evaluation and the task file."""
        model.drop()
