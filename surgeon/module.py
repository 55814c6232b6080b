"""From a rewritten graph to something that runs: dropout that follows `.train()` and `.eval()`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

aten = torch.ops.aten


class SwitchableAttention(nn.Module):
    """SDPA whose dropout is active in training only."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(  # noqa: PLR0917 - the signature of the operator it stands for
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        return nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=attn_mask,
            dropout_p=self.p if self.training else 0.0,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )


class Either(nn.Module):
    """What the graph returns: one value in training, another in evaluation."""

    def forward(self, training: Tensor, evaluation: Tensor) -> Tensor:
        return training if self.training else evaluation


def copied(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Another graph over the same tensors."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(graph_module.graph, {}))
    graph._codegen = graph_module.graph._codegen
    copy = fx.GraphModule(graph_module, graph)
    copy.meta.update(graph_module.meta)
    return copy


def switchable(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy of the graph over the same tensors, in which dropout is a module that reads `training`."""
    root = copied(graph_module)
    for node in list(root.graph.nodes):
        if node.target is aten.dropout.default:
            _make_switchable(root, node, nn.Dropout(float(node.args[1])), (node.args[0],), {})
        elif node.target is aten.scaled_dot_product_attention.default:
            _switch_attention(root, node)
    root.graph.lint()
    root.recompile()
    return root


def _switch_attention(root: fx.GraphModule, node: fx.Node) -> None:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    arguments = dict(zip(names, node.args, strict=False)) | node.kwargs
    p = arguments.pop("dropout_p", 0.0)
    if p:
        operands = tuple(arguments.pop(n) for n in ("query", "key", "value"))
        _make_switchable(root, node, SwitchableAttention(float(p)), operands, arguments)  # type: ignore[arg-type]


def _make_switchable(
    root: fx.GraphModule,
    node: fx.Node,
    module: nn.Module,
    args: tuple[fx.node.Argument, ...],
    kwargs: dict[str, fx.node.Argument],
) -> None:
    name = f"{type(module).__name__}_p{module.p:g}".replace(".", "_")
    if not hasattr(root, name):
        root.add_submodule(name, module)
    with root.graph.inserting_before(node):
        switched = root.graph.call_module(name, args, kwargs)
    switched.meta = dict(node.meta)
    node.replace_all_uses_with(switched)
    root.graph.erase_node(node)


def place(graph_module: fx.GraphModule, device: torch.device) -> None:
    """Let what a graph makes itself, such as positions, be made on `device`: a trace has written its own into it."""

    def moved(argument: Any) -> Any:
        return device if isinstance(argument, torch.device) else argument

    for node in graph_module.graph.nodes:
        node.args, node.kwargs = tree_map(moved, node.args), tree_map(moved, node.kwargs)
    graph_module.recompile()
