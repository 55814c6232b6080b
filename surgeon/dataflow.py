"""What a node is computed from, and what is computed from it; and nodes that stand in another's place."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

from torch import fx


def descendants(node: fx.Node) -> set[fx.Node]:
    """Every node computed from `node`, not itself."""
    found: set[fx.Node] = set()
    frontier = list(node.users)
    while frontier:
        user = frontier.pop()
        if user not in found:
            found.add(user)
            frontier.extend(user.users)
    return found


def ancestors(node: fx.Node) -> set[fx.Node]:
    """`node` and every node it is computed from."""
    found = {node}
    frontier = [node]
    while frontier:
        for operand in frontier.pop().all_input_nodes:
            if operand not in found:
                found.add(operand)
                frontier.append(operand)
    return found


def writes(node: fx.Node) -> list[fx.Node]:
    """The in-place writes to the memory of `node`, in graph order: they leave its readers' operand as it is."""
    root = node
    while _shares(root) and isinstance(root.args[0], fx.Node):
        root = root.args[0]
    shared, todo = {root}, [root]
    while todo:
        for user in todo.pop().users:
            if user not in shared and _shares(user) and user.args[0] in shared:
                shared.add(user)
                todo.append(user)
    return sorted(user for user in shared if _schema(user) and _schema(user).is_mutable)


def _shares(node: fx.Node) -> bool:
    """Whether a value may lie in the memory of its first operand: views, and what writes in place."""
    schema = _schema(node)
    return node.target is operator.getitem or bool(schema and any(r.alias_info for r in schema.returns))


def _schema(node: fx.Node) -> Any:
    return getattr(node.target, "_schema", None)


def call_as(of: fx.Node, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> fx.Node:
    """A call in the name of another node, where that one's graph is being written, with the value it gives."""
    node = of.graph.call_function(target, args, dict(kwargs or {}))
    given, named = fx.node.map_arg((args, dict(kwargs or {})), lambda n: n.meta["val"])
    node.meta = {**of.meta, "val": target(*given, **named)}
    return node
