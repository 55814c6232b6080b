"""Rotations of queries and keys by their positions (RoPE) as one operator of ONNX Runtime each.

    x·cos + (-x₂ ; x₁)·sin      x = (x₁ ; x₂), and both halves of cos and of sin alike

Whatever computes the angles stays in the graph: the operator's tables are the angles of this very batch, a row a token.
Su et al., "RoFormer" (arXiv:2104.09864), section 3.4, in the form that transformers' models have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten


def turned(graph_module: fx.GraphModule, turn: Callable[..., Tensor] | None = None) -> fx.GraphModule:
    """Let every rotation be the operator, in place."""
    graph, made = graph_module.graph, dict[fx.Node, fx.Node]()

    def once(fn: Callable[[Tensor], Tensor], angle: fx.Node, before: fx.Node) -> fx.Node:
        """What a function makes of angles, computed once for all layers."""
        if angle not in made:
            with graph.inserting_before(before):
                made[angle] = graph.call_function(fn, (angle,))
            made[angle].meta["val"] = angle.meta["val"]
        return made[angle]

    for node in list(graph.nodes):
        parts = _parts(node)
        if parts is not None:
            x, cos, sin = parts
            tables = (cos, sin) if turn else tuple(once(table, angle, node) for angle in (cos, sin))
            node.target, node.args, node.kwargs = turn or onnx_turn, (x, *tables), {}
    graph.eliminate_dead_code()
    graph_module.recompile()
    return graph_module


def table(angle: Tensor) -> Tensor:
    """Angles `[rows, 1, tokens, width]` as a table `[rows · tokens, width / 2]`."""
    return angle[:, 0, :, : angle.shape[-1] // 2].flatten(0, 1)


def onnx_turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The operator; token t of row r finds its angles in row r · tokens + t of the tables."""
    places = (torch.ones_like(cos[:, 0], dtype=torch.int64).cumsum(0) - 1).view(x.shape[0], x.shape[2])
    attributes: dict[str, Any] = {"interleaved": 0, "num_heads": 0, "rotary_embedding_dim": 0}
    y: Tensor = torch.onnx.ops.symbolic(
        "com.microsoft::RotaryEmbedding", (x, places, cos, sin), attributes, dtype=x.dtype, shape=x.shape, version=1
    )
    return y


def torch_turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """What the operator computes: of the angles it reads the first half."""
    (a, b), half = x.chunk(2, -1), x.shape[-1] // 2
    c, s = cos[..., :half], sin[..., :half]
    return torch.cat([a * c - b * s, b * c + a * s], -1)


def _parts(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """What is turned, and by which angles, where a node is a rotation."""
    if node.target is not aten.add.Tensor or len(node.args) != 2 or node.kwargs:
        return None
    plain: Any
    other: Any
    plain, other = node.args
    if not (_is(plain, aten.mul.Tensor) and _is(other, aten.mul.Tensor)):
        return None
    (x, cos), (swapped, sin) = plain.args, other.args
    if not _is(swapped, aten.cat.default) or swapped.args[1:] != (-1,) or len(swapped.args[0]) != 2:
        return None
    negative, first = swapped.args[0]
    second: Any = negative.args[0] if _is(negative, aten.neg.default) else None
    if not (_is(first, aten.slice.Tensor) and _is(second, aten.slice.Tensor) and _fits(x, cos) and _fits(x, sin)):
        return None
    half = x.meta["val"].shape[-1] // 2
    halves = first.args[:4] == (x, 3, 0, half) and second.args[:3] == (x, 3, half)
    return (x, cos, sin) if halves else None


def _fits(x: Any, angle: Any) -> bool:
    """Whether there is an angle for every feature of every token, the same in all heads."""
    if not (isinstance(x, fx.Node) and isinstance(angle, fx.Node)):
        return False
    turned_shape, shape = ([str(size) for size in n.meta["val"].shape] for n in (x, angle))
    same = len(shape) == 4 == len(turned_shape) and [shape[i] for i in (0, 2, 3)] == [
        turned_shape[i] for i in (0, 2, 3)
    ]
    return same and shape[1] == "1" and int(turned_shape[3]) % 2 == 0


def _is(node: Any, target: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is target
