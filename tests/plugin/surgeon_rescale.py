"""Rescale: what a sublayer adds to the stream is multiplied by a learned vector.

skip + branch   becomes   skip + branch · g      g [d] starts at one
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from surgeon.anatomy import Join, Where, select, selectors
from surgeon.passes import Pass, PassResult
from surgeon.program import Program
from surgeon.starts import value


class Rescale(Pass):
    """Scale the branch of every selected residual join, feature by feature; d parameters each."""

    name: ClassVar[str] = "rescale"
    title: ClassVar[str] = "Rescaled branches"
    paper: ClassVar[str] = ""
    identity_at_birth: ClassVar[bool] = True

    where: Where = Field(selectors("residual"), description="Joins whose branch is scaled.")

    def call(self, program: Program) -> PassResult:
        for join in select(program.anatomy, self.where, Join):
            ones = torch.ones(join.width)
            scale = program.delta(join, "scale", (join.width,), value(ones), default=ones)
            program.replace_operand([join.add], join.branch, lambda branch, g: branch * g, (scale,))
        return PassResult(program, modified=True)
