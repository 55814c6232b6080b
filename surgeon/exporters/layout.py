"""Linear maps as ONNX has them: `MatMul` of a matrix `[in, out]`, or one that reads the checkpoint's `[out, in]`.

A file of the build's own gets the matrices turned. They are turned as they are written, one by one: a `Transpose` in
the graph would be computed by the converter, which then holds all of them in memory twice, or by ONNX Runtime whenever
a session starts. What lies in the checkpoint's file is read as it is, by ONNX Runtime's `FusedMatMul`, which takes as
long.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from surgeon.program import Program

aten = torch.ops.aten
TURNED = "_turned"


def laid_out(graph_module: fx.GraphModule, program: Program, *, turned: bool) -> fx.GraphModule:
    """Spell linear maps by matrices of the base so that nothing is transposed when the graph is converted or loaded."""
    graph = graph_module.graph
    reads = {n: str(n.target) for n in graph.find_nodes(op="get_attr") if n.target in program.frozen}
    elsewhere = {name for node, name in reads.items() for user in node.users if not _linear(user, node)}
    for node in graph.find_nodes(op="call_function", target=aten.linear.default):
        name = reads.get(node.args[1])
        if name is None or (turned and name in elsewhere):
            continue
        x, bias = node.args[0], node.args[2] if len(node.args) > 2 else None
        if not turned:
            node.target, node.args = onnx_product, (x, node.args[1], bias)
            continue
        with graph.inserting_before(node):
            y = graph.call_function(aten.matmul.default, (x, graph.get_attr(_turn(graph_module, name))))
            result = y if bias is None else graph.call_function(aten.add.Tensor, (y, bias))
        result.meta = dict(node.meta)
        node.replace_all_uses_with(result)
        graph.erase_node(node)
    if turned:
        _turn_experts(graph_module, reads)
    graph.eliminate_dead_code()
    graph_module.recompile()
    return graph_module


def _turn_experts(graph_module: fx.GraphModule, reads: Mapping[fx.Node, str]) -> None:
    """The same for products of rows in runs, whose weights are `[experts, out, in]`."""
    graph = graph_module.graph
    for factor in graph.find_nodes(op="call_function", target=aten.transpose.int):
        name, readers = reads.get(factor.args[0]), list(factor.users)
        of_three = factor.meta["val"].dim() == 3 and {axis % 3 for axis in factor.args[1:]} == {1, 2}
        if name is None or not of_three or not all("grouped_mm" in str(reader.target) for reader in readers):
            continue
        with graph.inserting_before(factor):
            matrices = graph.get_attr(_turn(graph_module, name))
        for reader in readers:
            reader.replace_input_with(factor, matrices)


def _linear(user: fx.Node, weight: fx.Node) -> bool:
    return (
        user.target is aten.linear.default and user.args[1] is weight and weight not in (user.args[0], *user.args[2:])
    )


def _turn(graph_module: fx.GraphModule, name: str) -> str:
    """A view of a matrix with its axes turned, beside it; returns its name."""
    owner, _, leaf = name.rpartition(".")
    module = graph_module.get_submodule(owner)
    if not hasattr(module, leaf + TURNED):
        module.register_buffer(leaf + TURNED, getattr(module, leaf).detach().transpose(-1, -2))
    return name + TURNED


def onnx_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x · weightᵀ` as ONNX Runtime's operator, and the bias as an addition of its own, as other products have it."""
    shape = [*x.shape[:-1], weight.shape[0]]
    y = torch.onnx.ops.symbolic(
        "com.microsoft::FusedMatMul", (x, weight), {"transB": 1}, dtype=x.dtype, shape=shape, version=1
    )
    return y if bias is None else y + bias
