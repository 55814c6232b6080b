"""Virtual tokens: rows of trained tensors that make a text's sequence of embeddings longer.

They are spliced in behind the inputs as ids V, V + 1, … (V = rows of the embedding), so every size, mask, position and
pooling in the graph follows by itself; the embedding then reads a row where an id is virtual.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from surgeon.anatomy import Embedding
from surgeon.dataflow import ancestors
from surgeon.errors import CompositionError, SelectorError
from surgeon.ledger import Delta
from surgeon.program import Program

SCALINGS = (torch.ops.aten.mul.Tensor, torch.ops.aten.to.dtype, torch.ops.aten._to_copy.default)
FILLS = {"attention_mask": 1, "token_type_ids": 0}

Fill = Callable[[Tensor, int, int], Tensor]
"""From an input: the values of `count` virtual tokens, before which there are `first` others."""


@dataclass(frozen=True)
class Virtual:
    """Virtual tokens of a text: rows `[n, d]`, or `[k, n, d]` where each k-th part of the batch has its own.

    `front` stands in front of everything, or behind the first token where `behind` is 1; `back` behind the last real
    token, which the attention mask tells, and before the padding.
    """

    front: Delta
    back: Delta | None = None
    behind: int = 0

    @property
    def deltas(self) -> tuple[Delta, ...]:
        """All of them, in the order of their ids."""
        return (self.front,) if self.back is None else (self.front, self.back)

    def splice(self, program: Program) -> None:
        """Put the tokens into the graph, and cut outputs of a token each back to the real tokens."""
        ids = text_ids(program)
        length = ids.meta["val"].shape[1]
        per_token = [n for n in outputs(program) if n.meta["val"].dim() > 1 and n.meta["val"].shape[1] == length]
        tables = _tables(program, ids)
        self._check_alone(program, tables[0])
        for table, index in [(table, program.current(table.index)) for table in tables]:
            self._embed(program, table, index)
        before = set(program.graph.nodes)
        ends = () if self.back is None else (_text_ends(program, ids),)
        keep = set(program.graph.nodes) - before
        for node in [n for n in program.graph.nodes if n.op == "placeholder"]:
            if node is ids or node.name in FILLS:
                fill = _virtual_ids(tables[0].rows) if node is ids else _constant(FILLS[node.name])
                program.replace(node, self._longer(fill), self.deltas, also=ends, keep=keep)
        for node in per_token:
            program.replace_operand([program.output], node, self._cut, self.deltas, also=ends)
        for delta in self.deltas:
            program.occupy(delta.free[len(delta.shape) - 2], "sequence")

    def _check_alone(self, program: Program, table: Embedding) -> None:
        own = {d.name for d in self.deltas}
        for other in program.ledger.deltas.values():
            virtual = other.role == table.role and not program.ledger.positions.keys().isdisjoint(other.free.values())
            if virtual and other.name not in own:
                raise CompositionError(
                    f"'{self.front.technique}' and '{other.technique}' would both put virtual tokens into the text",
                    try_="one of the two: at run time they are the same",
                )

    def _longer(self, fill: Fill) -> Callable[..., Tensor]:
        """An input with the virtual tokens in it."""

        def longer(real: Tensor, *others: Tensor) -> Tensor:
            if self.back is None:
                front = fill(real, 0, others[0].shape[-2])
                return torch.cat([real[:, : self.behind], front, real[:, self.behind :]], 1)
            ends, f, b = others[0], others[1].shape[-2], others[2].shape[-2]
            pieces = [real[:, : self.behind], fill(real, 0, f), real[:, self.behind :], fill(real, f, b)]
            rows = torch.cat(pieces, 1)
            # `back` moves from the end of the row to where the text ends; what it passes moves up.
            place, end = _count(rows), ends.unsqueeze(1) + f
            moved = torch.where(place < end + b, place - end + rows.shape[1] - b, place - b)
            return torch.gather(rows, 1, torch.where(place < end, place, moved))

        return longer

    def _cut(self, output: Tensor, *others: Tensor) -> Tensor:
        """Outputs of the real tokens only."""
        if self.back is None:
            n = others[0].shape[-2]
            return torch.cat([output[:, : self.behind], output[:, self.behind + n :]], 1)
        ends, f, b = others[0], others[1].shape[-2], others[2].shape[-2]
        real = _count(ends.new_ones(output.shape[0], output.shape[1] - f - b))
        behind = torch.where(real < ends.unsqueeze(1), real + f, real + (f + b))
        place = torch.where(real < self.behind, real, behind)
        return output[torch.ones_like(real).cumsum(0) - 1, place]

    def _embed(self, program: Program, table: Embedding, index: fx.Node) -> None:
        """Where an id is virtual, a row of the tokens takes the place of what the embedding module gives."""
        rows = table.rows
        end = module_end(table.node)
        program.replace_operand([table.node], table.index, lambda i: i.masked_fill(i >= rows, 0))

        def looked_up(embedded: Tensor, i: Tensor, *tokens: Tensor) -> Tensor:
            # A zero row in front gives a task without tokens something to read.
            own = torch.nn.functional.pad(torch.cat(tokens, -2), (0, 0, 1, 0))
            own = own if own.dim() == 3 else own.unsqueeze(0)
            row = (i - (rows - 1)).clamp(min=0).reshape(own.shape[0], -1, 1).expand(-1, -1, own.shape[-1])
            return torch.where((i >= rows).unsqueeze(-1), torch.gather(own, 1, row).reshape(embedded.shape), embedded)

        program.replace(end, looked_up, self.deltas, also=(index,))


def text_ids(program: Program) -> fx.Node:
    """The input that holds the text."""
    found: fx.Node = next(n for n in program.graph.nodes if n.op == "placeholder" and n.name == "input_ids")
    return found


def text_table(program: Program) -> Embedding:
    """The table in which the text's ids are looked up."""
    return _tables(program, text_ids(program))[0]


