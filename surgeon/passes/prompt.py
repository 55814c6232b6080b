"""Prompt tuning: trained vectors in front of the text's embeddings.

    [P ; E[ids]]      P [n, d]

The prompt is spliced in behind the inputs as virtual ids V, V + 1, … (V = rows of the embedding), so every size,
mask, position and pooling in the graph follows by itself; the embedding then reads P where an id is virtual.

Lester et al., "The Power of Scale for Parameter-Efficient Prompt Tuning", EMNLP 2021 (arXiv:2104.08691), section 2.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, fx

from surgeon.anatomy import Embedding
from surgeon.errors import SelectorError
from surgeon.ledger import Delta, Init, normal
from surgeon.passes import Pass, PassResult
from surgeon.dataflow import ancestors
from surgeon.program import Program

SCALINGS = (torch.ops.aten.mul.Tensor, torch.ops.aten.to.dtype, torch.ops.aten._to_copy.default)


class Prompt(Pass):
    """Prepend n virtual tokens to the text (the encoder's, where there are two); n·d parameters.

    Encoders then pool virtual token 0 unless `place` is `after`, which keeps the first real token first. Outputs a
    token each are cut back to the real tokens. Length 0 is the base.
    """

    name: ClassVar[str] = "prompt"
    title: ClassVar[str] = "Prompt tuning"
    paper: ClassVar[str] = "arXiv:2104.08691"
    identity_at_birth: ClassVar[bool] = False

    length: PositiveInt = Field(20, description="Prompt length n in virtual tokens; free per task at run time.")
    start: Literal["random", "vocabulary"] = Field(
        "vocabulary", description="Fresh vectors: a normal distribution, or embeddings of words drawn at random."
    )
    std: PositiveFloat = Field(0.5, description="Standard deviation of a random start.")
    place: Literal["front", "after"] = Field("front", description="Before the text, or after its first token.")

    def call(self, program: Program) -> PassResult:
        ids = next(n for n in program.graph.nodes if n.op == "placeholder" and n.name == "input_ids")
        tables = [e for e in program.anatomy.embeddings if e.role == "embedding.token" and ids in ancestors(e.index)]
        if not tables:
            raise SelectorError("prompt: no embedding is looked up by input_ids")
        first = tables[0]
        prompt = program.delta(
            first, "prompt", (self.length, first.width), self._init(program, first), free={0: "=prompt.length"}
        )
        length = ids.meta["val"].shape[1]
        per_token = [n for n in outputs(program) if n.meta["val"].dim() > 1 and n.meta["val"].shape[1] == length]
        indices = [program.current(table.index) for table in tables]
        for table, index in zip(tables, indices, strict=True):
            self._embed(program, table, index, prompt)
        self._splice(program, ids, first.rows, prompt)
        for node in per_token:
            program.replace_operand([program.output], node, self._cut, (prompt,))
        return PassResult(program, modified=True)

    def _init(self, program: Program, table: Embedding) -> Init:
        if self.start == "random":
            return normal(self.std)
        weight = program.tensor(table.weight).detach()

        def drawn(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
            if weight.is_meta:
                return torch.zeros(shape)
            return weight[torch.randint(0, weight.shape[0], shape[:1], generator=rng)].clone()

        return drawn

    def _splice(self, program: Program, ids: fx.Node, rows: int, prompt: Delta) -> None:
        """Virtual ids and their masks, in front of everything that reads the inputs."""

        def spliced(real: Tensor, virtual: Tensor) -> Tensor:
            if self.place == "front":
                return torch.cat([virtual, real], 1)
            return torch.cat([real[:, :1], virtual, real[:, 1:]], 1)

        def virtual_ids(real: Tensor, p: Tensor) -> Tensor:
            count = real.new_ones([real.shape[0], p.shape[-2]]).cumsum(1) + (rows - 1)
            return spliced(real, count)

        def filled(value: int) -> object:
            return lambda real, p: spliced(real, real.new_full([real.shape[0], p.shape[-2]], value))

        fills = {"attention_mask": filled(1), "token_type_ids": filled(0)}
        for node in [n for n in program.graph.nodes if n.op == "placeholder"]:
            fn = virtual_ids if node is ids else fills.get(node.name)
            if fn is not None:
                program.replace(node, fn, (prompt,))  # type: ignore[arg-type]

    def _embed(self, program: Program, table: Embedding, index: fx.Node, prompt: Delta) -> None:
        """Where an id is virtual, a row of the prompt takes the place of what the embedding module gives."""
        rows = table.rows
        end = _module_end(table.node)
        program.replace_operand([table.node], table.index, lambda i: i.masked_fill(i >= rows, 0))

        def looked_up(embedded: Tensor, i: Tensor, p: Tensor) -> Tensor:
            # A zero row in front gives length 0 something to read.
            padded = torch.cat([p.new_zeros(1, p.shape[-1]), p], -2)
            row = (i - (rows - 1)).clamp(min=0).unsqueeze(-1).expand(-1, -1, p.shape[-1])
            own = torch.gather(padded.expand(i.shape[0], -1, -1), 1, row)
            return torch.where((i >= rows).unsqueeze(-1), own, embedded)

        program.replace(end, looked_up, (prompt,), also=(index,))

    def _cut(self, output: Tensor, prompt: Tensor) -> Tensor:
        """Outputs of the real tokens only."""
        n = prompt.shape[-2]
        if self.place == "front":
            return output[:, n:]
        return torch.cat([output[:, :1], output[:, 1 + n :]], 1)


def outputs(program: Program) -> list[fx.Node]:
    """The tensors the graph returns."""
    return [n for n in program.output.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]


def _module_end(node: fx.Node) -> fx.Node:
    """Behind the scaling that the embedding's own module applies: prompts live in the scaled space."""
    stack = list(node.meta.get("nn_module_stack", {}))
    users = list(node.users)
    while len(users) == 1 and users[0].target in SCALINGS and list(users[0].meta.get("nn_module_stack", {})) == stack:
        node = users[0]
        users = list(node.users)
    return node
