"""Where a graph turns token positions into a table row or an angle, and how to move them.

Found by value, not by name: the integer part of the graph is run on a small probe, and an operand whose rows read
c, c + 1, c + 2, … is one of positions (word ids are random, token types constant, relative buckets no ramp).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from surgeon.dataflow import ancestors, descendants
from surgeon.inputs import sample_inputs
from surgeon.ledger import Delta
from surgeon.program import Program

ANGLES = (torch.ops.aten.cos.default, torch.ops.aten.sin.default)


def shift_positions(program: Program, stack: str, prefix: Delta) -> None:
    """Add the length of `prefix` (its axis -2) to every position operand of `stack`."""
    live = program.live(prefix, -2)
    moved: dict[fx.Node, fx.Node] = {}
    for reader, operand in list(position_operands(program, stack)):
        source = _behind_cumsum(operand)
        if source not in moved:
            moved[source] = program.insert(_moved, [program.current(source), live])
            if source is not operand:
                for user in [u for u in source.users if u is not moved[source]]:
                    user.replace_input_with(source, moved[source])
        if source is operand:
            reader.replace_input_with(operand, moved[source])


def _moved(positions: Tensor, live: Tensor) -> Tensor:
    return positions + live.sum(-1, keepdim=True).to(positions.dtype)


def position_operands(program: Program, stack: str) -> Iterator[tuple[fx.Node, fx.Node]]:
    """(reader, operand) pairs: indices of embeddings and constant tables, and integers on their way to cos and sin."""
    values = _Probe(program)
    angles = set().union(*(ancestors(n) for n in program.graph.nodes if n.target in ANGLES), set())
    for node in program.graph.nodes:
        for operand in _candidates(node, angles):
            ramp = values.of(operand)
            axis = None if ramp is None else ramp_axis(ramp)
            # What counts the places of a fixed size, an image's, has no room for more of them.
            if axis is None or not isinstance(operand.meta["val"].shape[axis], torch.SymInt):
                continue
            if _stack_of(program, node, operand, axis) == stack:
                yield node, operand


def _candidates(node: fx.Node, angles: set[fx.Node]) -> list[fx.Node]:
    aten = torch.ops.aten
    if node.target is aten.embedding.default:
        return [node.args[1]]  # type: ignore[list-item]
    if node.target in (aten.index.Tensor, aten.gather.default) and node.args[0].op == "get_attr":  # type: ignore[union-attr]
        indices = node.args[1] if isinstance(node.args[1], list | tuple) else [node.args[2]]
        return [i for i in indices if isinstance(i, fx.Node)]
    if node in angles and node.op == "call_function" and node.all_input_nodes:
        operand, value = node.all_input_nodes[0], node.meta.get("val")
        before = operand.meta.get("val")
        if (
            isinstance(value, Tensor)
            and isinstance(before, Tensor)
            and value.is_floating_point()
            and not before.is_floating_point()
        ):
            return [operand]
    return []


def ramp_axis(t: Tensor) -> int | None:
    """The axis along which an integer tensor rises by exactly one, if there is one of at least four."""
    if t.is_floating_point() or t.dtype == torch.bool:
        return None
    for axis in range(t.dim()):
        if t.shape[axis] >= 4 and bool((t.diff(dim=axis) == 1).all()):
            return axis
    return None


def _stack_of(program: Program, reader: fx.Node, operand: fx.Node, axis: int) -> str:
    """The stack whose tokens these are positions of: the one whose input has this length.

    Where one text is read by both, the one that the positions come to first.
    """
    length = operand.meta["val"].shape[axis]
    stacks = list(program.anatomy.layers)
    decoder = [n for n in program.graph.nodes if n.op == "placeholder" and n.name == "decoder_input_ids"]
    if decoder and len(stacks) > 1:
        return "decoder" if decoder[0].meta["val"].shape[1] == length else "encoder"
    below = descendants(reader)
    return next((j.stack for j in program.anatomy.joins if program.current(j.add) in below), stacks[-1])


def _behind_cumsum(operand: fx.Node) -> fx.Node:
    """Where the base counts positions over a mask, the count itself: shifting later would move padding as well."""
    count = torch.ops.aten.cumsum.default
    counted = sorted(n for n in ancestors(operand) if n.target is count and "surgeon" not in n.meta)
    return counted[0] if counted else operand


class _Probe:
    """Evaluates the integer part of a graph on demand."""

    def __init__(self, program: Program) -> None:
        self.program = program
        vocabulary = max((e.rows for e in program.anatomy.embeddings if e.role == "embedding.token"), default=100)
        self.inputs = sample_inputs(program.inputs, vocabulary, torch.device("cpu"))
        self.known: dict[fx.Node, object] = {}

    def of(self, node: fx.Node) -> Tensor | None:
        """The value of `node`, or None where it needs weights that are not there."""
        needed = sorted(ancestors(node))
        # Of a delta, such as a prompt that lengthens the text, and of a cache only the sizes are read here.
        computed = (n.meta.get("val") for n in needed if n.op not in {"get_attr", "placeholder"})
        if any(isinstance(value, Tensor) and value.is_floating_point() for value in computed):
            return None
        for n in needed:
            if n not in self.known:
                self.known[n] = self._evaluate(n)
        value = self.known[node]
        return value if isinstance(value, Tensor) and value.device.type != "meta" else None

    def _evaluate(self, node: fx.Node) -> object:
        if node.op == "placeholder":
            return self.inputs[node.name]
        if node.op == "get_attr":
            return self.program.tensor(str(node.target))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.known.__getitem__)  # type: ignore[arg-type]
        return node.target(*args, **kwargs)  # type: ignore[operator]
