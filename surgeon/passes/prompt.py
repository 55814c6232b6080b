"""Prompt tuning: trained vectors in front of the text's embeddings.

    [P ; E[ids]]      P [n, d]

An ensemble holds N prompts [N, n, d]: the batch is repeated with another prompt each time, and every text's answers
take a vote, q = (votes + mean softmax) / (N + 1), of which the logarithm is returned. In training every prompt's
answers meet the labels on their own.

Lester et al., "The Power of Scale for Parameter-Efficient Prompt Tuning", EMNLP 2021 (arXiv:2104.08691), sections 2
(prompts), 3.2 (how they start) and 6 (ensembles).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from surgeon.anatomy import Embedding
from surgeon.errors import CompositionError, SpecError
from surgeon.ledger import Delta
from surgeon.passes import Pass, PassResult
from surgeon.passes.virtual import Virtual, outputs, spread, text_table, words_of
from surgeon.program import Program
from surgeon.starts import ByLabels, Init, normal


class Prompt(Pass):
    """Prepend n virtual tokens to the text (the encoder's, where there are two); n·d parameters a prompt.

    Encoders then pool virtual token 0 unless `place` is `after`, which keeps the first real token first. Outputs a
    token each are cut back to the real tokens. Length 0 is the base.
    """

    name: ClassVar[str] = "prompt"
    title: ClassVar[str] = "Prompt tuning"
    paper: ClassVar[str] = "arXiv:2104.08691"
    identity_at_birth: ClassVar[bool] = False

    length: PositiveInt = Field(20, description="Prompt length n in virtual tokens; free per task at run time.")
    start: Literal["random", "vocabulary", "labels"] = Field(
        "vocabulary",
        description="Fresh vectors: a normal distribution, embeddings of words drawn at random, or the mean embedding "
        "of each of the task's labels, and drawn words for what is left.",
    )
    std: PositiveFloat | None = Field(
        None, description="Standard deviation of a random start; unset it is that of the base's embeddings."
    )
    place: Literal["front", "after"] = Field("front", description="Before the text, or after its first token.")
    ensemble: PositiveInt = Field(
        1, description="Prompts of one task that vote; how many is free per task where there are several."
    )

    def call(self, program: Program) -> PassResult:
        table = text_table(program)
        many = self.ensemble > 1
        if many and program.generates:
            raise CompositionError("prompt.ensemble: prompts vote on one answer, not on a text", try_="`ensemble: 1`")
        shape = (self.ensemble,) * many + (self.length, table.width)
        prompt = program.delta(
            table,
            "prompt",
            shape,
            self._init(program, table),
            free={0: "=prompt.ensemble", 1: "=prompt.length"} if many else {0: "=prompt.length"},
            default=torch.zeros(1, 0, table.width, dtype=program.dtype) if many else None,
            once=True,
        )
        if many:
            for node in [n for n in program.graph.nodes if n.op == "placeholder"]:
                program.replace(node, _repeated, (prompt,))
            program.propagate()
        Virtual(prompt, behind=int(self.place == "after")).splice(program)
        if many:
            program.propagate()
            self._vote(program, prompt)
        return PassResult(program, modified=True)

    def _vote(self, program: Program, prompt: Delta) -> None:
        """Every text's answers, one a prompt, become one."""
        if program.head == "feature-extraction":
            raise CompositionError(
                "prompt.ensemble: features are no answers that could vote", try_="a base with a head"
            )
        for node in outputs(program):
            program.answer(node, _voted, (prompt,))

    def _init(self, program: Program, table: Embedding) -> Init:
        weight = words_of(program, table)
        if self.start == "random":
            return normal(self.std or spread(weight))

        def drawn(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
            if weight.is_meta:
                return torch.zeros(shape)
            return weight[torch.randint(0, weight.shape[0], shape[:-1], generator=rng)].clone()

        def from_labels(shape: tuple[int, ...], rng: torch.Generator, labels: Sequence[str] | None) -> Tensor:
            rows = drawn(shape, rng)
            if labels is None or weight.is_meta:
                return rows
            if not 0 < len(labels) <= shape[-2]:
                raise SpecError(
                    f"prompt.start: labels gives each label a token: there are {len(labels)} for {shape[-2]} tokens",
                    try_="name the task's labels, or another `length` or `start`",
                )
            for i, label in enumerate(labels):
                rows[..., i, :] = weight[program.tokenize(label)].mean(0)
            return rows

        if self.start == "vocabulary":
            return drawn
        program.tokenize("a")  # so that a base without a tokenizer is told when the spec is compiled
        return ByLabels(from_labels)


def _repeated(real: Tensor, prompt: Tensor) -> Tensor:
    """A batch once for every prompt."""
    return real.unsqueeze(0).expand(prompt.shape[-3], *[-1] * real.dim()).flatten(0, 1)


def _each(output: Tensor, prompt: Tensor) -> Tensor:
    # By rows: a head that comes later may change every other size of the output.
    rows = output.new_ones(output.shape[0], dtype=torch.long).cumsum(0) - 1
    return output[rows.reshape(prompt.shape[-3], -1)]


def _voted(output: Tensor, prompt: Tensor) -> Tensor:
    """log((votes + mean softmax) / (N + 1)): the majority, and between equals the likelier.

    One prompt gives its own logits, and outputs of a single number their mean.
    """
    each = _each(output, prompt)
    votes = torch.zeros_like(each).scatter(-1, each.argmax(-1, keepdim=True), 1.0).sum(0)
    count = prompt.new_ones(prompt.shape[-3]).sum()
    share = (votes + each.softmax(-1).mean(0)) / (count + 1)
    classes = torch.ones_like(share).sum(-1, keepdim=True)
    return torch.where((count > 1) & (classes > 1), share.log(), each.mean(0))
