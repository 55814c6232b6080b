"""Another base for ONNX Runtime: the base's matrices in 8 or 4 bits, read by its operator MatMulNBits.

A matrix is cut into blocks of 32 consecutive numbers of one output feature. A number is `(code - half) · scale`, with
`half` 128 or 8; its block's scale maps the number of the largest size to the code 0, as ONNX Runtime's own quantiser
does. What is trained stays fp32, and so is all that is no matrix of the base: tables, norms, biases, shared constants.

A base from a GGUF file is in blocks already. The operator has no number for a block's least one, so the product is

    x·Wᵀ = MatMulNBits(x; codes, scales) + sums(x)·rest      rest [blocks, out]: what code `half` stands for

with the sums of x over every block. Its way with 8 bits and fp32 inputs is slow, so an 8-bit matrix is two of 4 bits,
`c - 128 = 16·(high - 8) + (low - 8) + 8`. Both are the same numbers, added up in another order.

The products are rewritten before the conversion: there the base's matrices can still be told from all other constants.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from surgeon.blocks import BLOCK, Blocks
from surgeon.errors import BaseError, SpecError, shorten
from surgeon.program import Program

aten = torch.ops.aten
BITS = {"int8": 8, "int4": 4}
ROUNDED = "base-rounded"
KEPT = ("copy", ROUNDED)
"""Weights that keep the blocks of the base's own file."""
EXACT, ACCURACY = 0, 4
"""Let ONNX Runtime round the products' inputs to 8 bits as well, block by block, or do not.

With fp32 inputs `int8` is far slower.
"""
LAYOUTS: dict[Any, tuple[int, int, bool]] = {
    aten.linear.default: (0, 1, True),
    aten.matmul.default: (0, 1, False),
    aten.mm.default: (0, 1, False),
    aten.addmm.default: (1, 2, False),
}
"""Where a product has its input and its weight, and whether that is `[out, in]`."""


def check_weights(program: Program, weights: str, where: str | None) -> None:
    """Raise SpecError unless the base has something to hold in this form."""
    if weights == ROUNDED and not products(program.graph, program, weights):
        raise SpecError(
            "export.weights: this base has no matrix whose blocks could stay as they are",
            where=where,
            there_is=f"matrices in {shorten(sorted(set(program.quantised.forms.values())) or ['no blocks'])}",
            try_="leave `weights` out; `int8` and `int4` make blocks of any base",
        )
    if weights not in BITS:
        return
    if program.dtype != torch.float32:
        raise SpecError(
            f"export.weights: {weights} is made from float32, and this base is {program.dtype}".replace("torch.", ""),
            where=where,
            try_="`dtype: float32` in `base`",
        )
    if not products(program.graph, program):
        raise SpecError(
            f"export.weights: this base has no matrix to hold in {weights}",
            where=where,
            there_is=f"it would take one of a multiple of {BLOCK} inputs that is not trained, held in another form or "
            "read elsewhere too",
            try_="leave `weights` out",
        )


def products(graph: fx.Graph, program: Program, weights: str = "int8") -> dict[fx.Node, str]:
    """Products whose matrix of the base is held in blocks, and the matrix's name.

    Those that the file holds so; else all that nothing else reads. A table that is a head too is read both ways.
    """
    found = {node: name for node in graph.nodes if (name := _matrix(node, program)) is not None}
    if not found:
        return {}
    if weights not in BITS:
        blocks = program.quantised.exact if weights in KEPT and program.dtype == torch.float32 else {}
        return {n: name for n, name in found.items() if name in blocks and blocks[name].turned != LAYOUTS[n.target][2]}
    reads = [n for n in graph.nodes if n.op == "get_attr"]
    elsewhere = {n.target for n in reads if any(user not in found for user in n.users)}
    return {node: name for node, name in found.items() if name not in elsewhere}


def _matrix(node: fx.Node, program: Program) -> str | None:
    if node.target not in LAYOUTS or node.kwargs or not node.users:
        return None
    _, at, out_first = LAYOUTS[node.target]
    factor = node.args[at]
    if not isinstance(factor, fx.Node) or factor.op != "get_attr" or factor.target not in program.frozen:
        return None
    name = str(factor.target)
    tensor = program.tensor(name)
    fits = tensor.dim() == 2 and tensor.is_floating_point() and tensor.shape[1 if out_first else 0] % BLOCK == 0
    return name if fits else None


def quantised(graph_module: fx.GraphModule, program: Program, weights: str) -> fx.GraphModule:
    """Let the products with the base's matrices read these in 8 or 4 bits, where that is what is wanted."""
    if weights in KEPT:
        return _kept(graph_module, program, weights)
    if weights not in BITS:
        return graph_module
    held: dict[str, tuple[int, int]] = {}
    for node, name in products(graph_module.graph, program).items():
        at_input, at_weight, out_first = LAYOUTS[node.target]
        if name not in held:
            weight = program.tensor(name).detach()
            held[name] = _hold(graph_module, name, weight if out_first else weight.T, weights)
        parts = (f"{name}.{weights}", f"{name}.scales")
        x, bias = node.args[at_input], node.args[2 if out_first else 0] if len(node.args) > 2 else None
        assert isinstance(node.args[at_weight], fx.Node)
        with graph_module.graph.inserting_before(node):
            packed, scales = (graph_module.graph.get_attr(part) for part in parts)
        node.target, node.args = onnx_product, (x, packed, scales, *held[name], BITS[weights], bias)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    return graph_module


