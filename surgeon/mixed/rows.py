"""The rewriting behind mixed batches and fan-outs: what meets a delta is computed row by row.

What no delta reaches is the trunk and runs once a text. Behind it a row is a text under a task: a value that crosses is
gathered by `rows`, and every delta has a leading axis of rows. With `rows = 0, 1, 2, …` that is a mixed batch (a task a
row); with a text's number repeated it is a fan-out (several tasks a text, their shared layers run once).

An operation that meets a delta is computed for each row alone: by broadcasting where it is plain arithmetic, by
`torch.func.vmap` else. Nothing here knows a technique.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import vmap
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

from surgeon.errors import CompositionError
from surgeon.mixed.alone import alone
from surgeon.mixed.batch import Batch, is_tensor
from surgeon.mixed.broadcasting import broadcast, without_dropout
from surgeon.mixed.writing import Writing

aten = torch.ops.aten
ROWS, TASK_IDS = "rows", "task_ids"
MANY = 8191
"""Rows to trace with: a number that nothing else is, so that it is found where it was taken for a constant."""

DELTA, ROW, TRUNK = "delta", "row", "trunk"
"""Computed from deltas alone, `[R, …]`; a text's under a task, with R in place of the batch; from no delta at all."""

TEXTS, EACH, ONE = "texts", "rows", "one"
"""What the batch is where a size is read: of the trunk, of the rows, of a row alone."""


