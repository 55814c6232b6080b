"""VeRA: one pair of random matrices for all sites, and two trained vectors at each.

    y = x·W + b   becomes   y = x·W + b + Λ_b · ((Λ_d · (drop(x)·A))·B)    A [in, r] and B [r, out] frozen and shared

Λ_d [r] and Λ_b [out] scale elementwise; Λ_b starts at zero. A and B are as large as the largest projection needs,
and the others read their first rows of A and columns of B; a role of a fused projection reads the columns of its own
features. They are drawn from `projection_key` as PEFT draws them, so its checkpoints fit.

Kopiczko et al., "VeRA: Vector-based Random Matrix Adaptation", ICLR 2024 (arXiv:2310.11454), section 3.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import ClassVar

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from surgeon.anatomy import Projection, Where, select, selectors
from surgeon.passes import Pass, PassResult
from surgeon.passes.product import part_of
from surgeon.passes.slices import fused_width, gather, scatter
from surgeon.program import Program
from surgeon.starts import value, zeros


class VeRA(Pass):
    """Scale a shared random product at every selected projection; r + out parameters each.

    A and B are tensors of the base's graph, r · (in + out) numbers once; no task file holds them. So the rank is one
    for all tasks of a build. It may exceed the projections.
    """

    name: ClassVar[str] = "vera"
    title: ClassVar[str] = "VeRA"
    paper: ClassVar[str] = "arXiv:2310.11454"
    identity_at_birth: ClassVar[bool] = True

    rank: PositiveInt = Field(256, description="Rank r of the shared matrices: 256 to 1024 in the paper.")
    d_initial: PositiveFloat = Field(0.1, description="Start of the vector between the two matrices.")
    projection_key: NonNegativeInt = Field(0, description="What the random matrices are drawn from; PEFT's word too.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the product's input, in training only.")
    where: Where = Field(
        selectors("attention.query", "attention.value"),
        description="Projections to adapt; as in the paper, the queries and values of self-attention.",
    )

    def call(self, program: Program) -> PassResult:
        sites = self.sites(program)
        size = shared_size(sites)
        for site in sites:
            self._adapt(program, site, *size)
        return PassResult(program, modified=True)

    def sites(self, program: Program) -> tuple[Projection, ...]:
        """The projections that have vectors."""
        return select(program.anatomy, self.where, Projection)

    def matrices(self, program: Program) -> tuple[Tensor, Tensor]:
        """A [rows, r] and B [r, columns] as this pass has put them into the program."""
        a, b = (program.constants[name] for name in self._names(*shared_size(self.sites(program))))
        return a, b

    def _names(self, rows: int, columns: int) -> list[str]:
        return [f"vera_{side}_{self.projection_key}_{rows}x{self.rank}x{columns}" for side in "AB"]

    def _adapt(self, program: Program, site: Projection, rows: int, columns: int) -> None:
        part, width = part_of(site), site.out_features
        start = torch.full((self.rank,), self.d_initial)
        between = program.delta(site, "vera_lambda_d", start.shape, value(start), default=start, qualifier=part)
        behind = program.delta(site, "vera_lambda_b", (width,), zeros, qualifier=part)
        first, second = self._names(rows, columns)
        a = program.constant(first, lambda: drawn(self.projection_key, self.rank, rows, columns)[0])
        b = program.constant(second, lambda: drawn(self.projection_key, self.rank, rows, columns)[1])
        place, take = scatter(site), gather(site)
        used = site.in_features

        def added(  # noqa: PLR0917 - the tensors of the equation
            y: Tensor, x: Tensor, a: Tensor, b: Tensor, d: Tensor, out: Tensor
        ) -> Tensor:
            if self.dropout:
                x = torch.nn.functional.dropout(x, self.dropout)
            product = (x @ a.narrow(0, 0, used)) * d @ take(b)
            return y + place(product * out)

        program.replace(site.output, added, (between, behind), also=(site.input, a, b))


def shared_size(sites: Collection[Projection]) -> tuple[int, int]:
    """Rows of A and columns of B: the largest input, and the largest output of a whole projection, fused or not."""
    widths = (s.out_features if s.features is None else fused_width(s) for s in sites)
    return max(s.in_features for s in sites), max(widths)


def drawn(key: int, rank: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """A [rows, r] and B [r, columns] as PEFT draws them: its A and then its B, transposed, U(±√(6 / fan in))."""
    rng = torch.Generator().manual_seed(key)
    a, b = (
        torch.empty(shape).uniform_(-bound, bound, generator=rng)
        for shape, bound in (
            ((rank, rows), math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(rows))),
            ((columns, rank), math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(rank))),
        )
    )
    return a.T.contiguous(), b.T.contiguous()