def outputs(program: Program) -> list[fx.Node]:
    """The tensors the graph returns."""
    return [n for n in program.output.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]


def module_end(node: fx.Node) -> fx.Node:
    """Behind the scaling that the embedding's own module applies: virtual tokens live in the scaled space."""
    stack = list(node.meta.get("nn_module_stack", {}))
    users = list(node.users)
    while len(users) == 1 and users[0].target in SCALINGS and list(users[0].meta.get("nn_module_stack", {})) == stack:
        node = users[0]
        users = list(node.users)
    return node


def _tables(program: Program, ids: fx.Node) -> list[Embedding]:
    """Every table that is looked up by what comes from the text's ids: a classifier may shift them for its decoder."""
    found = [e for e in program.anatomy.embeddings if e.role == "embedding.token" and ids in ancestors(e.index)]
    if not found:
        raise SelectorError("no embedding is looked up by input_ids, so there is no place for virtual tokens")
    return found


def _text_ends(program: Program, ids: fx.Node) -> fx.Node:
    """How many tokens each row has up to its last real one, `[rows]`."""
    masks = [n for n in program.graph.nodes if n.op == "placeholder" and n.name == "attention_mask"]
    if not masks:
        return program.insert(lambda i: i.new_ones(i.shape).sum(1), [program.current(ids)])
    return program.insert(lambda m: ((_count(m) + 1) * m).amax(1), [program.current(masks[0])])


def _count(t: Tensor) -> Tensor:
    """0, 1, 2, … along the second axis."""
    return t.new_ones(t.shape).cumsum(1) - 1


def _virtual_ids(rows: int) -> Fill:
    return lambda real, first, count: real.new_ones([real.shape[0], count]).cumsum(1) + (rows - 1 + first)


def _constant(value: int) -> Fill:
    return lambda real, _, count: real.new_full([real.shape[0], count], value)
