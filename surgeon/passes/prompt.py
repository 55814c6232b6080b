"""Prompt tuning: trained vectors in front of the text's embeddings.

    [P ; E[ids]]      P [n, d]

Lester et al., "The Power of Scale for Parameter-Efficient Prompt Tuning", EMNLP 2021 (arXiv:2104.08691), sections 2
(prompts) and 3.2 (how they start).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from surgeon.anatomy import Embedding
from surgeon.errors import SpecError
from surgeon.ledger import ByLabels, Init, normal
from surgeon.passes import Pass, PassResult
from surgeon.passes.virtual import Virtual, text_table
from surgeon.program import Program


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
    start: Literal["random", "vocabulary", "labels"] = Field(
        "vocabulary",
        description="Fresh vectors: a normal distribution, embeddings of words drawn at random, or the mean embedding "
        "of each of the task's labels, and drawn words for what is left.",
    )
    std: PositiveFloat = Field(0.5, description="Standard deviation of a random start.")
    place: Literal["front", "after"] = Field("front", description="Before the text, or after its first token.")

    def call(self, program: Program) -> PassResult:
        table = text_table(program)
        prompt = program.delta(
            table, "prompt", (self.length, table.width), self._init(program, table), free={0: "=prompt.length"}
        )
        Virtual(prompt, behind=int(self.place == "after")).splice(program)
        return PassResult(program, modified=True)

    def _init(self, program: Program, table: Embedding) -> Init:
        if self.start == "random":
            return normal(self.std)
        weight = program.tensor(table.weight).detach()

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
                    f"prompt.start: labels gives each label a token, and there are {len(labels)} for {shape[-2]} tokens",
                    try_="name the task's labels, or another `length` or `start`",
                )
            for i, label in enumerate(labels):
                rows[..., i, :] = weight[program.tokenize(label)].mean(0)
            return rows

        if self.start == "vocabulary":
            return drawn
        program.tokenize("a")  # so that a base without a tokenizer is told when the spec is compiled
        return ByLabels(from_labels)
