"""Compacter: adapters whose matrices are sums of Kronecker products, with one small factor shared by all layers.

    W = Σᵢ Aᵢ ⊗ (sᵢ·tᵢᵀ)      A [n, n, n], sᵢ [in/n, k], tᵢ [out/n, k], i = 1…n
    f(z) = act(z·W_down + b_down)·W_up + b_up

A, s and t are trained; W_down and W_up are deployed, so that at run time this is an adapter like any other.

Karimi Mahabadi et al., "Compacter: Efficient Low-Rank Hypercomplex Adapter Layers", NeurIPS 2021 (arXiv:2106.04647),
sections 3 and 4.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from surgeon.anatomy import Join, Where, selectors
from surgeon.errors import SpecError
from surgeon.ledger import Delta
from surgeon.passes.adapter import Adapter
from surgeon.program import Program
from surgeon.starts import Init, normal

RULE = "compacter.rule"


class Compacter(Adapter):
    """Insert an adapter of Kronecker products at every selected join; 3·(d + m) parameters each, and n³ for all.

    The paper's start is kept: A from N(0, 1e-4), s and t from Glorot's uniform. A fresh task is then the base but for
    about a rounding, not exactly. Layer norms are trained too, as in the paper. Compacter++ is `where: residual.ffn`.
    """

    name: ClassVar[str] = "compacter"
    title: ClassVar[str] = "Compacter"
    paper: ClassVar[str] = "arXiv:2106.04647"
    identity_at_birth: ClassVar[bool] = False

    bottleneck: PositiveInt = Field(24, description="Width m between the two projections; a multiple of n.")
    divisions: PositiveInt = Field(4, description="Number n of Kronecker products in a sum; it divides d and m.")
    rank: PositiveInt = Field(1, description="Rank k of each second factor s·tᵀ.")
    where: Where | None = Field(
        selectors("residual.attention", "residual.ffn"),
        description="Joins to adapt: the paper's are both sublayers, `residual.ffn` alone is its Compacter++.",
    )

    def _weights(self, program: Program, join: Join) -> tuple[Delta, ...]:
        """The adapter's four tensors, its two matrices folded from A, s and t."""
        for what, width in (("the base's width", join.width), ("bottleneck", self.bottleneck)):
            if width % self.divisions:
                raise SpecError(
                    f"compacter.divisions is {self.divisions}, which does not divide {what}, {width}",
                    try_="a number that divides both; the paper takes 4",
                )
        down, down_bias, up, up_bias = self._deltas(program, join, None, None)
        bottleneck = down.free[1]
        rule = self._rule(program)
        for weight, free, scale in ((down, (None, bottleneck), 1.0), (up, (bottleneck, None), self.factor)):
            (rows, columns), k, place = weight.shape, self.rank, weight.name.removesuffix(".weight")
            left = self._factor(program, f"{place}.left", (rows, k), 0, free[0])
            right = self._factor(program, f"{place}.right", (k, columns), 1, free[1])
            program.fold(
                (rule, left, right), (weight.name,), lambda a, s, t, scale=scale: (scale * kronecker(a, s, t),)
            )
        if self.factor != 1.0:
            program.fold((up_bias.name,), (up_bias.name,), lambda b: (b * self.factor,))
        return down, down_bias, up, up_bias

    def _rule(self, program: Program) -> str:
        """A is one for all layers, and for all `compacter` items of a spec."""
        shape = (self.divisions,) * 3
        known = program.ledger.trained.get(RULE)
        if known is None:
            program.trained(RULE, shape, normal(1e-4))
        elif known.shape != shape:
            raise SpecError(
                f"compacter.divisions is {self.divisions}, and {known.shape[0]} in an earlier item",
                there_is="one A for all layers",
                try_="the same divisions in both items",
            )
        return RULE

    def _factor(self, program: Program, name: str, shape: tuple[int, int], axis: int, free: str | None) -> str:
        """All sᵢ below each other `[in, k]`, or all tᵢ beside each other `[k, out]`."""
        return program.trained(name, shape, glorot(axis, self.divisions), free={axis: free} if free else None).name


def kronecker(rule: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Σᵢ Aᵢ ⊗ (sᵢ·tᵢᵀ), `[in, out]`, from A `[n, n, n]`, the sᵢ `[in, k]` and the tᵢ `[k, out]`."""
    n = rule.shape[0]
    s, t = torch.unflatten(left, 0, (n, -1)), torch.unflatten(right, 1, (n, -1))
    return torch.einsum("iab,ipk,kiq->apbq", rule, s, t).flatten(2, 3).flatten(0, 1)


def glorot(axis: int, blocks: int) -> Init:
    """Glorot's uniform with the authors' gain √2, for each block along `axis`: U(±√(12 / (fan_in + fan_out)))."""

    def init(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
        bound = math.sqrt(12 / (shape[axis] / blocks + shape[1 - axis]))
        return (torch.rand(shape, generator=rng) * 2 - 1) * bound

    return init
