"""Another base for ONNX Runtime: the base's matrices in 8 or 4 bits, read by its operator MatMulNBits.

A matrix is cut into blocks of 32 consecutive numbers of one output feature. A number is `(code - half) · scale`, with
`half` 128 or 8; its block's scale maps the number of the largest size to the code 0, as ONNX Runtime's own quantiser
does. What is trained stays fp32, and so is all that is no matrix of the base: tables, norms, biases, shared constants.

The products are rewritten before the conversion: there the base's matrices can still be told from all other constants.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from surgeon.errors import BaseError, SpecError
from surgeon.program import Program

aten = torch.ops.aten
BITS = {"int8": 8, "int4": 4}
BLOCK = 32
"""Numbers that share one scale."""
ACCURACY = 4
"""Let ONNX Runtime round the products' inputs to 8 bits as well, block by block; with fp32 inputs `int8` is far slower."""
LAYOUTS: dict[Any, tuple[int, int, bool]] = {
    aten.linear.default: (0, 1, True),
    aten.matmul.default: (0, 1, False),
    aten.mm.default: (0, 1, False),
    aten.addmm.default: (1, 2, False),
}
"""Where a product has its input and its weight, and whether that is `[out, in]`."""


def check_weights(program: Program, weights: str, where: str | None) -> None:
    """Raise SpecError unless the base has something to hold in this form."""
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


def products(graph: fx.Graph, program: Program) -> dict[fx.Node, str]:
    """Products with a matrix of the base that nothing else reads, and the matrix's name."""
    found = {node: name for node in graph.nodes if (name := _matrix(node, program)) is not None}
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
    """Let the products with the base's matrices read these in 8 or 4 bits; `float32` leaves all as it is."""
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
    x: Tensor, packed: Tensor, scales: Tensor, rows: int, columns: int, bits: int, bias: Tensor | None
) -> Tensor:
    """The product as ONNX Runtime's operator, and the bias as an addition of its own, as other products have it."""
    attributes: dict[str, Any] = {"K": columns, "N": rows, "bits": bits, "block_size": BLOCK, "accuracy_level": ACCURACY}
    shape = [*x.shape[:-1], rows]
    y = torch.onnx.ops.symbolic(
        "com.microsoft::MatMulNBits", (x, packed, scales), attributes, dtype=x.dtype, shape=shape, version=1
    )
    return y if bias is None else y + bias
