"""Sizes of a node's value: numbers where a trace has fixed them, else symbols."""

from __future__ import annotations

from torch import Tensor
from torch.fx import Node


def shape(node: Node) -> tuple[int | str, ...]:
    """Sizes of a node's value: numbers where static, else the symbol's text. Empty for what is no tensor."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return ()
    # A size that the trace fixed stays a SymInt which prints as a number.
    return tuple(int(text) if (text := str(size)).isdigit() else text for size in value.shape)


def rank(node: Node) -> int:
    """Number of axes of a node's value."""
    return len(shape(node))


def width(node: Node) -> int | str:
    """Size of the last axis."""
    sizes = shape(node)
    return sizes[-1] if sizes else 0


def shapes_match(node: Node, other: Node) -> bool:
    """Equal shapes; two symbols count as equal, since one size may have several symbols."""
    a, b = shape(node), shape(other)
    return len(a) == len(b) and all(
        x == y or (isinstance(x, str) and isinstance(y, str)) for x, y in zip(a, b, strict=True)
    )


def swaps_last(node: Node) -> bool:
    """Whether a `transpose` or `permute` swaps the last two axes and leaves the others."""
    n = rank(node)
    axes = node.args[1] if isinstance(node.args[1], (list, tuple)) else node.args[1:3]
    order = [axis % n for axis in axes if isinstance(axis, int)]
    return set(order) == {n - 1, n - 2} if len(order) == 2 else order == [*range(n - 2), n - 1, n - 2]
