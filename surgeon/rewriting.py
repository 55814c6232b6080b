"""A traced graph under rewriting: the only functions that change its nodes.

Every value is looked up as it is *now*: passes name the nodes that anatomy found, and what stands for them after the
passes before is kept here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext
from torch.fx.node import Argument

from surgeon.bodies import Bodies
from surgeon.dataflow import ancestors, descendants, writes
from surgeon.errors import InvariantError
from surgeon.ledger import Delta
from surgeon.module import Either

LIVE = "live"
"""Key of a node's meta: the name under which mixed batches read how many entries of a free axis a row has."""


class Change(NamedTuple):
    """A value that readers have in place of another; with the defaults of these deltas the two are equal."""

    before: fx.Node
    after: fx.Node
    deltas: frozenset[str]


@dataclass(kw_only=True)
class Rewriting:
    """A graph, what became of its nodes, and the pass that is changing it."""

    graph_module: fx.GraphModule
    counted: dict[str, str] = field(default_factory=dict)
    """Names of the values that `live` gives, and the symbol of the size that each counts."""
    _current: dict[fx.Node, fx.Node] = field(default_factory=dict)
    _edges: dict[tuple[fx.Node, fx.Node], fx.Node] = field(default_factory=dict)
    _changes: list[Change] = field(default_factory=list)
    _author: tuple[str, str] = ("", "")
    _bodies: Bodies = field(default_factory=Bodies)

    @property
    def graph(self) -> fx.Graph:
        """The FX graph."""
        return self.graph_module.graph

    @property
    def output(self) -> fx.Node:
        """The graph's output node."""
        return self.graph.output_node()

    def current(self, node: fx.Node) -> fx.Node:
        """What stands for `node` now, after the passes that rewrote it."""
        while node in self._current:
            node = self._current[node]
        return node

    def replaced(self, reader: fx.Node, operand: fx.Node) -> fx.Node:
        """What `reader` read before passes put `operand` in its place: the other way round of `current`."""
        for (edge, before), result in self._edges.items():
            if edge is reader and result is operand:
                return before
        earlier = [before for before, result in self._current.items() if result is operand]
        return self.replaced(reader, earlier[0]) if earlier else operand

    def operand(self, reader: fx.Node, operand: fx.Node) -> fx.Node:
        """What `reader` reads now where it read `operand` of the base."""
        return self.current(self._edges.get((reader, operand), operand))

    @contextmanager
    def author(self, technique: str, step: str | None = None) -> Iterator[None]:
        """Stamp what is made inside with the pass that made it; a pass inside another is of the same step."""
        saved, self._author = self._author, (technique, self._author[1] if step is None else step)
        try:
            yield
        finally:
            self._author = saved

    def insert(
        self,
        fn: Callable[..., Any],
        inputs: Sequence[fx.Node],
        deltas: Sequence[Delta] = (),
        *,
        before: fx.Node | None = None,
    ) -> fx.Node:
        """Compute `fn(*inputs, *deltas)`, a plain torch function, right after the last of `inputs`; returns the result.

        With `before`, the result's first reader, it waits for what is written in place to `inputs` ahead of it. `fn`
        must broadcast over a leading batch dimension of its deltas and must not capture tensors.
        """
        fakes = [self._fake(delta) for delta in deltas]
        body = list(self._bodies.trace(fn, [node.meta["val"] for node in inputs], fakes))
        captured = [node.target for node, _ in body if node.op == "get_attr"]
        if captured:
            raise InvariantError(f"the body of '{self._author[0]}' captures constants: {captured}")
        written = [node for value in inputs for node in writes(value) if before is not None and node < before]
        anchor = max([*inputs, *written])
        if anchor.op == "placeholder":
            anchor = max(n for n in self.graph.nodes if n.op == "placeholder")
        env: dict[fx.Node, Argument] = {}
        with self.graph.inserting_before(anchor.next):
            arguments = iter([*inputs, *map(self._read, deltas, fakes)])
            for inner, value in body:
                if inner.op == "placeholder":
                    env[inner] = next(arguments)
                elif inner.op == "output":
                    (result,) = (env[last] for last in inner.all_input_nodes)
                else:
                    env[inner] = self._copy(inner, value, env, anchor)
        assert isinstance(result, fx.Node)
        return result

    def replace(
        self,
        value: fx.Node,
        fn: Callable[..., Any],
        deltas: Sequence[Delta] = (),
        *,
        also: Sequence[fx.Node] = (),
        keep: Collection[fx.Node] = (),
    ) -> fx.Node:
        """Let every reader of `value` but those in `keep` read `fn(value, *also, *deltas)` instead."""
        value = self.current(value)
        readers = [user for user in value.users if user not in keep]
        result = self.insert(fn, [value, *map(self.current, also)], deltas)
        for reader in readers:
            reader.replace_input_with(value, result)
        self._current[value] = result
        self._changes.append(Change(value, result, frozenset(delta.name for delta in deltas)))
        return result

    def replace_operand(
        self,
        readers: Collection[fx.Node],
        operand: fx.Node,
        fn: Callable[..., Any],
        deltas: Sequence[Delta] = (),
        *,
        also: Sequence[fx.Node] = (),
    ) -> fx.Node:
        """Let `readers` read `fn(operand, *also, *deltas)` in place of `operand`; others keep it."""
        edges = [(reader, self.operand(reader, operand)) for reader in readers]
        now = edges[0][1]
        if any(other is not now or now not in reader.all_input_nodes for reader, other in edges):
            raise InvariantError(f"'{operand}' is no operand of {', '.join(map(str, readers))} any more")
        result = self.insert(fn, [now, *map(self.current, also)], deltas, before=min(readers))
        for reader in readers:
            reader.replace_input_with(now, result)
            self._edges[reader, operand] = result
        self._changes.append(Change(now, result, frozenset(delta.name for delta in deltas)))
        return result

    def withdraw(self, deltas: Collection[str]) -> None:
        """Take back what was changed with none but these deltas. Raises InvariantError where one is still read."""
        gone = [change for change in self._changes if change.deltas and change.deltas <= set(deltas)]
        for before, after, _ in reversed(gone):
            after.replace_all_uses_with(before)
            self._edges = {
                (reader, operand): before if now is after else now
                for (reader, operand), now in self._edges.items()
                if now is not after or operand is not before
            }
            later = self._current.pop(after, None)
            for value in [value for value, now in self._current.items() if now is after]:
                del self._current[value]
                if later is not None:
                    self._current[value] = later
        self._changes = [change for change in self._changes if change not in gone]
        self.graph.eliminate_dead_code()
        for node in self.graph.nodes:
            if node.op == "get_attr" and node.target in deltas:
                raise InvariantError(f"'{node.target}' cannot be left out: '{node.meta['surgeon'][0]}' reads it")

    def propagate(self, among: Collection[fx.Node] | None = None) -> None:
        """Give values their shapes anew, all or those `among` them, where what they are made of has become larger and
        a body to come relies on sizes.
        """
        modes = (n.meta["val"].fake_mode for n in self.graph.nodes if isinstance(n.meta.get("val"), FakeTensor))
        with next(modes), torch.no_grad():
            for node in self.graph.nodes:
                if node.op == "call_function" and (among is None or node in among):
                    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
                    node.meta["val"] = node.target(*args, **kwargs)

    def answer(self, output: fx.Node, fn: Callable[..., Any], deltas: Sequence[Delta]) -> None:
        """Let the graph return `fn(output, *deltas)` in evaluation and when deployed, in training `output` as it is.

        In training the rows of an output may be a multiple of the texts: labels are repeated as often.
        """
        raw = self.current(self._edges.get((self.output, output), output))
        result = self.replace_operand([self.output], output, fn, deltas)
        if not hasattr(self.graph_module, "either"):
            self.graph_module.add_submodule("either", Either())
        with self.graph.inserting_after(result):
            either = self.graph.call_module("either", (raw, result))
        either.meta = dict(result.meta)
        self.output.replace_input_with(result, either)
        self._edges[self.output, output] = either

    def live(self, delta: Delta, axis: int) -> fx.Node:
        """Ones, as many as a free axis of a delta is long: `[n]` int64. What counts the axis reads this and no size:
        where rows of several tasks share a batch, it is `[rows, n]`, zero where the task of a row has fewer.
        """
        axis %= len(delta.shape)
        name = f"{delta.free[axis]}.live"
        for node in self.graph.nodes:
            if node.meta.get(LIVE) == name:
                return node  # type: ignore[no-any-return]

        def ones(_: Tensor, t: Tensor) -> Tensor:
            return t.new_ones([t.shape[axis]], dtype=torch.long)

        node = self.insert(ones, [max(n for n in self.graph.nodes if n.op == "placeholder")], (delta,))
        node.meta[LIVE] = name
        self.counted[name] = delta.free[axis]
        return node

    def reads(self, name: str) -> list[fx.Node]:
        """The nodes by which the graph reads a tensor."""
        return [node for node in self.graph.nodes if node.op == "get_attr" and node.target == name]

    def recompute(self, node: fx.Node, fn: Callable[..., Any], operands: Sequence[fx.Node]) -> None:
        """Let `node` be `fn(*operands)` from now on, operands as they are now; its identity and its readers stay."""
        before, former = set(self.graph.nodes), node.all_input_nodes
        result = self.insert(fn, operands)
        for made in set(self.graph.nodes) - before:
            edges = [(operand, now) for (reader, operand), now in self._edges.items() if reader is node]
            self._edges.update({(made, operand): now for operand, now in edges if now in made.all_input_nodes})
        node.target, node.args, node.kwargs = result.target, result.args, result.kwargs
        node.meta["surgeon"] = self._author
        self.graph.erase_node(result)
        for operand in former:
            if operand.op == "get_attr" and not operand.users:
                self.graph.erase_node(operand)

    def _fake(self, delta: Delta) -> FakeTensor:
        """A fake of the delta whose free axes are symbols, so that no body can depend on this spec's size."""
        modes = (n.meta["val"].fake_mode for n in self.graph.nodes if isinstance(n.meta.get("val"), FakeTensor))
        dynamic = [DimDynamic.DYNAMIC if axis in delta.free else DimDynamic.STATIC for axis in range(len(delta.shape))]
        device = next(self.graph_module.parameters()).device
        fake: FakeTensor = next(modes).from_tensor(
            delta.sample(device), symbolic_context=StatelessSymbolicContext(dynamic_sizes=dynamic)
        )
        return fake

    def _read(self, delta: Delta, fake: FakeTensor) -> fx.Node:
        node = self.graph.get_attr(delta.name)
        node.meta["val"] = fake
        node.meta["surgeon"] = self._author
        return node

    def _copy(self, inner: fx.Node, value: Any, env: Mapping[fx.Node, Argument], anchor: fx.Node) -> fx.Node:
        node = self.graph.node_copy(inner, lambda n: env[n])
        node.meta = {"val": value, "surgeon": self._author}
        if "nn_module_stack" in anchor.meta:
            node.meta["nn_module_stack"] = anchor.meta["nn_module_stack"]
        return node

    def readers(self, value: fx.Node, target: fx.Node) -> list[fx.Node]:
        """Those who read `value` on the way to `target`."""
        way = ancestors(target)
        return [user for user in self.current(value).users if user in way]

    def copy_region(self, start: fx.Node, end: fx.Node) -> fx.Node:
        """Compute once more, from `start`, what `end` is computed from it; returns the copy of `end`."""
        region = descendants(start) & ancestors(end)
        env: dict[fx.Node, fx.Node] = {start: start}
        with self.graph.inserting_before(start.next):
            for node in [n for n in self.graph.nodes if n in region]:
                for operand in node.all_input_nodes:
                    if operand not in region and operand is not start and operand > start:
                        env[operand] = self.graph.node_copy(operand)
                env[node] = self.graph.node_copy(node, lambda n: env.get(n, n))
                env[node].meta = {**node.meta, "surgeon": self._author}
        return env[end]
