"""QLoRA: LoRA on a base whose projections are held in 4 bits.

    y = x·W + b   becomes   y = x·dequant(c, absmax) + b + s · (x·A)·B      c NF4 levels, A [in, r], B [r, out]

Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", NeurIPS 2023, section 3, equations 5 and 6.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, fx

from surgeon.anatomy import Embedding, Projection, Selector, Where, select, selectors
from surgeon.errors import CompositionError, SelectorError, SpecError
from surgeon.nf4 import dequantise, matmul_nf4, nf4_absmax, onnx_matmul, quantise
from surgeon.passes import Pass, PassResult
from surgeon.passes.lora import LoRA
from surgeon.program import Program

aten = torch.ops.aten
FACTOR: dict[Any, int] = {
    aten.linear.default: 1,
    aten.matmul.default: 1,
    aten.mm.default: 1,
    aten.addmm.default: 2,
}
"""Where a product has its weight."""
SUBLAYERS = ("attention", "cross_attention", "ffn")
CODE = "nf4_absmax_code"
"""The 256 numbers of the second quantisation, which all weights share."""


class QLoRA(Pass):
    """Hold the selected projections in NF4, and add LoRA's low-rank product at every selected projection.

    A fresh task is exactly the quantised base, which is another base than the checkpoint: a task trained on one is
    refused by the other. Raises SpecError for a weight that is no plain matrix or has other readers.
    """

    name: ClassVar[str] = "qlora"
    title: ClassVar[str] = "QLoRA"
    paper: ClassVar[str] = "arXiv:2305.14314"
    identity_at_birth: ClassVar[bool] = True

    rank: PositiveInt = Field(8, description="Rank r of the product; free per task and site at run time.")
    alpha: PositiveFloat = Field(16.0, description="Scale numerator: the product is multiplied by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the product's input, in training only.")
    where: Where | None = Field(
        None,
        description="Projections to adapt; unset it is, as in the paper, those of every attention and feed-forward.",
    )
    quantise: Where | None = Field(
        None,
        description="Projections to hold in NF4; unset it is those of every attention and feed-forward. A fused one is "
        "quantised as a whole.",
    )
    block: Literal[64, 128, 256, 512, 1024, 2048, 4096] = Field(64, description="Numbers that share one scale.")
    double: bool = Field(True, description="Quantise the scales too, to 8 bits in blocks of 256; 4.13 bits a number.")

    def call(self, program: Program) -> PassResult:
        program.operator(torch.ops.surgeon.matmul_nf4.default, onnx_matmul)
        program.operator(torch.ops.surgeon.nf4_absmax.default, None)  # ONNX Runtime's operator reads fp32 alone
        by_weight: dict[str, dict[fx.Node, Projection]] = {}
        for site in select(program.anatomy, self.quantise or _linears(program), Projection):
            by_weight.setdefault(site.weight, {}).setdefault(site.node, site)
        for weight, sites in by_weight.items():
            self._hold(program, weight, sites)
        where = self.where or _linears(program)
        product = _Product.model_validate(
            {"rank": self.rank, "alpha": self.alpha, "dropout": self.dropout, "where": where}
        )
        with program.author(LoRA.name):  # the product is LoRA's, under its names
            product.call(program)
        return PassResult(program, modified=True)

    def _hold(self, program: Program, weight: str, sites: dict[fx.Node, Projection]) -> None:
        """Put one weight into NF4, and let the products that read it read that."""
        _check(program, weight, sites)
        in_first = next(iter(sites.values())).in_first
        base = program.tensor(weight).detach()
        made, dtype = quantise(base.T if in_first else base, self.block, double=self.double), base.dtype
        shape, block = made.shape, made.block  # what follows must not hold on to the weight itself

        def numbers(packed: Tensor, absmax: Tensor, *nested: Tensor) -> Tensor:
            whole = dequantise(packed, nf4_absmax(absmax, *nested) if nested else absmax, shape, block).to(dtype)
            return whole.T if in_first else whole

        wanted = made.wanted.T if made.wanted is not None and in_first else made.wanted
        shared = {} if made.code is None else {CODE: made.code}
        parts = program.store(weight, "nf4", made.tensors(), numbers, wanted=wanted, shared=shared)
        for site in sites.values():
            x, bias = _operands(site)
            if bias is None:
                program.recompute(site.node, _product(shape, block), (x, *parts))
            else:
                program.recompute(site.node, _biased(shape, block), (x, bias, *parts))


class _Product(LoRA):
    """LoRA's product, by the options of QLoRA."""

    asked_by: ClassVar[str] = "qlora"


def _product(shape: tuple[int, int], block: int) -> Callable[..., Tensor]:
    """The projection over NF4."""

    def product(x: Tensor, packed: Tensor, absmax: Tensor, *nested: Tensor) -> Tensor:
        y: Tensor = matmul_nf4(x, packed, nf4_absmax(absmax, *nested) if nested else absmax, *shape, block)
        return y

    return product


def _biased(shape: tuple[int, int], block: int) -> Callable[..., Tensor]:
    product = _product(shape, block)
    return lambda x, bias, *parts: product(x, *parts) + bias


def _linears(program: Program) -> tuple[Selector, ...]:
    """Every projection of an attention or a feed-forward that this base has."""
    roles = {p.role.partition(".")[0] for p in program.anatomy.projections}
    if not roles & set(SUBLAYERS):
        raise SelectorError("qlora: this base has no projection in an attention or feed-forward")
    return selectors(*(family for family in SUBLAYERS if family in roles))


def _operands(site: Projection) -> tuple[fx.Node, fx.Node | None]:
    """Input and bias of the product itself, as passes before left them."""
    node = site.node
    x, bias = node.args[0], node.args[2] if len(node.args) > 2 else None
    if node.target is aten.addmm.default:
        bias, x = node.args[:2]
    assert isinstance(x, fx.Node)
    return x, bias if isinstance(bias, fx.Node) else None


def _check(program: Program, weight: str, sites: Mapping[fx.Node, Projection]) -> None:
    """Raise SpecError unless these products are all that reads the weight, and each reads it as it is stored."""
    first = next(iter(sites.values()))
    if weight in program.stored:
        raise CompositionError(
            f"{weight} is held in {program.stored[weight].form} already", try_="one item with one `quantise` for both"
        )
    readers = {user for node in program.reads(weight) for user in node.users}
    for site in sites.values():
        position = FACTOR.get(site.node.target)
        factor = None if position is None else site.node.args[position]
        plain = isinstance(factor, fx.Node) and factor.target == weight and factor.meta["val"].dim() == 2
        if not plain or site.node.kwargs or not site.node.users:
            raise SpecError(
                f"{site.label} cannot be held in NF4: it is no plain product of its input and {weight} any more",
                there_is=f"{site.node.target} of {', '.join(map(str, site.node.args))}",
                try_="leave it out with `quantise`",
            )
    if others := readers - set(sites):
        raise SpecError(
            f"{first.label} cannot be held in NF4 alone: {weight} is read elsewhere too",
            there_is=[_who(program, node) for node in others],
            try_="select every layer that shares it, or leave it out with `quantise`; a tied embedding stays as it is",
        )


def _who(program: Program, node: fx.Node) -> str:
    sites: tuple[Projection | Embedding, ...] = (*program.anatomy.projections, *program.anatomy.embeddings)
    return next((site.label for site in sites if site.node is node), str(node))
