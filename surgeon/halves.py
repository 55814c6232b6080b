"""An encoder-decoder that writes, cut in two after surgery: the encoder runs once a source, the decoder once a token.

The cut is where the decoder reads of the source: the keys and values of its cross-attention, which come out of the
encoder's half, and the mask over the source's columns as the passes left it. So whatever acts in the encoder, or on
the way to those keys and values, acts once; what acts behind them, a prefix of the cross-attention say, acts at every
token. No technique knows of it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from surgeon.cached import CROSS
from surgeon.dataflow import writes
from surgeon.errors import TraceError
from surgeon.inputs import Input
from surgeon.program import Program

SOURCE, MASK = "source", "source_mask"
"""The axis of the source's columns, those of a task's own tokens among them; and the mask over them."""
SIZE = torch.ops.aten.sym_size.int


@dataclass(frozen=True)
class Halves:
    """Two programs with one ledger, over the same tensors."""

    encoder: Program
    decoder: Program

    @property
    def bridge(self) -> tuple[Input, ...]:
        """What the encoder gives and the decoder takes: the mask, then keys and values, layer after layer."""
        return tuple(i for i in self.decoder.inputs if SOURCE in i.axes)


def halves(program: Program) -> Halves:
    """Cut an encoder-decoder that generates. Raises TraceError where its decoder reads more of the source."""
    program.propagate()  # passes may have made the source longer
    results = _results(program)
    cut = {n: node for n, node in results.items() if n.startswith(f"{CROSS}_")}
    mask = next((n for n in program.graph.nodes if n.op == "placeholder" and n.name == "attention_mask"), None)
    if mask is not None:
        cut = {MASK: program.current(mask), **cut}
    bridge = [_input(name, node.meta["val"]) for name, node in cut.items()]
    of_source = [i for i in program.inputs if i.name in {"input_ids", "attention_mask"}]
    of_text = [i for i in program.inputs if i not in of_source]
    rest = {name: node for name, node in results.items() if name == "logits" or name in program.presents}
    return Halves(
        _half(program, of_source, {}, cut),
        _half(program, [*of_text, *bridge], {node: name for name, node in cut.items()}, rest),
    )


def _results(program: Program) -> dict[str, fx.Node]:
    """What the graph returns, by name."""
    spec = program.graph._codegen.pytree_info.out_spec  # type: ignore[attr-defined]
    places = pytree.tree_unflatten(range(spec.num_leaves), spec)
    values = program.output.args[0]
    return {name: values[at] for name, at in places.items()}  # type: ignore[index, misc]


def _input(name: str, value: Tensor) -> Input:
    """What crosses the cut, as an input: `[batch, columns]`, or `[batch, heads, columns, width]`."""
    if value.dim() == 2:
        return Input(name, ("batch", SOURCE), 1, value.dtype)
    return Input(name, ("batch", int(value.shape[1]), SOURCE, int(value.shape[3])), 0, value.dtype)


def _half(
    program: Program, inputs: Sequence[Input], cut: Mapping[fx.Node, str], results: Mapping[str, fx.Node]
) -> Program:
    """The part of the graph from `inputs`, and from what was `cut`, to `results`."""
    given = {n: n.name for n in program.graph.nodes if n.op == "placeholder" and n.name in {i.name for i in inputs}}
    given |= cut
    part = _Part(program, given)
    graph = part.write(inputs, results)
    info = program.graph._codegen.pytree_info  # type: ignore[attr-defined]
    codegen = copy.copy(program.graph._codegen)
    names = [i.name for i in inputs]
    codegen.pytree_info = info._replace(  # type: ignore[attr-defined]
        orig_args=names,
        in_spec=pytree.tree_structure(((), dict.fromkeys(names, 0))),
        out_spec=pytree.tree_structure(dict.fromkeys(results, 0)),
    )
    graph._codegen = codegen
    module = fx.GraphModule(program.graph_module, graph)
    return replace(program, graph_module=module, inputs=tuple(inputs), _current={}, _edges={})


class _Part:
    """A part of a graph, written anew."""

    def __init__(self, program: Program, given: Mapping[fx.Node, str]) -> None:
        self.program, self.given = program, given
        self._sizes: dict[object, tuple[fx.Node, int]] = {}
        for node in given:
            for axis, size in enumerate(node.meta["val"].shape):
                if isinstance(size, torch.SymInt):
                    self._sizes.setdefault(size.node.expr, (node, axis))

    def write(self, inputs: Sequence[Input], results: Mapping[str, fx.Node]) -> fx.Graph:
        """What `results` need, in the graph's own order."""
        graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
        for i in inputs:
            node = graph.placeholder(i.name)
            for before in [before for before, name in self.given.items() if name == i.name]:
                env[before] = node
                node.meta = dict(before.meta)
        needed = self._needed(results.values())
        for before in self.program.graph.nodes:
            if before in env or before not in needed:
                continue
            place = self._place(before)
            if place is not None:
                env[before] = graph.call_function(SIZE, (env[place[0]], place[1]))
                env[before].meta = dict(before.meta)
            else:
                env[before] = graph.node_copy(before, env.__getitem__)
        graph.output(tuple(env[node] for node in results.values()))
        return graph

    def _needed(self, results: Iterable[fx.Node]) -> set[fx.Node]:
        found: set[fx.Node] = set()
        todo = list(results)
        while todo:
            node = todo.pop()
            if node in found or node in self.given:
                continue
            if node.op == "placeholder":
                raise TraceError(
                    f"this model's decoder reads '{node.name}' otherwise than by the keys and values of its attention",
                    try_="`export: {generate: false}`, which answers for a whole text in one pass",
                )
            found.add(node)
            if self._place(node) is None:
                todo += [*node.all_input_nodes, *writes(node)]
        return found

    def _place(self, node: fx.Node) -> tuple[fx.Node, int] | None:
        """Where a size stands that is one of what is given: the whole graph reads it wherever it comes first."""
        value = node.meta.get("val")
        if node.target is not SIZE or not isinstance(value, torch.SymInt):
            return None
        return self._sizes.get(value.node.expr)
