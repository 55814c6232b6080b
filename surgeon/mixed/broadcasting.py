"""Operations that need no loop over rows: a delta `[R, …]` broadcasts against what has R in place of the batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from surgeon.mixed.writing import Writing

aten = torch.ops.aten
PLAIN = {"add", "sub", "rsub", "mul", "div", "where", "pow", "maximum", "minimum", "masked_fill"}
"""Arithmetic that broadcasts."""


def broadcast(
    writing: Writing, node: fx.Node, deltas: Mapping[fx.Node, fx.Node], row: Callable[[fx.Node], Any]
) -> fx.Node | None:
    """The operation of `node`, whose first axis is the batch; None where broadcasting does not give it.

    `deltas` are its operands that are deltas, each as `[R, …]`; `row` gives the others, with R in place of the batch.
    """
    name = str(node.target).split(".")[1]
    args, own = node.args, list(deltas)
    rank = node.meta["val"].dim() if isinstance(node.meta["val"], Tensor) else 0
    ranks = {n: n.meta["val"].dim() for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)}

    def filled(delta: fx.Node, kept: int | None = None) -> fx.Node:
        """`[R, …]` with ones behind R, up to the rank of the result."""
        value = deltas[delta]
        for _ in range(rank - 1 - (ranks[delta] if kept is None else kept)):
            value = writing.call(aten.unsqueeze.default, (value, 1))
        return value

    if name in PLAIN and all(ranks[n] < rank for n in own):
        mapped: Any = fx.node.map_arg((args, node.kwargs), lambda n: filled(n) if n in deltas else row(n))
        return writing.call(node.target, *mapped)
    if name == "matmul" and own == [args[1]] and ranks[args[0]] >= 3 and ranks[own[0]] == 2:  # type: ignore[index]
        return writing.call(node.target, (row(args[0]), filled(own[0], 2)))  # type: ignore[arg-type]
    if name == "linear" and own == [*args[2:]] and own:
        product = writing.call(node.target, (row(args[0]), row(args[1])))  # type: ignore[arg-type]
        return writing.call(aten.add.Tensor, (product, filled(own[0])))
    if name == "layer_norm" and set(own) == {a for a in args[2:4] if isinstance(a, fx.Node)}:
        normed = writing.call(node.target, (row(args[0]), args[1], None, None, *args[4:]))  # type: ignore[arg-type]
        scaled = writing.call(aten.mul.Tensor, (normed, filled(args[2])))  # type: ignore[arg-type]
        if len(args) < 4 or args[3] is None:
            return scaled
        return writing.call(aten.add.Tensor, (scaled, filled(args[3])))  # type: ignore[arg-type]
    return None
