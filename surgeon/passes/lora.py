"""LoRA: a low-rank product beside a frozen projection or table.

    y = x·W + b   becomes   y = x·W + b + s · (drop(x)·A)·B      A [in, r], B [r, out], s = alpha / r
    y = E[ids]    becomes   y = E[ids] + s · A[ids]·B            A [rows, r], B [r, width]
    y = x·W[e]    becomes   y = x·W[e] + s · (x·A[e])·B[e]       A [experts, in, r], B [experts, r, out], x goes to e
    with `dora`             y = x·V·(m / ‖V‖) + b                V = W + s·A·B, norms of columns, m [out] from ‖W‖

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, section 4.1. rsLoRA's s = alpha / √r:
Kalajdzievski, arXiv:2312.03732. LoRA+'s faster B: Hayou et al., arXiv:2402.12354. DoRA: Liu et al.,
arXiv:2402.09353, section 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import ClassVar, Literal, TypeVar

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from surgeon.anatomy import Embedding, Projection, Selector, Where, select, selectors
from surgeon.errors import CompositionError, SelectorError, SpecError
from surgeon.ledger import Delta
from surgeon.passes import Pass, PassResult
from surgeon.passes.magnitude import magnitude
from surgeon.passes.product import beside, beside_experts, beside_table, call_of, check_rank, part_of
from surgeon.program import Program
from surgeon.starts import Init, kaiming_uniform, normal, zeros

Target = Projection | Embedding
N = TypeVar("N", int, float)


class LoRA(Pass):
    """Add a low-rank product at every selected projection; r · (in + out) parameters each.

    A fresh product is zero, so a fresh task is exactly the base. A role that is a slice of a fused projection gets a
    product of its own on just its features; a selector of embeddings (`embedding.token`) adapts what is looked up, and
    leaves a head that is tied to the table alone. Where a projection holds a weight for each of several experts
    (`moe.up`), each has a product of its own. Raises SpecError where the rank exceeds the projection.
    """

    name: ClassVar[str] = "lora"
    title: ClassVar[str] = "LoRA"
    paper: ClassVar[str] = "arXiv:2106.09685"
    identity_at_birth: ClassVar[bool] = True
    asked_by: ClassVar[str] = "lora"
    """Whose options a message about a size names."""

    rank: PositiveInt = Field(8, description="Rank r of the product; free per task and site at run time.")
    alpha: PositiveFloat = Field(16.0, description="Scale numerator: the product is multiplied by alpha / rank.")
    rslora: bool = Field(False, description="Scale by alpha / sqrt(rank) instead.")
    dora: bool = Field(False, description="DoRA: train the magnitude of every output feature too; not for embeddings.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the product's input, in training only.")
    bias: bool = Field(False, description="Add a trained bias to the product. The base's own biases: `bitfit`.")
    plus: PositiveFloat = Field(
        1.0, description="LoRA+: factor of the learning rate of `lora_B` (16 in the paper) against that of `lora_A`."
    )
    start: Literal["kaiming", "gaussian", "orthogonal"] = Field(
        "kaiming",
        description="Fresh `lora_A`: U(±1/√in), N(0, 1/r), or half of the ranks of A and the other half of B at "
        "N(0, 0.1) and the rest zero, so that both move from the first step and their product is exactly zero.",
    )
    shared: bool = Field(
        True, description="One product for all calls of a module that layers share (ALBERT); else each has its own."
    )
    where: Where = Field(
        selectors("attention.query", "attention.value"),
        description="Projections to adapt; as in the paper, the queries and values of self-attention.",
    )
    ranks: dict[str, PositiveInt] = Field(
        {}, description="Other ranks for some of them: selector to rank, the last match wins, e.g. `{'ffn@0-2': 4}`."
    )
    alphas: dict[str, PositiveFloat] = Field({}, description="Other alphas for some of them, likewise.")

    def call(self, program: Program) -> PassResult:
        if self.dora and self.bias:
            raise SpecError("lora.bias is not defined with lora.dora, which scales a weight and no bias")
        sites = _targets(program, self.where)
        ranks = _each(program, sites, self.rank, self.ranks, "ranks")
        alphas = _each(program, sites, self.alpha, self.alphas, "alphas")
        for site in sites:
            r = ranks[site]
            scale = partial(self._scale, alphas[site])
            if isinstance(site, Embedding):
                self._adapt_table(program, site, r, scale)
            else:
                self._adapt(program, site, r, scale)
        return PassResult(program, modified=True)

    def _adapt(self, program: Program, site: Projection, r: int, scale: Callable[[Tensor], float]) -> None:
        check_rank(f"{self.asked_by}.rank", r, site.label, site.in_features, site.out_features)
        call = "" if self.shared else call_of(program, site)
        make: Callable[..., Delta] = partial(
            program.delta, site, qualifier=".".join(filter(None, (part_of(site), call)))
        )
        fresh_a, fresh_b = self._starts(r)
        each = (site.experts.count,) if site.experts else ()
        a = make("lora_A", (*each, site.in_features, r), fresh_a, free={len(each) + 1: "rank"})
        b = make("lora_B", (*each, r, site.out_features), fresh_b, free={len(each): "rank"}, rate=self.plus)
        if site.experts:
            self._adapt_experts(program, site, a, b, scale)
            return
        if self.dora:
            beside(program, site, a, b, self.dropout, gain=magnitude(program, site, a, b, scale))
            return
        program.fold((b.name,), (b.name,), lambda b: (b * scale(b),))
        bias = None
        if self.bias:
            bias = make("lora_bias", (site.out_features,), zeros, rate=self.plus)
            program.fold((b.name, bias.name), (bias.name,), lambda b, c: (c * scale(b),))
        beside(program, site, a, b, self.dropout, bias=bias)

    def _adapt_experts(
        self, program: Program, site: Projection, a: Delta, b: Delta, scale: Callable[[Tensor], float]
    ) -> None:
        if asked := next((option for option in ("dora", "bias") if getattr(self, option)), None):
            raise SpecError(
                f"{self.asked_by}.{asked} is not defined for {site.label}, a weight for each of several experts",
                try_=f"two `{self.asked_by}` items, the one with the experts without `{asked}`",
            )
        program.fold((b.name,), (b.name,), lambda b: (b * scale(b),))
        beside_experts(program, site, a, b, self.dropout)

    def _adapt_table(self, program: Program, site: Embedding, r: int, scale: Callable[[Tensor], float]) -> None:
        if self.dora:
            raise SpecError(
                f"lora.dora is not defined for {site.label}: what a table gives is no product with a weight",
                try_="two `lora` items, the one with the embedding without `dora`",
            )
        if program.current(site.node) is not site.node:
            raise CompositionError(
                f"lora would add to what another technique has put in the place of {site.label}",
                try_="lora further up in `surgery`; passes run in the order written",
            )
        check_rank(f"{self.asked_by}.rank", r, site.label, site.rows, site.width)
        a = program.delta(site, "lora_embedding_A", (site.rows, r), zeros, free={1: "rank"})
        b = program.delta(site, "lora_embedding_B", (r, site.width), normal(1.0), free={0: "rank"})
        program.fold((b.name,), (b.name,), lambda b: (b * scale(b),))
        program.replace(site.node, beside_table(site), (a, b), also=(site.index,))

    def _scale(self, alpha: float, b: Tensor) -> float:
        r = max(b.shape[-2], 1)
        return alpha / (math.sqrt(r) if self.rslora else r)

    def _starts(self, r: int) -> tuple[Init, Init]:
        match self.start:
            case "kaiming":
                return kaiming_uniform(-2), zeros
            case "gaussian":
                return normal(1 / r), zeros
            case _:
                return _half(-1, first=True), _half(-2, first=False)


def _half(axis: int, *, first: bool) -> Init:
    """N(0, 0.1) in the first or the other half of the ranks, which are along `axis`."""

    def init(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
        rank = torch.arange(shape[axis])
        chosen = (rank < (shape[axis] + 1) // 2) == first
        return 0.1 * torch.randn(shape, generator=rng) * (chosen if axis == -1 else chosen[:, None])

    return init


def _targets(program: Program, where: Where) -> tuple[Target, ...]:
    """The projections that `where` selects, and the token tables that a selector of embeddings alone does."""
    anatomy = program.anatomy
    tables = [
        s
        for s in where
        if any(s.matches(e, anatomy) for e in anatomy.embeddings)
        and not any(s.matches(p, anatomy) for p in anatomy.projections)
    ]
    others = [s for s in where if s not in tables]
    embeddings = select(anatomy, tables, Embedding)
    if wrong := [e.label for e in embeddings if e.role != "embedding.token"]:
        raise SelectorError(
            f"lora: {wrong[0]} is no table of tokens",
            there_is=[e.label for e in anatomy.embeddings if e.role == "embedding.token"],
        )
    return (*select(anatomy, others, Projection), *embeddings)


def _each(
    program: Program, sites: tuple[Target, ...], usual: N, others: Mapping[str, N], option: str
) -> dict[Target, N]:
    """The value of an option for every site: the last selector's that matches, else the usual one."""
    values = dict.fromkeys(sites, usual)
    for text, other in others.items():
        for site in _targets(program, (Selector.parse(text),)):
            if site not in values:
                raise SpecError(f"lora.{option}: '{text}' selects {site.label}, which `where` does not")
            values[site] = other
    return values
