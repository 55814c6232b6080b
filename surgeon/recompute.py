"""A graph that keeps few of its values for the backward pass, and computes the others again (gradient checkpointing).

Chen et al., "Training Deep Nets with Sublinear Memory Cost" (arXiv:1604.06174), section 3: of n operations, about √n
stretches, each run again when its gradient is asked for. A stretch ends where the fewest values are still needed, which
in a Transformer is between sublayers.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import checkpoint

from surgeon.errors import SpecError

FIXED = ("placeholder", "get_attr", "output")


def recomputed(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A twin over the same tensors that gives the same values and gradients, with less memory and another forward."""
    body = [node for node in graph_module.graph.nodes if node.op not in FIXED]
    graph, new = fx.Graph(), {}
    for node in graph_module.graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            new[node] = graph.node_copy(node)
    for number, nodes in enumerate(_stretches(body)):
        takes, gives = _ends(nodes)
        call = graph.call_function(
            _again(_part(graph_module, nodes, takes, gives), number), tuple(new[n] for n in takes)
        )
        new |= {node: graph.call_function(operator.getitem, (call, i)) for i, node in enumerate(gives)}
    (output,) = graph_module.graph.find_nodes(op="output")
    graph.output(fx.map_arg(output.args[0], new.__getitem__))
    graph._codegen = graph_module.graph._codegen
    return twin(graph_module, graph)


def twin(graph_module: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    """Another graph over the very same modules and tensors: whatever changes in one changes in the other."""
    made = fx.GraphModule(graph_module, graph)
    made._modules, made._parameters, made._buffers = (
        graph_module._modules,
        graph_module._parameters,
        graph_module._buffers,
    )
    return made


def _changed(node: fx.Node) -> fx.Node | None:
    """The value that a node changes in place, as it was made. Raises SpecError where that is not the graph's own."""
    if not (isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable):
        return None
    value = node.all_input_nodes[0]
    while isinstance(value.target, torch._ops.OpOverload) and value.target._schema.arguments[0].alias_info is not None:
        value = value.all_input_nodes[0]  # a view of another, or changed before
    if value.op in FIXED:
        raise SpecError(
            f"activations cannot be computed again: the base changes what it is given in place ({node.target})",
            try_="training without gradient checkpointing",
        )
    return value


def _stretches(body: Sequence[fx.Node]) -> list[Sequence[fx.Node]]:
    """The nodes in about √n parts, each ending within its share of them where the fewest values are needed later on.

    Raises SpecError where what the graph is given is changed in place.
    """
    place = {node: i for i, node in enumerate(body)}
    needed = [0] * (len(body) + 1)  # how many values cross the gap behind each node, as differences
    for node, i in place.items():
        last = max((place.get(user, len(body)) for user in node.users), default=i)
        needed[i] += 1
        needed[last] -= 1
    crossing = list(accumulate(needed))
    for node, i in place.items():  # what is changed in place must be made anew each time
        if (value := _changed(node)) is not None:
            crossing[place[value] : i] = [len(body) + 1] * (i - place[value])
    size = math.isqrt(len(body)) or 1
    ends = [min(range(i, min(i + size, len(body))), key=crossing.__getitem__) + 1 for i in range(0, len(body), size)]
    ends = [end for end in ends[:-1] if crossing[end - 1] <= len(body)] + [len(body)]
    return [body[a:b] for a, b in zip([0, *ends], ends, strict=False)]


def _ends(nodes: Sequence[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """What a part reads of the rest, and what the rest reads of it."""
    inside = set(nodes)
    takes = dict.fromkeys(source for node in nodes for source in node.all_input_nodes if source not in inside)
    return list(takes), [node for node in nodes if not inside.issuperset(node.users)]


def _part(
    graph_module: fx.GraphModule, nodes: Sequence[fx.Node], takes: Sequence[fx.Node], gives: Sequence[fx.Node]
) -> fx.GraphModule:
    graph = fx.Graph()
    new = {node: graph.placeholder(node.name) for node in takes}
    for node in nodes:
        new[node] = graph.node_copy(node, new.__getitem__)
    graph.output(tuple(new[node] for node in gives))
    return twin(graph_module, graph)


def _again(part: fx.GraphModule, number: int) -> Callable[..., Any]:
    """Run a part so that its own values are not kept. It reads nothing but its arguments, also when run again."""

    def run(*values: Any) -> Any:
        return checkpoint(part, *values, use_reentrant=False)

    run.__name__ = run.__qualname__ = f"part_{number}"
    return run