class RowWise:
    """Copies a graph node by node: the trunk as it is, what deltas reach row by row.

    `read(writing, node)` writes what stands for a node that reads deltas, `[R, …]`, or None where it reads none. With
    `shared`, there is a trunk; without, every row runs on its own from the inputs on. With `own`, rows have inputs of
    their own, `[R, …]`, as where each goes on from a cache: nothing is gathered, and `task_ids` alone counts them.
    """

    def __init__(
        self, source: fx.Graph, read: Callable[[Writing, fx.Node], fx.Node | None], *, shared: bool, own: bool = False
    ) -> None:
        self.source = source
        inputs = source.find_nodes(op="placeholder")
        self.batch = Batch(inputs)
        self.writing = Writing(inputs[0].meta["val"].fake_mode)
        self._read = read
        self._env: dict[fx.Node, Any] = {}
        self._kinds: dict[fx.Node, str] = {}
        self._known: dict[tuple[fx.Node, str], Any] = {}
        for node in inputs:
            self._env[node] = self.writing.graph.node_copy(node)
            self._kinds[node] = ROW if own else TRUNK
        self.texts = self._env[inputs[0]]
        self.rows = self.integers(TASK_IDS if own else ROWS)
        self.ids = self.rows if own else self.integers(TASK_IDS)
        if own:
            count = self.rows.meta["val"].shape[0]
            for copied in self._env.values():
                with self.writing.mode:
                    copied.meta["val"] = copied.meta["val"].new_empty([count, *copied.meta["val"].shape[1:]])
        elif not shared:
            for node in inputs:
                self._env[node] = self.writing.call(aten.index_select.default, (self._env[node], 0, self.rows))
                self._kinds[node] = ROW

    def integers(self, name: str) -> fx.Node:
        """An input of one integer a row."""
        node = self.writing.graph.placeholder(name)
        context: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
        like = getattr(self, "rows", None)
        if like is None:
            node.meta["val"] = self.writing.mode.from_tensor(torch.arange(MANY), symbolic_context=context)
        else:
            with self.writing.mode:
                node.meta["val"] = torch.empty_like(like.meta["val"])
        return node

    def write(self) -> fx.Graph:
        """The new graph; its outputs have the structure of the old one's."""
        graph = self.writing.graph
        for node in self.source.nodes:
            if node.op not in ("placeholder", "output"):
                self._visit(node)
        graph.output(fx.node.map_arg(self.source.output_node().args[0], self._row))
        graph.eliminate_dead_code()
        graph.lint()
        return graph

    # -- one node after the other ---------------------------------------------------------------------------------

    def _visit(self, node: fx.Node) -> None:
        if not isinstance(node.meta.get("val"), Tensor | tuple | list):
            return  # a size: written where it is read, as what it is there
        read = self._read(self.writing, node)
        if read is not None:
            self._env[node], self._kinds[node] = read, DELTA
            return
        if node.op == "call_module":
            raise CompositionError(
                "a technique of this spec answers a text by several rows, and rows of several tasks have one each",
                there_is=str(node.meta.get("surgeon", ("",))[0]),
                try_="`modes: [switch]` in `export`: one task a call",
            )
        if node.target is aten.dropout.default:
            self._put(node, self._kinds[node.all_input_nodes[0]], self._env[node.all_input_nodes[0]])
            return
        kinds = {self._kinds[n] for n in node.all_input_nodes if n in self._kinds}
        if DELTA in kinds or (ROW in kinds and self._loses_rows(node)):
            self._meet(node)
        elif ROW in kinds:
            self._put(node, ROW, self._called(node, self._row))
        elif node.op == "get_attr":
            self._put(node, TRUNK, self.writing.graph.node_copy(node))
        else:
            self._put(node, TRUNK, self._called(node, self._text))

    def _put(self, node: fx.Node, kind: str, value: Any) -> None:
        self._env[node], self._kinds[node] = value, kind

    def _loses_rows(self, node: fx.Node) -> bool:
        """Whether it takes the batch together, as a maximum over all texts does."""
        values = [node] if is_tensor(node) else []
        return any(self.batch.factor(n) is None for n in values)

    def _called(self, node: fx.Node, mapped: Callable[[fx.Node], Any]) -> Any:
        if isinstance(operand := node.args[0] if node.args else None, fx.Node) and isinstance(
            self._env.get(operand), tuple
        ):
            return self._env[operand][node.args[1]]  # `getitem` of what was written as several values
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), mapped)
        return self.writing.call(node.target, *without_dropout(node, args, kwargs))

    # -- a value as it is where it is read ------------------------------------------------------------------------

    def _text(self, node: fx.Node) -> Any:
        return self._env[node] if node in self._env else self._size(node, TEXTS)

    def _row(self, node: fx.Node) -> Any:
        """A value as rows have it: one of the trunk is gathered once."""
        if node not in self._env:
            return self._size(node, EACH)
        if self._kinds[node] != TRUNK or not is_tensor(node) or self.batch.factor(node) is None:
            return self._env[node]
        if not self.batch.of_text(node):
            return self._again(node, EACH)
        if (node, EACH) not in self._known:
            self._known[node, EACH] = self.writing.splice(self._gather(node), [self._env[node], self.texts, self.rows])
        return self._known[node, EACH]

    def _gather(self, node: fx.Node) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def gathered(t: Tensor, texts: Tensor, rows: Tensor) -> Tensor:
            if self.batch.factor(node) == 1:
                return t.index_select(0, rows)
            return t.reshape(texts.shape[0], -1, *t.shape[1:]).index_select(0, rows).flatten(0, 1)

        return gathered

    def _again(self, node: fx.Node, level: str) -> Any:
        """A value made of sizes alone, such as the numbers 0, 1, … of an index, for another batch."""
        if node not in self._env:
            return self._size(node, level)
        if not is_tensor(node) or self.batch.factor(node) is None:
            return self._env[node]
        if (node, level) not in self._known:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self._again(n, level))
            self._known[node, level] = self.writing.call(node.target, args, kwargs)
        return self._known[node, level]

    def _size(self, node: fx.Node, level: str) -> Any:
        """A size, or a number computed from sizes."""
        value = node.meta["val"]
        of_batch = isinstance(value, torch.SymInt) and self.batch.within(value)
        level = level if of_batch else TEXTS
        if (node, level) not in self._known:
            self._known[node, level] = self._sized(node, level, of_batch=of_batch)
        return self._known[node, level]

    def _sized(self, node: fx.Node, level: str, *, of_batch: bool) -> Any:
        if of_batch and level == ONE:
            alone = self.batch.expression(node.meta["val"]).subs(self.batch.symbol, 1)
            if alone.is_Integer:
                return int(alone)
        if node.target is not aten.sym_size.int:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self._size(n, level))
            return self.writing.call(node.target, args, kwargs)
        tensor: Any
        axis: Any
        tensor, axis = node.args
        if not of_batch:  # one of a delta lies behind the axis of rows
            behind = int(self._kinds[tensor] == DELTA and axis >= 0)
            return self.writing.call(aten.sym_size.int, (self._env[tensor], axis + behind))
        counted = self.texts if level == TEXTS else self.rows
        if level == ONE:
            return self.writing.splice(lambda t, of: t.shape[axis] // of.shape[0], [self._row(tensor), self.rows])
        if self.batch.expression(node.meta["val"]) == self.batch.symbol:
            return self.writing.call(aten.sym_size.int, (counted, 0))
        return self.writing.call(aten.sym_size.int, (self._text(tensor) if level == TEXTS else self._row(tensor), axis))

    # -- where a value meets a delta ------------------------------------------------------------------------------

    def _meet(self, node: fx.Node) -> None:
        tensors = [n for n in node.all_input_nodes if is_tensor(n)]
        texts = [n for n in tensors if self._per_text(n)]
        if node.target is aten.embedding.default and not texts and self._kinds[tensors[0]] == TRUNK:
            self._put(node, DELTA, self._called(node, self._row))  # a table of the base, at numbers of each row's own
            return
        values = node.meta["val"] if isinstance(node.meta["val"], tuple | list) else [node.meta["val"]]
        own = any(self.batch.within(size) for value in values for size in value.shape)
        plain = own and texts and all(self.batch.factor(n) == 1 for n in texts)
        result = None
        if plain and len(texts) + len(self._deltas(tensors)) == len([n for n in tensors if self._varies(n)]):
            result = broadcast(self.writing, node, self._deltas(tensors), self._row)
        self._put(node, ROW if own else DELTA, result or self._each(node, tensors, texts, own=own))

    def _deltas(self, tensors: list[fx.Node]) -> dict[fx.Node, fx.Node]:
        return {n: self._env[n] for n in tensors if self._kinds[n] == DELTA}

    def _varies(self, node: fx.Node) -> bool:
        return self._kinds[node] == DELTA or self.batch.factor(node) is not None

    def _per_text(self, node: fx.Node) -> bool:
        """Whether a tensor has entries of each text that differ from text to text."""
        if self._kinds[node] == DELTA:
            return False
        return self.batch.factor(node) is not None and (self._kinds[node] == ROW or self.batch.of_text(node))

    def _each(self, node: fx.Node, tensors: list[fx.Node], texts: list[fx.Node], *, own: bool) -> Any:
        """The operation mapped over rows; the batch of each is one."""
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace != "aten":
            raise self._refusal(node)  # vmap has no rule for it, and would call it once for each of the many rows
        sizes = {n: self._size(n, ONE) for n in node.all_input_nodes if n not in self._env}
        written = [n for n, size in sizes.items() if isinstance(size, fx.Node)]
        operands = [self._row(n) if n in texts else self._again(n, ONE) for n in tensors]
        axes = tuple(0 if n in texts or self._kinds[n] == DELTA else None for n in tensors)

        def each(spread: bool) -> Callable[..., Any]:
            def mapped(rows: Tensor, *values: Any) -> Any:
                given = {**sizes, **dict(zip([*tensors, *written], values, strict=True))}
                apart, along = list(values[: len(tensors)]), list(axes)
                for i, n in enumerate(tensors):
                    if n in texts:
                        apart[i] = apart[i].reshape(rows.shape[0], -1, *apart[i].shape[1:])
                    elif along[i] is None and spread:
                        apart[i], along[i] = apart[i].expand(rows.shape[0], *apart[i].shape), 0
                one = lambda *row: _applied(node, {**given, **dict(zip(tensors, row, strict=True))})  # noqa: E731
                result = vmap(one, tuple(along))(*apart)
                if not own:
                    return result
                several = isinstance(result, tuple | list)
                return tuple(t.flatten(0, 1) for t in result) if several else result.flatten(0, 1)

            return mapped

        read = [self.rows, *operands, *(sizes[n] for n in written)]
        for spread in (False, True):  # some rules of vmap count the rows where an operand is the same for all
            before = len(self.writing.graph.nodes)
            result = self.writing.splice(each(spread), read, whole=False)
            if not any(_counts_rows(n) for n in list(self.writing.graph.nodes)[before:]):
                return result
        raise self._refusal(node)

    @staticmethod
    def _refusal(node: fx.Node) -> CompositionError:
        return CompositionError(
            f"rows of several tasks: '{node.target}' cannot be computed for any number of rows",
            there_is=f"{node}, made by {node.meta.get('surgeon', ('the base',))[0]}",
            try_="`modes: [switch]` in `export`: one task a call",
        )


def _counts_rows(node: fx.Node) -> bool:
    """Whether the number of rows of the trace has become a constant of a node."""
    numbers: list[int] = []
    fx.node.map_aggregate(
        (node.args, node.kwargs),
        lambda a: numbers.append(a) if isinstance(a, int) and a > 0 else None,
    )
    return any(number % MANY == 0 for number in numbers)


def _applied(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    args, kwargs = without_dropout(node, args, kwargs)
    return alone(node.target)(*args, **kwargs)
