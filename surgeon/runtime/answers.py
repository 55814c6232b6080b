"""Logits to labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from surgeon.errors import DataError, shorten
from surgeon.runtime.taskfile import Array

LOGITS = "logits"


@dataclass(frozen=True)
class Answer:
    """A classified text: the likeliest label, its probability, and the probability of every label."""

    label: str
    score: float
    scores: Mapping[str, float]


def answers(outputs: Mapping[str, Array], labels: Sequence[str] | None) -> list[Answer]:
    """One answer per row. Labels without names are numbered from 0. Raises DataError where rows are no classes."""
    if LOGITS not in outputs or outputs[LOGITS].ndim != 2:
        raise DataError(
            "this build does not classify texts",
            there_is=f"outputs {shorten(f'{name}{list(array.shape)}' for name, array in outputs.items())}",
            try_="use Session.run",
        )
    logits = outputs[LOGITS].astype(np.float64)
    names = [str(i) for i in range(logits.shape[1])] if labels is None else labels
    if len(names) != logits.shape[1]:
        raise DataError(f"the model gives {logits.shape[1]} logits for {len(names)} labels", there_is=shorten(names))
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return [_answer(row, names) for row in shifted / shifted.sum(axis=1, keepdims=True)]


def _answer(row: Array, names: Sequence[str]) -> Answer:
    scores = {name: float(score) for name, score in zip(names, row, strict=True)}
    best = names[int(row.argmax())]
    return Answer(best, scores[best], MappingProxyType(scores))
