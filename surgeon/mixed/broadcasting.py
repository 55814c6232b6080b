"""Operations that need no loop over rows: a delta `[R, …]` broadcasts against what has R in place of the batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from surgeon.mixed.writing import Writing

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
PLAIN = {"add", "sub", "rsub", "mul", "div", "where", "pow", "maximum", "minimum", "masked_fill"}
"""Arithmetic that broadcasts."""


def without_dropout(node: fx.Node, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Arguments of `node` as they are in evaluation."""
    if node.target is SDPA:
        args = args[:4] + ((0.0,) if len(args) > 4 else ()) + args[5:]
        kwargs = {name: value for name, value in kwargs.items() if name != "dropout_p"}
    return args, kwargs


def _mask(node: fx.Node) -> Any:
    return node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")


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
        """`[R, …]` with ones behind R, up to the rank of the result; where it has that rank, its own one goes."""
        value = deltas[delta]
        if kept is None and ranks[delta] == rank:
            return writing.call(aten.squeeze.dim, (value, 1))
        for _ in range(rank - 1 - (ranks[delta] if kept is None else kept)):
            value = writing.call(aten.unsqueeze.default, (value, 1))
        return value

    fits = all(ranks[n] < rank or (ranks[n] == rank and n.meta["val"].shape[0] == 1) for n in own)
    if fits and (name in PLAIN or (node.target is SDPA and own == [_mask(node)])):
        mapped: Any = fx.node.map_arg((args, node.kwargs), lambda n: filled(n) if n in deltas else row(n))
        return writing.call(node.target, *without_dropout(node, *mapped))
    if name == "matmul" and own == [args[1]] and ranks[args[0]] >= 3 and ranks[own[0]] == 2:  # type: ignore[index]
        return writing.call(node.target, (row(args[0]), filled(own[0], 2)))  # type: ignore[arg-type]
    if name == "linear" and own == [*args[2:]]:
        product = writing.call(node.target, (row(args[0]), row(args[1])))  # type: ignore[arg-type]
        return writing.call(aten.add.Tensor, (product, filled(own[0])))
    if name == "layer_norm" and set(own) <= {a for a in args[2:4] if isinstance(a, fx.Node)}:
        result = writing.call(node.target, (row(args[0]), args[1], None, None, *args[4:]))  # type: ignore[arg-type]
        for operator, operand in zip((aten.mul.Tensor, aten.add.Tensor), args[2:4], strict=False):
            if isinstance(operand, fx.Node):
                value = filled(operand) if operand in deltas else row(operand)
                result = writing.call(operator, (result, value))
        return result
    return None
