"""P-Tuning: trained tokens at any place of a template, between words that anchor it and around the text.

    E(template) with  h = encoder(e)  where the template says [P], E[word] where it has a word, E[ids] for {text}

The encoder couples the tokens while they are trained and is folded away: h = MLP(BiLSTM(e)), or an MLP alone. The
words' embeddings are the base's, frozen; they are deployed with the tokens, so a task file may hold any template.

Liu et al., "GPT Understands, Too" (arXiv:2103.10385), section 2; sizes as in the authors' LAMA code and in PEFT.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from pydantic import Field, PositiveInt, field_validator
from pydantic_core import PydanticCustomError
from torch import Tensor

from surgeon.anatomy import Embedding
from surgeon.errors import CompositionError, SpecError
from surgeon.passes import Pass, PassResult
from surgeon.passes.virtual import Virtual, module_end, spread, text_table, words_of
from surgeon.program import Program
from surgeon.starts import Init, normal, value

SLOT = "{text}"
MASK = re.compile(r"\[MASK\]|<mask>", re.IGNORECASE)
TOKENS = re.compile(r"\[P\](?:\*([1-9]\d{0,3}))?")

Gap = list[int | str]
"""Numbers of trained tokens and words, in order."""


def parse(template: str) -> tuple[Gap, Gap]:
    """What stands in front of the text and behind it. Raises PydanticCustomError where the template is none."""
    gaps: list[Gap] = [[]]
    count = 0
    for word in template.split():
        if word == SLOT:
            gaps.append([])
        elif found := TOKENS.fullmatch(word):
            tokens = int(found[1] or 1)
            gaps[-1] += range(count, count + tokens)
            count += tokens
        elif "[P]" in word or "{" in word or "}" in word:
            what = (
                "has '{word}', which is neither [P], [P]*3 (a number from 1), {slot} nor a word; put spaces around each"
            )
            raise PydanticCustomError("template", what, {"word": word, "slot": SLOT})
        elif gaps[-1] and isinstance(gaps[-1][-1], str):
            gaps[-1][-1] += f" {word}"
        else:
            gaps[-1].append(word)
    if len(gaps) != 2:
        what = "must have the slot {slot} once, and has it {times} times"
        raise PydanticCustomError("template", what, {"slot": SLOT, "times": len(gaps) - 1})
    if not count:
        raise PydanticCustomError("template", "has no trained token: write [P], or [P]*3 for three")
    return gaps[0], gaps[1]


class PTuning(Pass):
    """Put trained tokens and words around the text; n·d parameters are deployed, those of the encoder folded away.

    Template tokens are separated by spaces: `[P]` or `[P]*3` are trained, `{text}` is the text as it is tokenized
    (special tokens included), all else are words. Outputs a token each are cut back to the text's.
    """

    name: ClassVar[str] = "p_tuning"
    title: ClassVar[str] = "P-Tuning"
    paper: ClassVar[str] = "arXiv:2103.10385"
    identity_at_birth: ClassVar[bool] = False

    template: str = Field(
        "[P]*10 {text}",
        description="Trained tokens `[P]`, words and the slot `{text}`: `[P]*3 it was [P] {text} [P]*2`.",
    )
    encoder: Literal["lstm", "mlp", "none"] = Field(
        "lstm", description="What couples the tokens in training: two bidirectional LSTM layers and an MLP, or less."
    )
    hidden: PositiveInt | None = Field(
        None, description="Width of the encoder; unset half the embedding's an LSTM direction, and all of it an MLP."
    )
    place: Literal["front", "after"] = Field("front", description="What is in front: before or after the first token.")

    @field_validator("template")
    @classmethod
    def _reads(cls, template: str) -> str:
        parse(template)
        return template

    def call(self, program: Program) -> PassResult:
        table, gaps = text_table(program), parse(self.template)
        self._check_read_out(program, gaps)
        if gaps[1] and program.goes_on:
            raise CompositionError(
                "p_tuning.template: what stands behind a text has no place in one that goes on",
                try_="nothing after {text}",
            )
        count = sum(isinstance(item, int) for gap in gaps for item in gap)
        words: list[int] = []
        layouts: list[list[int]] = []
        for gap in gaps:  # the rows of each: trained tokens first, then those of words
            layouts.append([])
            for item in gap:
                ids = program.tokenize(item) if isinstance(item, str) else []
                at = count + len(words)
                layouts[-1] += [item] if isinstance(item, int) else range(at, at + len(ids))
                words += ids
        front, back = (
            program.delta(table, part, (len(layout), table.width), None, free={0: f"=p_tuning.{part}"}, once=True)
            if layout or part == "front"
            else None
            for part, layout in zip(("front", "back"), layouts, strict=True)
        )
        assert front is not None
        self._fold(program, table, count, _rows(program, table, words), layouts if back else layouts[:1])
        Virtual(front, back, behind=int(self.place == "after")).splice(program)
        return PassResult(program, modified=True)

    def _check_read_out(self, program: Program, gaps: tuple[Gap, Gap]) -> None:
        """A mask in the template would have no answer: outputs are those of the text's own tokens."""
        words = [item for gap in gaps for item in gap if isinstance(item, str)]
        masks = [found[0] for word in words if (found := MASK.search(word))]
        if masks and program.head == "masked-lm":
            raise SpecError(
                f"p_tuning.template: {masks[0]} stands in the template, and outputs are of the text's own tokens alone",
                try_=f"write {masks[0]} into the text, before or behind which the template stands",
            )

    def _fold(self, program: Program, table: Embedding, count: int, anchors: Tensor, layouts: list[list[int]]) -> None:
        """Train embedding, encoder and (frozen) the words; deploy what stands in front of the text and behind it."""
        d, technique = table.width, f"{table.path}.{self.name}"
        std = spread(words_of(program, table)) if self.encoder == "none" else 1.0
        shapes = {"embedding": ((count, d), normal(std)), **self._encoder(d)}
        names = [program.trained(f"{technique}.{part}", *entry).name for part, entry in shapes.items()]
        if len(anchors):
            words = program.trained(f"{technique}.words", anchors.shape, value(anchors), frozen=True)
            names.append(words.name)
        encode: Callable[..., Tensor] = {"lstm": _lstm, "mlp": _mlp, "none": lambda e: e}[self.encoder]

        def placed(*trained: Tensor) -> tuple[Tensor, ...]:
            weights, words = (trained[:-1], trained[-1:]) if len(anchors) else (trained, ())
            rows = torch.cat([encode(*weights), *words])
            return tuple(rows[layout] for layout in layouts)

        outputs = [f"{technique}.{part}" for part, _ in zip(("front", "back"), layouts, strict=False)]
        program.fold(names, outputs, placed)

    def _encoder(self, d: int) -> dict[str, tuple[tuple[int, ...], Init]]:
        """Shapes and starting values of the encoder's tensors, as torch's own layers have them."""
        if self.encoder == "none":
            return {}
        h = self.hidden or (max(d // 2, 1) if self.encoder == "lstm" else d)
        parts: dict[str, tuple[tuple[int, ...], Init]] = {}
        if self.encoder == "lstm":
            for layer, width in enumerate((d, 2 * h)):
                for end in ("", "_reverse"):
                    for part, shape in {"weight_ih": (width,), "weight_hh": (h,), "bias_ih": (), "bias_hh": ()}.items():
                        parts[f"lstm.{part}_l{layer}{end}"] = ((4 * h, *shape), _uniform(h))
        widths = (2 * h, 2 * h, d) if self.encoder == "lstm" else (d, h, h, d)
        for i, (before, after) in enumerate(pairwise(widths)):
            parts[f"mlp.{2 * i}.weight"] = ((after, before), _uniform(before))
            parts[f"mlp.{2 * i}.bias"] = ((after,), _uniform(before))
        return parts


def _rows(program: Program, table: Embedding, ids: list[int]) -> Tensor:
    """The base's embeddings of some words `[k, d]`, as its embedding module gives them."""
    weight = program.tensor(table.weight)
    if not ids or weight.is_meta:
        return torch.zeros(len(ids), table.width)
    return program.evaluate([module_end(table.node)], {"input_ids": torch.tensor([ids])})[0][0]


def _uniform(fan_in: int) -> Init:
    """U(±1/√fan_in), as torch's Linear and LSTM start."""
    return lambda shape, rng: (torch.rand(shape, generator=rng) * 2 - 1) / fan_in**0.5


def _lstm(e: Tensor, *weights: Tensor) -> Tensor:
    """Two bidirectional layers over all tokens as one sequence, then an MLP; `[n, d]` to `[n, d]`."""
    lstm, mlp = list(weights[:16]), weights[16:]
    zero = e.new_zeros(4, 1, lstm[1].shape[1])
    hidden = torch.lstm(e.unsqueeze(0), (zero, zero), lstm, True, 2, 0.0, False, True, True)[0]
    return _mlp(hidden[0], *mlp)


def _mlp(x: Tensor, *weights: Tensor) -> Tensor:
    """Linear layers with ReLU between them."""
    for i in range(0, len(weights), 2):
        x = torch.nn.functional.linear(torch.relu(x) if i else x, weights[i], weights[i + 1])
    return x
