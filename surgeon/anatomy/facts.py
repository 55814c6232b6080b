"""First step of anatomy: facts about every node that all later steps read, computed in one pass.

A value is an *activation* when it carries model features: an embedding's output, a floating input, and all that
follows. Masks, positions and cos/sin tables are none, so a walk along activations never strays into them. A value
is *fixed* when no input reaches it: weights, and what is computed of weights and sizes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.fx import Node

from surgeon.anatomy.shapes import rank, shape, shapes_match, swaps_last

RESHAPES = frozenset({"view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as"})
CASTS = frozenset({"to", "type_as", "_to_copy", "contiguous", "clone", "alias", "detach", "lift_fresh_copy"})
LAYOUTS = RESHAPES | CASTS | {"transpose", "permute", "t", "numpy_T", "unsqueeze", "squeeze", "expand", "expand_as"}
PRODUCTS = frozenset({"matmul", "mm", "bmm", "baddbmm", "einsum"})
CONVOLUTIONS = frozenset({"conv1d", "conv2d", "convolution"})
NONLINEARITIES = frozenset(
    [
        "gelu",
        "silu",
        "relu",
        "relu6",
        "tanh",
        "sigmoid",
        "erf",
        "exp",
        "softplus",
        "hardswish",
        "hardsigmoid",
        "elu",
        "selu",
        "celu",
        "leaky_relu",
        "mish",
        "pow",
        "square",
        "log_sigmoid",
        "hardtanh",
    ]
)


@dataclass(frozen=True)
class Weight:
    """A parameter behind an operand: its `get_attr`, and whether the operand reads it transposed."""

    node: Node
    transposed: bool
    chosen: bool
    """One of a bank of weights, picked by an index: an expert's."""
    index: Node | None
    """The index, where it is computed."""


