"""Norm tuning: train the gains and biases of the normalisation layers, and nothing else.

    y = (x - mean) / std · w + b   with w and b deltas that start at the base's

Zhao et al., "Tuning LayerNorm in Attention", ICLR 2024 (arXiv:2312.11420), section 3.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from pydantic import Field

from surgeon.anatomy import Norm, Where, select, selectors
from surgeon.passes import Pass, PassResult
from surgeon.program import Program


class NormTuning(Pass):
    """Make gain and bias of every selected norm deltas; a norm that layers share is one."""

    name: ClassVar[str] = "norm_tuning"
    title: ClassVar[str] = "Norm tuning"
    paper: ClassVar[str] = "arXiv:2312.11420"
    identity_at_birth: ClassVar[bool] = True

    where: Where = Field(selectors("norm"), description="Norms to train; as in the paper, all of them.")

    def call(self, program: Program) -> PassResult:
        train_norms(program, select(program.anatomy, self.where, Norm))
        return PassResult(program, modified=True)


def train_norms(program: Program, norms: Iterable[Norm]) -> None:
    """Make the norms' gains and biases deltas that start at the base's values."""
    for norm in norms:
        for part, name in (("weight", norm.weight), ("bias", norm.bias)):
            if name is not None:
                program.take_over(norm, part, name)
