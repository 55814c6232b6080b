"""What a model writes over, where nobody else sees it, made a value of its own: then all data flows along edges."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from surgeon.dataflow import call_as

aten = torch.ops.aten

SCATTERS: dict[Any, Any] = {aten.slice.Tensor: aten.slice_scatter.default, aten.select.int: aten.select_scatter.default}
"""Of an operator that shows a part of a value, the one that puts another part there."""


def write_apart(graph: fx.Graph) -> None:
    """Let what writes over a value, or a part of it, give a value of its own for all later readers.

    What others have by another name, such as an input, a weight or a view that is read later, stays written over.
    """
    for node in list(graph.nodes):
        target = _functional(node.target)
        if target is None:
            continue
        part: Any = node.args[0]
        views = _views(part)
        whole: Any = views[0].args[0] if views else part
        others = [user for user in whole.users if aliases(user) and user < node and user not in views[:1]]
        seen = any(_read_later(view, node) for view in others)
        if seen or not _alone(whole) or any(len(view.users) > 1 for view in views):
            continue
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        if target(*args, **kwargs).dtype != whole.meta["val"].dtype:  # written over, it would be rounded
            continue
        with graph.inserting_before(node):
            copies = target is aten.copy.default
            written = _copied(node) if copies else call_as(node, target, node.args, node.kwargs)
            apart = written
            for view in reversed(views):
                apart = call_as(node, SCATTERS[view.target], (view.args[0], apart, *view.args[1:]))
        whole.replace_all_uses_with(apart, lambda user, at=node: at < user)
        node.replace_all_uses_with(written)
        graph.erase_node(node)


def aliases(node: fx.Node) -> bool:
    """Whether a value is (or may be) another's memory: a view, an input, a weight, or what was written in place."""
    schema = getattr(node.target, "_schema", None)
    return schema is None or any(r.alias_info for r in schema.returns)


def _read_later(view: fx.Node, than: fx.Node) -> bool:
    """Whether a view, or a view of it, is read by what comes later."""
    return any(than < user or (aliases(user) and _read_later(user, than)) for user in view.users)


def _copied(node: Any) -> Any:
    """What is copied, in the type and the shape of what it is written over: `aten.copy` itself has no derivative."""
    place, written = node.args[:2]
    over, value = place.meta["val"], written.meta["val"]
    if value.dtype != over.dtype:
        written = call_as(node, aten.to.dtype, (written, over.dtype))
    if [*map(str, value.shape)] != [*map(str, over.shape)]:
        written = call_as(node, aten.expand_as.default, (written, place))
    return written


def _views(node: fx.Node) -> list[fx.Node]:
    """The views through which a part is seen, from the whole on."""
    if node.target not in SCATTERS:
        return []
    whole: Any = node.args[0]
    return [*_views(whole), node]


def _functional(target: Any) -> Any:
    """Of an operator that writes over its first operand, the one that gives a value of its own; else None."""
    schema: Any = getattr(target, "_schema", None)
    written = [] if schema is None else [argument.is_write for argument in schema.arguments]
    if not any(written) or any(written[1:]) or not schema.name.endswith("_"):
        return None
    packet = getattr(aten, schema.name.removeprefix("aten::")[:-1], None)
    return getattr(packet, schema.overload_name or "default", None)


def _alone(node: fx.Node) -> bool:
    """Whether a value is in memory that no input or weight is, and is read by no other name."""
    while aliases(node):
        if not node.args or not isinstance(node.args[0], fx.Node) or len(node.args[0].users) > 1:
            return False
        node = node.args[0]
    return True
