"""Which axis of a value holds its features: the last, or the first behind the batch, where convolutions work."""

from __future__ import annotations

from torch.fx import Node

from surgeon.anatomy.facts import CONVOLUTIONS, RESHAPES, Facts
from surgeon.anatomy.shapes import rank, shape
from surgeon.anatomy.weighted import WeightedOp

SPLITS = frozenset({"split", "split_with_sizes", "chunk", "tensor_split"})
"""Their pieces have all axes of the whole."""
MIXED = frozenset({"t", "numpy_T", "einsum"})


def features_axis(facts: Facts, op: WeightedOp, value: Node) -> int | None:
    """The axis on which the features of a projection stand in a value made of them; None where they are mixed."""
    axis = {op.node: 1 if facts.op[op.node] in CONVOLUTIONS else rank(op.node) - 1}
    for node in facts.members(facts.interval(op.node, value)):
        before = next((i for i in facts.flow(node) if i in axis), None)
        if before is not None and (moved := _moved(facts, node, before, axis[before])) is not None:
            axis[node] = moved
    return axis.get(value)


def _moved(facts: Facts, node: Node, before: Node, axis: int) -> int | None:
    op, old, new = facts.op[node], shape(before), shape(node)
    if op == "permute":
        order = node.args[1]
        assert isinstance(order, (list, tuple))
        return [int(a) % len(old) for a in order if isinstance(a, int)].index(axis)
    if op == "transpose":
        one, other = (int(a) % len(old) for a in node.args[1:3] if isinstance(a, int))
        return {one: other, other: one}.get(axis, axis)
    if {op, facts.op[before]} & SPLITS or (len(new) == len(old) and op not in RESHAPES | MIXED):
        return axis
    if axis == len(old) - 1:
        return len(new) - 1 if new[-1:] == old[-1:] else None
    return axis if new[: axis + 1] == old[: axis + 1] else None
