"""LoRA: a low-rank product beside a frozen projection.

    y = x·W + b   becomes   y = x·W + b + s · (drop(x)·A)·B      A [in, r], B [r, out], s = alpha / r

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, section 4.1. rsLoRA's s = alpha / √r:
Kalajdzievski, arXiv:2312.03732.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from surgeon.anatomy import Projection, Selector, Where, select, selectors
from surgeon.errors import SpecError
from surgeon.ledger import kaiming_uniform, zeros
from surgeon.passes import Pass, PassResult
from surgeon.passes.slices import scatter
from surgeon.program import Program


class LoRA(Pass):
    """Add a low-rank product at every selected projection; r · (in + out) parameters each.

    `lora_B` starts at zero, so a fresh task is exactly the base. A role that is a slice of a fused projection gets a
    product of its own on just its features. Raises SpecError where the rank exceeds the projection.
    """

    name: ClassVar[str] = "lora"
    title: ClassVar[str] = "LoRA"
    paper: ClassVar[str] = "arXiv:2106.09685"
    identity_at_birth: ClassVar[bool] = True

    rank: PositiveInt = Field(8, description="Rank r of the product; free per task and site at run time.")
    alpha: PositiveFloat = Field(16.0, description="Scale numerator: the product is multiplied by alpha / rank.")
    rslora: bool = Field(False, description="Scale by alpha / sqrt(rank) instead.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the product's input, in training only.")
    where: Where = Field(
        selectors("attention.query", "attention.value"),
        description="Projections to adapt; as in the paper, the queries and values of self-attention.",
    )
    ranks: dict[str, PositiveInt] = Field(
        {}, description="Other ranks for some of them: selector to rank, the last match wins, e.g. `{'ffn@0-2': 4}`."
    )

    def call(self, program: Program) -> PassResult:
        sites = select(program.anatomy, self.where, Projection)
        rank_at = dict.fromkeys(sites, self.rank)
        for text, rank in self.ranks.items():
            for site in select(program.anatomy, (Selector.parse(text),), Projection):
                if site not in rank_at:
                    raise SpecError(f"lora.ranks: '{text}' selects {site.label}, which `where` does not")
                rank_at[site] = rank
        for site, rank in rank_at.items():
            self._adapt(program, site, rank)
        return PassResult(program, modified=True)

    def _adapt(self, program: Program, site: Projection, rank: int) -> None:
        limit = min(site.in_features, site.out_features)
        if rank > limit:
            raise SpecError(
                f"lora.rank {rank} is larger than {site.label} ({site.in_features} -> {site.out_features})",
                try_=f"a rank of at most {limit}; more cannot add anything to a matrix of that rank",
            )
        part = site.role.rpartition(".")[2] if site.features else ""
        a = program.delta(
            site, "lora_A", (site.in_features, rank), kaiming_uniform(0), free={1: "rank"}, qualifier=part
        )
        b = program.delta(site, "lora_B", (rank, site.out_features), zeros, free={0: "rank"}, qualifier=part)
        program.fold((b.name,), (b.name,), self._scaled)
        place = scatter(site)

        def adapted(y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
            if self.dropout:
                x = torch.nn.functional.dropout(x, self.dropout)
            return y + place((x @ a) @ b)

        program.replace(site.output, adapted, (a, b), also=(site.input,))

    def _scaled(self, b: Tensor) -> tuple[Tensor]:
        rank = max(b.shape[0], 1)
        return (b * (self.alpha / (math.sqrt(rank) if self.rslora else rank)),)
