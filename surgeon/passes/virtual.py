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

Fill = Callable[[Tensor, Tensor, int], Tensor]
"""From an input and the `live` of some virtual tokens, before which there are `first` others: the tokens' values."""


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
        live = [program.live(delta, -2) for delta in self.deltas]
        ends = () if self.back is None else (_text_ends(program, ids),)
        inputs = [n for n in program.graph.nodes if n.op == "placeholder" and (n is ids or n.name in FILLS)]
        places: dict[str, fx.Node] = {}  # by length: a mask may reach back over a cache
        for node in inputs:
            size = str(node.meta["val"].shape[1])
            if size not in places:
                places[size] = program.insert(self._places, [program.current(node), *ends, *live])
        keep = set(program.graph.nodes) - before
        padding = program.config.pad_token_id or 0
        for node in inputs:
            fill = _virtual_ids(tables[0].rows, padding) if node is ids else _constant(FILLS[node.name])
            program.replace(node, self._longer(fill), also=(places[str(node.meta["val"].shape[1])], *live), keep=keep)
        for node in per_token:
            program.replace_operand([program.output], node, self._cut, also=(places[str(length)], *live))
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

    def _places(self, ids: Tensor, *others: Tensor) -> Tensor:
        """Where each column of `_columns` goes, `[batch, n + length]`.

        `back` goes to where the text ends, and what is behind moves up; tokens that a task does not have go to the end
        of the row, as if it were padded there.
        """
        ends, front, back = (None, others[0], None) if self.back is None else others
        length, f, zero = ids.shape[1], front.shape[-1], torch.zeros_like(ids[:, :1])
        real, nf = _count(ids), front.sum(-1, keepdim=True)
        if back is None or ends is None:
            nb, end = torch.zeros_like(nf), zero + length
        else:
            nb, end = back.sum(-1, keepdim=True), ends.unsqueeze(1)
        i = front.new_ones(front.shape).cumsum(-1) - 1
        pieces = [
            torch.where(real < self.behind, real, torch.where(real < end, real + nf, real + nf + nb)),
            torch.where(i < nf, i + self.behind, i + nb + length) + zero,
        ]
        if back is not None:
            i = back.new_ones(back.shape).cumsum(-1) - 1
            pieces.append(torch.where(i < nb, i + nf + end, i + (f + length)))
        return self._columns(*pieces)

    def _columns(self, real: Tensor, front: Tensor, back: Tensor | None = None) -> Tensor:
        """The text with `front` where it stands and `back` behind it all."""
        pieces = [real[:, : self.behind], front, real[:, self.behind :]]
        return torch.cat(pieces if back is None else [*pieces, back], 1)

    def _longer(self, fill: Fill) -> Callable[..., Tensor]:
        """An input with the virtual tokens in it."""

        def longer(real: Tensor, places: Tensor, *live: Tensor) -> Tensor:
            firsts = (0, live[0].shape[-1])
            own = [fill(real, tokens, first) for tokens, first in zip(live, firsts, strict=False)]
            columns = self._columns(real, *own)
            return torch.zeros_like(columns).scatter(1, places, columns)

        return longer

    def _cut(self, output: Tensor, places: Tensor, *live: Tensor) -> Tensor:
        """Outputs of the real tokens only."""
        f = live[0].shape[-1]
        behind = places[:, self.behind + f :]
        if len(live) > 1:
            behind = behind[:, : behind.shape[1] - live[1].shape[-1]]
        real = torch.cat([places[:, : self.behind], behind], 1)
        return output[torch.ones_like(real).cumsum(0) - 1, real]

    def _embed(self, program: Program, table: Embedding, index: fx.Node) -> None:
        """Where an id is virtual, a row of the tokens takes the place of what the embedding module gives."""
        rows = table.rows
        end = module_end(table.node)
        program.replace_operand([table.node], table.index, lambda i: i.masked_fill(i >= rows, 0))

        def looked_up(embedded: Tensor, i: Tensor, *tokens: Tensor) -> Tensor:
            # A zero row in front gives a task without tokens something to read.
            own = torch.nn.functional.pad(torch.cat(tokens, -2), (0, 0, 1, 0))
            row = (i - (rows - 1)).clamp(min=0)
            if own.dim() == 2:
                return torch.where((i >= rows).unsqueeze(-1), torch.embedding(own, row), embedded)
            row = row.reshape(own.shape[0], -1, 1).expand(-1, -1, own.shape[-1])
            return torch.where((i >= rows).unsqueeze(-1), torch.gather(own, 1, row).reshape(embedded.shape), embedded)

        program.replace(end, looked_up, self.deltas, also=(index,))


def text_ids(program: Program) -> fx.Node:
    """The input that holds the text. Raises SelectorError where the base reads none."""
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name == "input_ids":
            return node  # type: ignore[no-any-return]
    raise SelectorError(
        "virtual tokens stand in front of a text, and this base reads none",
        there_is=[i.name for i in program.inputs],
    )


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


def words_of(program: Program, table: Embedding) -> Tensor:
    """The table's rows `[rows, d]` as its module gives them: √d times as long in some bases."""
    weight, end = program.tensor(table.weight).detach(), module_end(table.node)
    if weight.is_meta or end is table.node:
        return weight
    longest = weight.norm(dim=-1).argmax().expand(1, 2)
    plain, scaled = program.evaluate([table.node, end], {"input_ids": longest})
    return weight * ((plain * scaled).sum() / plain.square().sum())


def spread(words: Tensor) -> float:
    """The standard deviation of embeddings: numbers far above it drown what the base adds to them."""
    return 1.0 if words.is_meta else float(words.std())


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


def _virtual_ids(rows: int, padding: int) -> Fill:
    def ids(real: Tensor, live: Tensor, first: int) -> Tensor:
        numbers = live.new_ones(live.shape).cumsum(-1) + (rows - 1 + first)
        return torch.where(live > 0, numbers, padding) + torch.zeros_like(real[:, :1])

    return ids


def _constant(value: int) -> Fill:
    return lambda real, live, _: live * value + torch.zeros_like(real[:, :1])
