"""The program of a mixed graph: its deltas are banks, of which every row of the batch reads the entry of its task.

    delta [a, b]   becomes   bank [tasks, a, b], read at task_ids [rows]

Entry 0 is the base: the default of every bank. A free size is that of the largest task in the bank. What is shorter is
filled up: with `Delta.padding`, which leaves the answer as it is; and where a technique counts a free axis
(`Program.live`), a bank of ones and zeros tells which entries of the axis a task has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from surgeon.errors import CompositionError
from surgeon.inputs import Input
from surgeon.ledger import Delta, Ledger
from surgeon.mixed.rows import ROWS, TASK_IDS, RowWise
from surgeon.mixed.writing import Writing
from surgeon.program import Program
from surgeon.rewriting import LIVE

aten = torch.ops.aten
TASKS = "tasks"
SHARE = 0.05
"""A trunk that holds less of the base's matrices is not worth the gathering behind it."""


def mixed(program: Program) -> Program:
    """The program as a function of its inputs, of `rows` [R], the number of each row's text, and `task_ids` [R].

    Where it goes on from a cache, a row is a text: its inputs, the cache among them, are `[R, …]`, without `rows`.
    Raises CompositionError where rows of a batch cannot be told apart on the way of a delta.
    """
    uncounted = set(program.ledger.positions) - set(program.counted.values())
    if uncounted or (program.ledger.positions and not any(given.fill == 1 for given in program.inputs)):
        raise CompositionError(
            "rows of tasks of several lengths need an attention mask, and this base takes none",
            there_is=sorted(program.ledger.positions),
            try_="`modes: [switch]` in `export`: one task a call",
        )
    banks = _Banks(program)
    graph = banks.write()
    return replace(
        program,
        graph_module=fx.GraphModule(banks.tensors(graph), graph),
        inputs=_inputs(program.inputs),
        ledger=Ledger({d.name: d for d in banks.deltas.values()}),
    )


class _Banks:
    """Reads deltas from banks."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.deltas = {name: _bank(delta) for name, delta in program.ledger.deltas.items()}
        self.deltas |= {name: _count(name, symbol) for name, symbol in program.counted.items()}
        self._read: dict[str, fx.Node] = {}
        own = _go_on(program.inputs)
        self._walk = RowWise(program.graph, self.read, shared=not own and _share(program) >= SHARE, own=own)
        self._ids = self._walk.ids

    def write(self) -> fx.Graph:
        """The graph, which returns what the program's returns."""
        graph = self._walk.write()
        names = [node.name for node in graph.find_nodes(op="placeholder")]
        graph._codegen = _called_by_name(names, self.program.graph)
        return graph

    def tensors(self, graph: fx.Graph) -> dict[str, Tensor]:
        """What the graph holds: the base's own tensors, and banks of nothing but the base."""
        names = {str(node.target) for node in graph.find_nodes(op="get_attr")}
        held = dict(chain(self.program.graph_module.named_parameters(), self.program.graph_module.named_buffers()))
        return {name: self.deltas[name].default if name in self.deltas else held[name] for name in names}

    def read(self, writing: Writing, node: fx.Node) -> fx.Node | None:
        """A delta of every row."""
        name = str(node.meta.get(LIVE) or (node.op == "get_attr" and node.target))
        if name not in self.deltas:
            return None
        if name not in self._read:
            bank = writing.graph.get_attr(name)
            like = node.meta["val"]
            with writing.mode:
                bank.meta["val"] = torch.empty([self._ids.meta["val"].shape[0], *like.shape], dtype=like.dtype)
            self._read[name] = writing.call(aten.index_select.default, (bank, 0, self._ids))
        return self._read[name]


def _go_on(inputs: Sequence[Input]) -> bool:
    return any(given.cached for given in inputs)


def _inputs(inputs: Sequence[Input]) -> tuple[Input, ...]:
    ids = Input(TASK_IDS, (ROWS,))
    if not _go_on(inputs):
        return (*inputs, Input(ROWS, (ROWS,)), ids)
    return (*(replace(given, axes=(ROWS, *given.axes[1:])) for given in inputs), ids)


def _called_by_name(names: list[str], source: fx.Graph) -> fx.graph.CodeGen:
    """Takes inputs by name, and returns what the graph `source` returns."""
    out_spec = source._codegen.pytree_info.out_spec  # type: ignore[attr-defined]
    in_spec = pytree.tree_structure(((), dict.fromkeys(names, 0)))
    return fx.graph._PyTreeCodeGen(fx.graph._PyTreeInfo(names, in_spec, out_spec))


def _bank(delta: Delta) -> Delta:
    return replace(
        delta,
        shape=(1, *delta.shape),
        free={0: TASKS} | {axis + 1: symbol for axis, symbol in delta.free.items()},
        default=delta.default.unsqueeze(0),
        init=None,
    )


def _count(name: str, symbol: str) -> Delta:
    """The bank of what `Program.live` gives."""
    return Delta(
        name=name,
        technique="",
        site="",
        part=LIVE,
        role="",
        shape=(1, 2),
        free={0: TASKS, 1: symbol},
        dtype=torch.long,
        default=torch.zeros(1, 0, dtype=torch.long),
        init=None,
    )


def _share(program: Program) -> float:
    """The part of the base's matrices that is multiplied with where no delta has come in."""
    reached: set[fx.Node] = set()
    counted = {True: 0, False: 0}
    for node in program.graph.nodes:
        own = node.op == "get_attr" and node.target in program.ledger.deltas
        if own or (node.target is not aten.sym_size.int and any(n in reached for n in node.all_input_nodes)):
            reached.add(node)
        weights = [n for n in node.all_input_nodes if n.op == "get_attr" and n.target in program.frozen]
        matrices = [_numbers(n.meta["val"]) for n in weights if node.target is not aten.embedding.default]
        counted[node in reached] += sum(matrices)
    return counted[False] / max(sum(counted.values()), 1)


def _numbers(value: object) -> int:
    return value.numel() if isinstance(value, Tensor) and value.dim() > 1 else 0
