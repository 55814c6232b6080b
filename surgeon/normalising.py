"""The one form of a fresh trace that anatomy and passes read: flat, by the checkpoint's names, undisguised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from surgeon.errors import TraceError

aten = torch.ops.aten


def normalise(graph_module: fx.GraphModule, model: torch.nn.Module) -> None:
    """Bring a fresh trace into the one form that anatomy and passes read."""
    for node in list(graph_module.graph.nodes):
        if (node.op == "call_module" and node.target == "_guards_fn") or node.target in (
            aten._assert_tensor_metadata.default,
            aten._assert_scalar.default,
        ):
            graph_module.graph.erase_node(node)
    _inline_grad_blocks(graph_module)
    _refuse_transforms(graph_module)
    _write_apart(graph_module.graph)
    _rows_before_columns(graph_module.graph)
    _canonical_names(graph_module, _checkpoint_names(model))
    # What nothing reads is no part of the model, though it draws a dropout.
    graph_module.graph.eliminate_dead_code(lambda node: node.is_impure(impure_random=False))
    graph_module.delete_all_unused_submodules()
    graph_module.graph.lint()
    graph_module.recompile()


def _inline_grad_blocks(graph_module: fx.GraphModule) -> None:
    """Replace `wrap_with_set_grad_enabled(flag, block, *args)` by the block's own nodes."""
    for node in list(graph_module.graph.nodes):
        if node.target is not torch.ops.higher_order.wrap_with_set_grad_enabled:
            continue
        block = graph_module.get_submodule(node.args[1].target)
        assert isinstance(block, fx.GraphModule)
        with graph_module.graph.inserting_before(node):
            places = iter(node.args[2:])
            env = {inner: next(places) for inner in block.graph.nodes if inner.op == "placeholder"}
            result = graph_module.graph.graph_copy(block.graph, env)
        outputs = result if isinstance(result, (tuple, list)) else (result,)
        for user in list(node.users):
            user.replace_all_uses_with(outputs[user.args[1]])
            graph_module.graph.erase_node(user)
        graph_module.graph.erase_node(node)


def _refuse_transforms(graph_module: fx.GraphModule) -> None:
    """Raise TraceError where the exporter left a transform of functions in the graph, which no operator stands for."""
    for node in graph_module.graph.nodes:
        if "torch._functorch" in str(getattr(node.target, "__module__", "")):
            raise TraceError(
                f"torch.export leaves a vmap in its graph, by {node.target.__name__}: no operator stands for it",
                where=str(node),
                try_="a model that makes its masks without torch.vmap",
            )


def _write_apart(graph: fx.Graph) -> None:
    """Let what writes over a value that nobody has by another name give a value of its own, for all later readers."""
    for node in list(graph.nodes):
        target = _functional(node.target)
        if target is None:
            continue
        operand = node.args[0]
        if not _alone(operand) or any(_aliases(user) for user in operand.users if user < node):
            continue
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        if target(*args, **kwargs).dtype != operand.meta["val"].dtype:  # written over, it would be rounded
            continue
        with graph.inserting_before(node):
            apart = graph.call_function(target, node.args, node.kwargs)
        apart.meta = dict(node.meta)
        operand.replace_all_uses_with(apart, lambda user, at=node: at < user)
        node.replace_all_uses_with(apart)
        graph.erase_node(node)


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
    while _aliases(node):
        if not node.args or not isinstance(node.args[0], fx.Node) or len(node.args[0].users) > 1:
            return False
        node = node.args[0]
    return True


def _aliases(node: fx.Node) -> bool:
    """Whether a value is (or may be) another's memory: a view, an input, a weight, or what was written in place."""
    schema = getattr(node.target, "_schema", None)
    return schema is None or any(r.alias_info for r in schema.returns)


def _rows_before_columns(graph: fx.Graph) -> None:
    """Give keys that one `permute` lays out as columns, `[B, heads, d, S]`, their rows first and transpose these.

    What acts on keys finds them as `[B, heads, S, d]` in every model then.
    """
    for node in graph.find_nodes(op="call_function", target=aten.permute.default):
        axes = [axis % len(node.args[1]) for axis in node.args[1]]
        products = [u for u in node.users if u.target in (aten.matmul.default, aten.bmm.default) and u.args[1] is node]
        if len(axes) != 4 or axes[0] != 0 or axes[-2:] != [3, 1] or not products:
            continue
        with graph.inserting_before(node):
            rows = graph.call_function(aten.permute.default, (node.args[0], [*axes[:2], axes[3], axes[2]]))
            columns = graph.call_function(aten.transpose.int, (rows, -1, -2))
        columns.meta = dict(node.meta)
        rows.meta = {**node.meta, "val": node.meta["val"].transpose(-1, -2)}
        node.replace_all_uses_with(columns)
        graph.erase_node(node)


def _checkpoint_names(model: torch.nn.Module) -> Mapping[int, str]:
    """For each parameter and buffer (by identity) the first name it is registered under."""
    names: dict[int, str] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        names.setdefault(id(tensor), name)
    return names


def _canonical_names(graph_module: fx.GraphModule, names: Mapping[int, str]) -> None:
    """Let every `get_attr` read a tied weight under its checkpoint name.

    torch.export keeps one node per alias and lets only the last registered one have users.
    """
    for node in graph_module.graph.nodes:
        if node.op != "get_attr":
            continue
        tensor: Any = graph_module
        for part in node.target.split("."):
            tensor = getattr(tensor, part)
        wanted = names.get(id(tensor))
        if wanted and wanted != node.target:
            owner, _, leaf = wanted.rpartition(".")
            module = graph_module
            for part in filter(None, owner.split(".")):
                if not hasattr(module, part):
                    module.add_module(part, torch.nn.Module())
                module = getattr(module, part)
            if not hasattr(module, leaf):
                if isinstance(tensor, torch.nn.Parameter):
                    module.register_parameter(leaf, tensor)
                else:
                    module.register_buffer(leaf, tensor)
            node.target = wanted