def _kept(graph_module: fx.GraphModule, program: Program, weights: str) -> fx.GraphModule:
    """Let products read the blocks of the base's own file."""
    held: dict[str, tuple[int, list[str]]] = {}
    for node, name in products(graph_module.graph, program, weights).items():
        at_input, at_weight, _ = LAYOUTS[node.target]
        if name not in held:
            held[name] = _hold_blocks(graph_module, name, program.quantised.exact[name], weights == ROUNDED)
        factor, bits = node.args[at_weight], held[name][0]
        bias = node.args[3 - at_input - at_weight] if len(node.args) > 2 else None
        assert isinstance(factor, fx.Node)
        with graph_module.graph.inserting_before(node):
            parts = [graph_module.graph.get_attr(part) for part in held[name][1]]
        turned = program.quantised.exact[name].turned
        columns, rows = factor.meta["val"].shape if turned else reversed(factor.meta["val"].shape)
        accuracy = ACCURACY if weights == ROUNDED else EXACT
        node.target = onnx_blocks
        node.args = (node.args[at_input], int(rows), int(columns), bits, accuracy, bias, *parts)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    return graph_module


def _hold_blocks(graph_module: fx.GraphModule, name: str, blocks: Blocks, rounded: bool) -> tuple[int, list[str]]:
    """Put a matrix in blocks beside the others; returns the operator's bits and the names of the product's parts."""
    codes, scales = [blocks.codes], [blocks.scales]
    half, bits = 2 ** (blocks.bits - 1), blocks.bits
    rest = None if blocks.least is None else blocks.least + half * blocks.scales
    if bits == 8 and not rounded:
        codes = [part[..., 0::2] | part[..., 1::2] << 4 for part in (blocks.codes >> 4, blocks.codes & 15)]
        scales, bits = [16 * blocks.scales, blocks.scales], 4
        rest = 8 * blocks.scales if rest is None else rest + 8 * blocks.scales
    parts = {"rest": torch.zeros(0) if rest is None else rest.T}
    for at, (packed, factors) in enumerate(zip(codes, scales, strict=True)):
        parts |= {f"codes{at}": packed, f"scales{at}": factors}
    owner = torch.nn.Module()
    for part, tensor in parts.items():
        owner.register_buffer(part, tensor.contiguous())
    parent, _, leaf = name.rpartition(".")
    graph_module.get_submodule(parent).add_module(f"{leaf}_blocks", owner)
    return bits, [f"{name}_blocks.{part}" for part in parts]


def onnx_blocks(  # noqa: PLR0917 - the signature of an operator
    x: Tensor, rows: int, columns: int, bits: int, accuracy: int, bias: Tensor | None, rest: Tensor, *packed: Tensor
) -> Tensor:
    """The product with a matrix in blocks: codes and scales by turns, and `rest`, empty where there is none."""
    terms = zip(packed[0::2], packed[1::2], strict=True)
    y, *more = (onnx_product(x, codes, scales, rows, columns, bits, None, accuracy) for codes, scales in terms)
    for term in more:
        y = y + term
    if rest.numel():
        y = y + x.view(*x.shape[:-1], columns // BLOCK, BLOCK).sum(-1) @ rest
    return y if bias is None else y + bias


def _hold(graph_module: fx.GraphModule, name: str, weight: Tensor, weights: str) -> tuple[int, int]:
    """Put a matrix `[out, in]` in its form beside the others; returns its sizes."""
    if not torch.isfinite(weight).all():
        raise BaseError(f"{name} holds NaN or infinity and cannot be quantised", where=name)
    codes, scales = pack(weight, BITS[weights])
    owner = torch.nn.Module()
    owner.register_buffer(weights, codes)
    owner.register_buffer("scales", scales)
    parent, _, leaf = name.rpartition(".")
    module = graph_module.get_submodule(parent)
    delattr(module, leaf)
    module.add_module(leaf, owner)
    return int(weight.shape[0]), int(weight.shape[1])


def pack(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """`[out, in]` as the operator's uint8 `[out, blocks, 32 · bits / 8]`, low half first, and fp32 `[out, blocks]`."""
    blocks = weight.float().reshape(weight.shape[0], -1, BLOCK)
    half = 2 ** (bits - 1)
    scales = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)) / -half
    inverse = torch.where(scales == 0, 0.0, 1 / scales)
    codes = ((blocks * inverse).round() + half).clamp(0, 2 * half - 1).to(torch.uint8)
    if bits == 4:
        codes = codes[..., 0::2] | codes[..., 1::2] << 4
    return codes.contiguous(), scales.squeeze(-1).contiguous()


def onnx_product(  # noqa: PLR0917 - the signature of an operator
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    rows: int,
    columns: int,
    bits: int,
    bias: Tensor | None,
    accuracy: int = ACCURACY,
) -> Tensor:
    """The product as ONNX Runtime's operator, and the bias as an addition of its own, as other products have it."""
    attributes: dict[str, Any] = {
        "K": columns,
        "N": rows,
        "bits": bits,
        "block_size": BLOCK,
        "accuracy_level": accuracy,
    }
    shape = [*x.shape[:-1], rows]
    y = torch.onnx.ops.symbolic(
        "com.microsoft::MatMulNBits", (x, packed, scales), attributes, dtype=x.dtype, shape=shape, version=1
    )
    return y if bias is None else y + bias
