"""The one form of a fresh trace that anatomy and passes read: flat, by the checkpoint's names, undisguised."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from surgeon.einsums import spell_out
from surgeon.errors import TraceError
from surgeon.inplace import aliases, write_apart

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
    write_apart(graph_module.graph)
    spell_out(graph_module.graph)
    _rows_before_columns(graph_module.graph)
    _squeeze_by_axis(graph_module.graph)
    _last_of_each_row(graph_module.graph)
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


def _squeeze_by_axis(graph: fx.Graph) -> None:
    """Take away the axes that are of size one in every text, not those that are in one: a batch of one is a batch."""
    for node in graph.find_nodes(op="call_function", target=aten.squeeze.default):
        (of,) = node.args
        ones = [axis for axis, size in enumerate(of.meta["val"].shape) if isinstance(size, int) and size == 1]
        node.target, node.args = aten.squeeze.dims, (of, ones)


def _last_of_each_row(graph: fx.Graph) -> None:
    """Where a model takes the last of those places of a row that a mask picks, take it row by row.

    It packs what is picked, of all rows, and cuts that into as many parts as there are rows: of another number of
    places in one row all parts are wrong. The check that stands before it in its code is in no trace.
    """
    for picked in graph.find_nodes(op="call_function", target=aten.index.Tensor):
        of, masks = picked.args
        masked = [m for m in masks if m is not None and m.meta["val"].dtype is torch.bool]
        if len(masks) != 1 or not masked or of.meta["val"].ndim != 3 or masked[0].meta["val"].ndim != 2:
            continue
        for last in [n for n in _views(picked) if n.target is aten.select.int and n.args[1:] == (1, -1)]:
            body = make_fx(_last)(of.meta["val"], masked[0].meta["val"]).graph
            with graph.inserting_before(last):
                places = dict(zip(body.find_nodes(op="placeholder"), (of, masked[0]), strict=True))
                found = graph.graph_copy(body, places)
            assert isinstance(found, fx.Node)
            found.meta = {**last.meta, **found.meta}
            last.replace_all_uses_with(found)


def _last(values: Tensor, mask: Tensor) -> Tensor:
    """The last of each row's values `[B, S, d]` where the mask `[B, S]` holds, `[B, d]`; NaN where it holds nowhere."""
    place = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(1) - 1
    last = values.gather(1, place.clamp(min=0)[:, None, None].expand(-1, 1, values.shape[2])).squeeze(1)
    return torch.where((place < 0)[:, None], float("nan"), last)


def _views(node: fx.Node) -> Iterator[fx.Node]:
    """What is made of a value by its layout alone."""
    for user in node.users:
        if aliases(user) and user.args[0] is node:
            yield user
            yield from _views(user)


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
