"""An `ExportedProgram` that is decomposed where an operator of it has to be, and nowhere else.

Retracing a whole program, as torch does, takes as long as the rest of its conversion. Of most bases only a few nodes
have no operator of ONNX.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch.export import ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx

aten = torch.ops.aten

CASTS = (aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other, aten._to_copy.default)
IDLE = (
    *CASTS,
    aten.reshape.default,
    aten.view.default,
    aten.expand.default,
)
"""Operators that may do nothing: where they do something, ONNX has them."""


class Settled(ExportedProgram):
    """A program whose other nodes stay as they are when some are decomposed."""

    def run_decompositions(
        self, decomp_table: Any = None, decompose_custom_triton_ops: bool = False
    ) -> ExportedProgram:
        """This program itself, its nodes decomposed in place; a new one where that takes more than a node alone."""
        table = decomp_table or {}
        nodes = [node for node in self.graph.nodes if _unsettled(node, table)]
        alone = not any(map(_whole, nodes)) and all(_decompose(node, table) for node in nodes)
        _size_by_axis(self.graph)
        for spec, node in zip(self.graph_signature.output_specs, self.graph.output_node().args[0], strict=True):
            spec.arg.name = node.name
        self.graph_module.recompile()
        if alone:
            return self
        decomposed: ExportedProgram = super().run_decompositions(decomp_table, decompose_custom_triton_ops)
        return decomposed


def _size_by_axis(graph: fx.Graph) -> None:
    """Ask for sizes as onnxscript reads them: one axis, counted from the front. The last, counted from the end, would
    be a `Shape` up to axis 0, which is empty.
    """
    for node in graph.find_nodes(op="call_function", target=aten.sym_numel.default):
        (of,) = node.args
        with graph.inserting_before(node):
            sizes = [_size(graph, of, axis) for axis in range(of.meta["val"].ndim)]
            node.replace_all_uses_with(reduce(partial(_product, graph), sizes))
        graph.erase_node(node)
    for node in graph.find_nodes(op="call_function", target=aten.sym_size.int):
        of, axis = node.args
        node.args = (of, axis % of.meta["val"].ndim)


def _size(graph: fx.Graph, of: fx.Node, axis: int) -> fx.Node:
    size = graph.call_function(aten.sym_size.int, (of, axis))
    size.meta["val"] = of.meta["val"].shape[axis]
    return size


def _product(graph: fx.Graph, one: fx.Node, other: fx.Node) -> fx.Node:
    both = graph.call_function(operator.mul, (one, other))
    both.meta["val"] = one.meta["val"] * other.meta["val"]
    return both


def _whole(node: fx.Node) -> bool:
    """Whether a node takes more than itself to decompose: it writes in place, or holds a subgraph."""
    return node.op == "get_attr" or (isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable)


def _unsettled(node: fx.Node, table: Mapping[Any, Any]) -> bool:
    """Whether no ONNX operator stands for the node: it has a decomposition, writes in place, or holds a subgraph."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.op == "get_attr"
    schema = node.target._schema
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(str(node.target._name), "CompositeImplicitAutograd")
    view = composite and any(
        argument.alias_info for argument in schema.arguments
    )  # in no table; `flatten` fails on size 0
    return node.target in table or schema.is_mutable or (view and node.target not in IDLE)


def _chunks(of: Tensor, chunks: int, dim: int = 0) -> list[Tensor]:
    """`torch.chunk` by slices: onnxscript folds no split into pieces of a size that is free."""
    pieces = of.chunk(chunks, dim)
    if isinstance(of.shape[dim], int):
        return list(pieces)
    size = pieces[0].shape[dim]
    return [aten.slice.Tensor(of, dim, i * size, (i + 1) * size) for i in range(len(pieces))]


def _decompose(node: fx.Node, table: Mapping[Any, Any]) -> bool:
    """Put in a node's place what it is made of; False where that is not made of nodes alone."""
    operands = node.all_input_nodes

    def made(*values: Any) -> Any:
        given = dict(zip(operands, values, strict=True))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), given.__getitem__)
        target: Any = _chunks if node.target is aten.chunk.default else node.target
        return target(*args, **kwargs)

    values = [n.meta["val"] for n in operands]
    creates = not any(isinstance(value, Tensor) for value in values)  # of sizes alone: its value is to be a fake too
    with (creates and detect_fake_mode(node.meta["val"])) or nullcontext():
        body = make_fx(made, decomposition_table=table)(*values).graph
    if any(map(_whole, body.nodes)):
        return False
    graph = node.graph
    with graph.inserting_before(node):
        found: Any = graph.graph_copy(body, dict(zip(body.find_nodes(op="placeholder"), operands, strict=True)))
    if isinstance(found, fx.Node):
        node.replace_all_uses_with(found)
    else:  # each of several results has its reader
        for reader in list(node.users):
            at: Any = reader.args[1]
            reader.replace_all_uses_with(found[at])
            graph.erase_node(reader)
    graph.erase_node(node)
    return True
