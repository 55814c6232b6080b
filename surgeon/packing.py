"""A causal graph that reads several texts in one row, each as if it were alone.

The mask that such a row comes with holds the number of each position's text, 0 where there is none. Attention then
stays within a text, and tables of positions are read from their start for each. Where positions enter through
distances alone (RoPE, ALiBi) there is nothing to do: distances within a text are what they were.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from surgeon.errors import SpecError
from surgeon.recompute import twin

aten = torch.ops.aten
VIEWS = (aten.to.device, aten.to.dtype, aten.to.dtype_layout, aten.view.default, aten.slice.Tensor)


def packed(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A twin over the same tensors that takes the numbers of texts, `[rows, length]`, as its mask.

    Raises SpecError where the mask does not reach attention as a mask of keys.
    """
    graph = fx.Graph()
    values: dict[fx.Node, Any] = {}
    graph.output(graph.graph_copy(graph_module.graph, values))
    graph._codegen = graph_module.graph._codegen
    mask = next((node for node in graph.nodes if node.op == "placeholder" and node.target == "attention_mask"), None)
    indexed = _within_texts(graph, mask) if mask is not None else 0
    if mask is None or not indexed:
        raise SpecError(
            "rows cannot be packed: attention takes no mask of the row's own tokens alone, from which to learn where a "
            "text begins",
            there_is="trained tokens before the text, or a base with another mask",
            try_="without packing",
        )
    return twin(graph_module, graph)


def _within_texts(graph: fx.Graph, texts: fx.Node) -> int:
    """Let attention stay within a text, and positions begin with it; returns how many masks that took."""
    inputs = {node.target: node for node in graph.nodes if node.op == "placeholder"}
    others = [node for name, node in inputs.items() if node is not texts]
    tables = [n for n in graph.nodes if n.target is aten.embedding.default and not _reads(n.args[1], set(others))]
    last = list(inputs.values())[-1]
    with graph.inserting_after(last):
        plain = graph.call_function(present, (texts,))
    texts.replace_all_uses_with(plain, delete_user_cb=lambda user: user is not plain)
    masks = [n for n in graph.nodes if n.target is aten.index.Tensor and _source(n.args[0]) is plain]
    for node in masks:
        _put(graph, node, same_text, texts)
    for node in tables:
        index = node.args[1]
        with graph.inserting_before(node):
            node.args = (node.args[0], graph.call_function(restarted, (index, texts)), *node.args[2:])
    return len(masks)


def _put(graph: fx.Graph, node: fx.Node, fn: Callable[[Tensor], Tensor], texts: fx.Node) -> None:
    with graph.inserting_before(node):
        node.replace_all_uses_with(graph.call_function(fn, (texts,)))
    graph.erase_node(node)


def _source(value: Any) -> Any:
    """What a value is a mere view of."""
    while isinstance(value, fx.Node) and value.target in VIEWS:
        value = value.args[0]
    return value


def _reads(value: Any, inputs: set[fx.Node]) -> bool:
    """Whether a value depends on what an input holds; its sizes do not count."""
    seen: set[fx.Node] = set()
    todo = [value]
    while todo:
        node = todo.pop()
        if not isinstance(node, fx.Node) or node in seen or node.target is aten.sym_size.int:
            continue
        if node in inputs:
            return True
        seen.add(node)
        todo += node.all_input_nodes
    return False


def present(texts: Tensor) -> Tensor:
    """The mask of a row: 1 where there is a text."""
    return (texts > 0).to(texts.dtype)


def same_text(texts: Tensor) -> Tensor:
    """`[rows, 1, length, length]`: whether a query's text is its key's."""
    return (texts[:, None, :, None] == texts[:, None, None, :]) & (texts > 0)[:, None, None, :]


def restarted(index: Tensor, texts: Tensor) -> Tensor:
    """Indices of positions `[1 or rows, length]`, from their start for each text."""
    length = texts.shape[1]
    place = torch.arange(length, device=texts.device).expand_as(texts)
    begins = torch.ones_like(texts, dtype=torch.bool)
    begins[:, 1:] = texts[:, 1:] != texts[:, :-1]
    first = torch.where(begins, place, 0).cummax(1).values
    return index.expand_as(texts).gather(1, place - first)
