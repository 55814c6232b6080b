"""The cases of the sweep: every family with a head for texts, images or sounds, and a tiny random base for each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig, PreTrainedModel

from surgeon.base.heads import AUTO, auto_class
from surgeon.base.loading import quiet, seeded
from surgeon.inputs import base_inputs, sample_inputs, vocabulary
from surgeon.spec import HeadName
from sweep.shrinking import LADDER, Sizes, parts, tiny

HEADS: tuple[HeadName, ...] = (
    "seq2seq-lm",
    "sequence-classification",
    "causal-lm",
    "masked-lm",
    "token-classification",
    "image-classification",
    "audio-classification",
)
EXCEPTIONS = {
    "encoder-decoder": "a frame around two other models, without defaults",
}
"""Families left out, each with the reason."""


@dataclass(frozen=True)
class Case:
    """A family with a head."""

    family: str
    head: HeadName

    def __str__(self) -> str:
        return f"{self.family} {self.head}"


def cases() -> list[Case]:
    """Every family with one head first, the first it has, then all with their other heads."""
    pairs = [[Case(family, head) for family in sorted(AUTO[head]._model_mapping._model_mapping)] for head in HEADS]
    first: dict[str, Case] = {}
    rest: list[Case] = []
    for case in (c for group in pairs for c in group if c.family not in EXCEPTIONS):
        if case.family in first:
            rest.append(case)
        else:
            first[case.family] = case
    return [*sorted(first.values(), key=lambda c: c.family), *rest]


def base(case: Case, ladder: Sequence[Sizes] = LADDER) -> PreTrainedModel:
    """A tiny random base in eval mode, every parameter moved off zeros and ones.

    Goes down the ladder of sizes until the model runs; raises what the first rung raised where none does.
    """
    first: Exception | None = None
    for sizes in ladder:
        try:
            model = _build(case, tiny(case.family, sizes))
            _runs(model)
        except Exception as error:
            first = first or error
            continue
        return model
    assert first is not None
    raise first


def _build(case: Case, config: PretrainedConfig) -> PreTrainedModel:
    auto = auto_class(config, case.head, case.family)
    for part in parts(config):
        part._experts_implementation = "batched_mm"  # of plain operators
    with quiet(), seeded(0):
        try:
            model = auto.from_config(config, attn_implementation="sdpa")
        except (ValueError, ImportError) as error:
            if not re.search("attention|sdpa", str(error)):
                raise
            model = auto.from_config(config, attn_implementation="eager")
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    parameter.add_(0.05 * torch.randn_like(parameter))
            _let_through(model)
    assert isinstance(model, PreTrainedModel)
    return model.eval()


def _let_through(model: PreTrainedModel) -> None:
    """Widen what would let nothing through many layers: convolutions to a variance of one, batch norms of zeros."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, torch.nn.Conv1d | torch.nn.Conv2d) and isinstance(weight, torch.nn.Parameter):
            weight.mul_(weight[0].numel() ** -0.5 / weight.std().clamp(min=1e-3))
        elif isinstance(module, torch.nn.BatchNorm2d):
            module.weight.add_((1 - module.weight.mean()).round())


def _runs(model: PreTrainedModel) -> None:
    with quiet(), torch.no_grad():
        output = model(**sample_inputs(base_inputs(model), vocabulary(model), torch.device("cpu")))
    if not torch.isfinite(output.logits).all():
        raise ValueError("the random base answers with numbers that are not finite")
