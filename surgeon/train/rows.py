"""Rows of text and label, and what all kinds of rows share: being held out, and being told apart by their content."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from surgeon.errors import DataError, did_you_mean
from surgeon.train.files import column, read_records, text_of

Labels = Sequence[str] | int
R = TypeVar("R")


class Row(NamedTuple):
    """One example: a text, and its label's number."""

    text: str
    label: int


class TaskRows(NamedTuple):
    """The rows of one task, of the kind that its head learns from: to train on, and to validate with."""

    training: Sequence[Any]
    validation: Sequence[Any] | None = None


def read_rows(path: str | Path, labels: Labels, text_column: str = "text", label_column: str = "label") -> list[Row]:
    """Read a CSV, TSV or JSON-lines file. Labels are the task's names, or numbers where the task has a count only.

    Raises DataError with the line of the first row that does not fit, and how many there are.
    """

    def make(record: Mapping[str, Any], where: str) -> Row:
        text = text_of(record, text_column, where)
        return Row(text, label_number(column(record, label_column, where), labels, where))

    return read_records(path, (text_column, label_column), make)


def read_texts(path: str | Path, text_column: str = "text") -> list[str]:
    """The texts alone of such a file."""
    return read_records(path, (text_column,), lambda record, where: text_of(record, text_column, where))


def labels_of(model: Any) -> Labels:
    """The labels of a task's model as `read_rows` wants them: names, or a count where they have none."""
    return known_labels([str(model.config.id2label[i]) for i in range(model.config.num_labels)])


def known_labels(names: Sequence[str]) -> Labels:
    """The same from names as a configuration or a manifest has them, which number what has no name."""
    names = tuple(names)
    return len(names) if names == tuple(f"LABEL_{i}" for i in range(len(names))) else names


def label_number(value: Any, labels: Labels, where: str) -> int:
    """The number of a label as a file says it. Raises DataError where it is none of `labels`."""
    if isinstance(labels, int):
        number = int(value) if isinstance(value, str) and value.isascii() and value.isdecimal() else value
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < labels:
            raise DataError(f"label {_short(value)} is no number from 0 to {labels - 1}", where=where)
        return number
    if not isinstance(value, str) or value not in labels:
        close = did_you_mean(str(value), labels)
        raise DataError(f"unknown label {_short(value)}", where=where, there_is=labels, try_=close)
    return list(labels).index(value)


def hold_out(rows: Sequence[R], share: float, seed: int = 0) -> tuple[list[R], list[R]]:
    """Split rows at random into those to train on and a `share` to validate with, at least one of each."""
    if len(rows) < 2:
        raise DataError("one row cannot be both trained on and held out", try_="give more rows, or validation data")
    order = list(rows)
    random.Random(seed).shuffle(order)
    held = min(max(round(len(order) * share), 1), len(order) - 1)
    return order[held:], order[:held]


def _short(value: Any) -> str:
    told = repr(value)
    return told if len(told) <= 60 else told[:57] + "…"
