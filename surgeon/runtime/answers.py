"""Logits to labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from surgeon.errors import DataError, shorten
from surgeon.runtime.taskfile import Array
from surgeon.runtime.text import Text, length

LOGITS = "logits"


@dataclass(frozen=True)
class Answer:
    """A classified text: the likeliest label, its probability, and the probability of every label."""

    label: str
    score: float
    scores: Mapping[str, float]


def by_length(texts: Sequence[Text], batch: int, answer: Callable[[Sequence[int]], Sequence[Answer]]) -> list[Answer]:
    """Answers in the order of the texts, from `answer` of the numbers of a batch: of texts of like length, so that
    little is spent on padding.
    """
    order = sorted(range(len(texts)), key=lambda i: length(texts[i]))
    found: dict[int, Answer] = {}
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        found.update(zip(part, answer(part), strict=True))
    return [found[i] for i in range(len(texts))]


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
    known = np.isfinite(logits.sum(axis=1))  # never where an element is not
    if not known.all():
        raise DataError(
            f"the logits of {(~known).sum()} in {len(known)} rows are not finite, of row {known.argmin()} first",
            try_="where its class reads them at the token that ends a text, end each text with that: tokenizers do",
        )
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return [_answer(row, names) for row in shifted / shifted.sum(axis=1, keepdims=True)]


def _answer(row: Array, names: Sequence[str]) -> Answer:
    scores = {name: float(score) for name, score in zip(names, row, strict=True)}
    best = names[int(row.argmax())]
    return Answer(best, scores[best], MappingProxyType(scores))
