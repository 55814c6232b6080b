"""A low-rank product beside a projection or a table: what LoRA and its kin insert.

y -> y + (drop(x)·A)·B + c                                A [in, r], B [r, out], and where there is one c [out]
y -> y + A[ids]·B                                         A [rows, r], B [r, width], at a table
y -> y + (drop(x)·A[e])·B[e]                              A [experts, in, r], B [experts, r, out], at experts
y -> y·(1 + g) - b·g + (drop(x)·A)·B                      with a gain g [out] (DoRA): the base's bias b is not scaled
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from surgeon.anatomy import Embedding, Projection, Site
from surgeon.errors import SpecError
from surgeon.ledger import Delta
from surgeon.passes.slices import scatter
from surgeon.program import Program


def beside(
    program: Program,
    site: Projection,
    a: Delta,
    b: Delta,
    dropout: float = 0.0,
    *,
    bias: Delta | None = None,
    gain: Delta | None = None,
) -> None:
    """Add `(drop(x)·a)·b` to what `site` gives, to the features of its role alone where it is a slice."""
    place = scatter(site)

    def product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        if dropout:
            x = torch.nn.functional.dropout(x, dropout)
        return (x @ a) @ b

    def added(y: Tensor, x: Tensor, a: Tensor, b: Tensor, *c: Tensor) -> Tensor:
        return y + place(sum(c, product(x, a, b)))

    def scaled(y: Tensor, x: Tensor, a: Tensor, b: Tensor, g: Tensor) -> Tensor:
        return y * (1 + place(g)) + place(product(x, a, b))

    def scaled_but_the_bias(  # noqa: PLR0917 - the tensors of the equation
        y: Tensor, x: Tensor, base: Tensor, a: Tensor, b: Tensor, g: Tensor
    ) -> Tensor:
        g = place(g)
        return y * (1 + g) - base * g + place(product(x, a, b))

    if gain is None:
        program.replace(site.output, added, (a, b, bias) if bias else (a, b), also=(site.input,))
    elif site.bias_node is None:
        program.replace(site.output, scaled, (a, b, gain), also=(site.input,))
    else:
        own = program.operand(site.node, site.bias_node)
        program.replace(site.output, scaled_but_the_bias, (a, b, gain), also=(site.input, own))


def beside_experts(program: Program, site: Projection, a: Delta, b: Delta, dropout: float = 0.0) -> None:
    """Add `(drop(x)·a[e])·b[e]` to what `site` gives, e being the expert that a row of x goes to."""
    assert site.experts is not None
    place = scatter(site)
    # The one product of rows in runs that has a gradient everywhere; transformers' traces have it for the weights too.
    product = grouped_mm if site.experts.sorted else _picked

    def added(y: Tensor, x: Tensor, routing: Tensor, a: Tensor, b: Tensor) -> Tensor:
        if dropout:
            x = torch.nn.functional.dropout(x, dropout)
        return y + place(product(product(x, a, routing), b, routing))

    program.replace(site.output, added, (a, b), also=(site.input, site.experts.routing))


def grouped_mm(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """`x [rows, in]` by `weights [experts, in, out]`: expert e's rows end at `ends[e]`."""
    found: Tensor = torch.ops.transformers.grouped_mm_fallback(x, weights, ends)
    return found


def _picked(x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """`x [rows, in]` by `weights [experts, in, out]`: `experts [rows]` are the numbers of each row's."""
    return (x.unsqueeze(-2) @ weights.index_select(0, experts)).squeeze(-2)


def beside_table(site: Embedding) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """`y + a[ids]·b`. The base's padding row learns nothing, and ids beyond the table (a prompt's) read any row."""
    rows = site.rows
    padding = next((a for a in site.node.args[2:3] if isinstance(a, int)), -1)

    def looked_up(y: Tensor, ids: Tensor, a: Tensor, b: Tensor) -> Tensor:
        # 0, or the number of the row of the batch where each has a table of its own.
        row = torch.ones_like(a.narrow(-2, 0, 1).sum(-1), dtype=torch.long).cumsum(0) - 1
        ids = ids.clamp(max=rows - 1) + row * rows
        return y + torch.embedding(a.flatten(0, -2), ids, padding) @ b

    return looked_up


def call_of(program: Program, site: Site) -> str:
    """What tells the calls of a module that several layers share apart in the names of their deltas."""
    alike = (other for other in program.anatomy.sites() if other.path == site.path and other.role == site.role)
    return f"layer_{site.layer}" if len({other.layer for other in alike}) > 1 else ""


def part_of(site: Projection) -> str:
    """What tells the roles of one fused projection, or of the experts of one module, apart in the names of deltas."""
    return site.role.rpartition(".")[2] if site.features or site.experts else ""


def check_rank(option: str, rank: int, label: str, rows: int, columns: int) -> None:
    """Raise SpecError where a rank exceeds the matrix it is to adapt."""
    limit = min(rows, columns)
    if rank > limit:
        raise SpecError(
            f"{option} {rank} is larger than {label} ({rows} -> {columns})",
            try_=f"a rank of at most {limit}; more cannot add anything to a matrix of that rank",
        )