class Facts:
    """Data flow of a graph: real inputs and users, activations, fixed values, reachability as bit sets."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        self.nodes: list[Node] = list(graph_module.graph.nodes)
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self.op = {node: _op(node) for node in self.nodes}
        self._named: dict[str, set[Node]] = {}
        self.probed: dict[str, tuple[int, ...]] = {}
        """What `features` has found, by the text of the piece it ran."""
        self.inputs, self._storage = _inputs(self.nodes)
        self.users: dict[Node, list[Node]] = {node: [] for node in self.nodes}
        for node, inputs in self.inputs.items():
            for source in inputs:
                self.users[source].append(node)
        self.parameters: dict[Node, frozenset[str]] = {}
        self.fixed: set[Node] = set()
        self.activations: set[Node] = set()
        for node in self.nodes:
            self._classify(node)
        self.above = self._reach(self.nodes, self.inputs)
        self.below = self._reach(reversed(self.nodes), self.users)

    def named(self, op: str) -> set[Node]:
        """The nodes of an operator."""
        if op not in self._named:
            self._named[op] = {node for node in self.nodes if self.op[node] == op}
        return self._named[op]

    def _classify(self, node: Node) -> None:
        inputs = self.inputs[node]
        is_parameter = node.op == "get_attr" and isinstance(self.tensor(node), torch.nn.Parameter)
        own = {str(node.target)} if is_parameter else set()
        self.parameters[node] = frozenset(own.union(*(self.parameters[i] for i in inputs if i in self.fixed)))
        embeds = self.op[node] == "embedding"
        if node.op != "placeholder" and not embeds and all(i in self.fixed for i in inputs):
            self.fixed.add(node)
        source = embeds or node.op == "placeholder" or any(i in self.activations for i in inputs)
        if source and _floating(node):
            self.activations.add(node)

    def _reach(self, order: Iterable[Node], edges: dict[Node, tuple[Node, ...]] | dict[Node, list[Node]]) -> list[int]:
        reach = [0] * len(self.nodes)
        for node in order:
            if node in self.activations:
                for other in edges[node]:
                    if other in self.activations:
                        reach[self.position[node]] |= reach[self.position[other]] | self.bit(other)
        return reach

    # Sets of nodes are integers, one bit a node.

    def bit(self, node: Node) -> int:
        """The set holding `node` alone."""
        return 1 << self.position[node]

    def bits(self, nodes: Iterable[Node]) -> int:
        """The set of `nodes`."""
        return sum(self.bit(node) for node in set(nodes))

    def members(self, bits: int) -> Iterator[Node]:
        """The nodes of a set, in graph order."""
        while bits:
            low = bits & -bits
            yield self.nodes[low.bit_length() - 1]
            bits ^= low

    def interval(self, start: Node, end: Node) -> int:
        """The nodes on a way from `start` (left out) to `end` (counted in)."""
        return self.below[self.position[start]] & (self.above[self.position[end]] | self.bit(end))

    def is_above(self, node: Node, other: Node) -> bool:
        """Whether activations flow from `node` to `other`."""
        return bool(self.above[self.position[other]] & self.bit(node))

    # Reading nodes.

    def tensor(self, node: Node) -> Tensor:
        """The tensor that a `get_attr` reads."""
        value = self.graph_module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        assert isinstance(value, Tensor)
        return value

    def flow(self, node: Node) -> list[Node]:
        """The activations that `node` reads."""
        return [i for i in self.inputs[node] if i in self.activations]

    def only_user(self, node: Node) -> Node | None:
        """The single reader of `node`, or None."""
        users = self.users[node]
        return users[0] if len(users) == 1 else None

    def written(self, reader: Node, operand: Node) -> Node:
        """The last in-place write to `operand` before `reader` reads it, or `operand` itself."""
        late = [i for i in self.inputs[reader] if i not in reader.all_input_nodes]
        return next((i for i in late if self._storage[i] is self._storage[operand]), operand)

    def weight(self, operand: Node) -> Weight | None:
        """The one parameter that `operand` is, through views, casts and scaling by numbers; None for a mixture."""
        transposed = chosen = False
        index: Node | None = None
        node = operand
        while node.op != "get_attr":
            op = self.op[node]
            if op in {"index", "select", "index_select"}:
                chosen, index = True, _picked_by(node)
            elif op in {"t", "numpy_T"} or (op == "transpose" and swaps_last(node)) or op == "permute":
                transposed = not transposed
            elif op not in LAYOUTS and not (op in {"mul", "div", "add"} and len(self.inputs[node]) == 1):
                return None
            if not self.inputs[node]:
                return None
            node = self.inputs[node][0]
        return Weight(node, transposed, chosen, index) if self.parameters[node] else None

    def vector(self, operand: object, width: int | str) -> Node | None:
        """The `get_attr` of the parameter `[width]` that `operand` is, or None."""
        if not isinstance(operand, Node) or operand not in self.fixed:
            return None
        weight = self.weight(operand)
        return weight.node if weight and shape(weight.node)[-1:] == (width,) and rank(weight.node) == 1 else None

    def sources(self, node: Node) -> set[Node]:
        """All that `node` is computed of, activations or not."""
        todo, seen = [node], {node}
        while todo:
            fresh = [i for i in self.inputs[todo.pop()] if i not in seen]
            seen.update(fresh)
            todo.extend(fresh)
        return seen

    def strip(self, node: Node, barriers: Collection[Node] = ()) -> Node:
        """Walk back over what leaves a stream the same stream: dropout, casts, reshapes, scaling.

        Stops at any of `barriers`.
        """
        while node not in barriers:
            op, flow = self.op[node], self.flow(node)
            same = op in {"dropout", *CASTS, *RESHAPES} or (op == "slice" and shapes_match(node, flow[0]))
            shifts = op == "add" and len(self.inputs[node]) == 2 and bool(self.inputs[node][1] in self.fixed)
            if (op in {"mul", "div"} or shifts) and len(flow) == 1:
                same = shapes_match(node, flow[0])
            if not same or len(flow) != 1:
                break
            node = flow[0]
        return node

    def nearest_above(self, start: Node, wanted: Collection[Node], barriers: Collection[Node] = ()) -> list[Node]:
        """The first of `wanted` on every way back from `start`, itself included, in graph order."""
        return self._nearest(start, wanted, barriers, self.flow)

    def nearest_below(self, start: Node, wanted: Collection[Node], barriers: Collection[Node] = ()) -> list[Node]:
        """The first of `wanted` on every way forward from `start`, itself included, in graph order."""
        return self._nearest(start, wanted, barriers, lambda n: [u for u in self.users[n] if u in self.activations])

    def _nearest(
        self, start: Node, wanted: Collection[Node], barriers: Collection[Node], step: Callable[[Node], list[Node]]
    ) -> list[Node]:
        found, seen, todo = [], {start}, [start]
        while todo:
            node = todo.pop()
            if node in wanted:
                found.append(node)
            elif node not in barriers:
                fresh = [n for n in step(node) if n not in seen]
                seen.update(fresh)
                todo.extend(fresh)
        return sorted(found, key=self.position.__getitem__)


def _op(node: Node) -> str:
    """Name of the operator without namespace and overload; an in-place one is its functional twin."""
    if node.op != "call_function":
        return node.op
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return getattr(node.target, "__name__", str(node.target))
    name: str = schema.name.split("::")[-1]
    return name[:-1] if _writes(node) and name.endswith("_") and not name.endswith("__") else name


def _picked_by(node: Node) -> Node | None:
    """The computed index by which `index`, `index_select` or `select` picks along the first axis; None for a number."""
    chosen = node.args[-1]
    if isinstance(chosen, (list, tuple)) and len(chosen) == 1:
        chosen = chosen[0]
    return chosen if isinstance(chosen, Node) else None


def _writes(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return bool(schema and schema.arguments and (alias := schema.arguments[0].alias_info) and alias.is_write)


def _inputs(nodes: list[Node]) -> tuple[dict[Node, tuple[Node, ...]], dict[Node, Node]]:
    """The tensors each node reads, with the last in-place write to a tensor's storage as one more input; the storages.

    Readers of a buffer name the buffer's own node, not its writer's: without this the data flow breaks there.
    """
    storage: dict[Node, Node] = {}
    writer: dict[Node, Node] = {}
    inputs: dict[Node, tuple[Node, ...]] = {}
    for node in nodes:
        read = [i for i in node.all_input_nodes if _holds_tensor(i)]
        written = [w for i in read if (w := writer.get(storage[i])) is not None and w not in read]
        inputs[node] = tuple(dict.fromkeys([*read, *written]))
        schema = getattr(node.target, "_schema", None)
        aliases = schema is not None and any(r.alias_info for r in schema.returns)
        first = node.args[0] if node.args else None
        views = isinstance(first, Node) and first in storage and (aliases or _op(node) == "getitem")
        storage[node] = storage[first] if views and isinstance(first, Node) else node
        if _writes(node) and views:
            writer[storage[node]] = node
    return inputs, storage


def _values(node: Node) -> list[object]:
    value = node.meta.get("val")
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _holds_tensor(node: Node) -> bool:
    return node.op == "get_attr" or any(isinstance(v, Tensor) for v in _values(node))


def _floating(node: Node) -> bool:
    return any(isinstance(v, Tensor) and (v.is_floating_point() or v.is_complex()) for v in _values(node))
