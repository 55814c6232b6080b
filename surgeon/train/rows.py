"""Rows of text and label, read from a file that a person made: where training begins."""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from surgeon.errors import DataError, did_you_mean

DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON_LINES = (".jsonl", ".ndjson", ".json")

Labels = Sequence[str] | int
Record = tuple[int, Mapping[str, Any]]


class Row(NamedTuple):
    """One example: a text, and its label's number."""

    text: str
    label: int


def read_rows(path: str | Path, labels: Labels, text_column: str = "text", label_column: str = "label") -> list[Row]:
    """Read a CSV, TSV or JSON-lines file. Labels are the task's names, or numbers where the task has a count only.

    Raises DataError with the line of the first row that does not fit, and how many there are.
    """
    path = Path(path)
    rows: list[Row] = []
    faults: list[DataError] = []
    for line, record in _records(path, (text_column, label_column)):
        where = f"{path}:{line}"
        try:
            text = _column(record, text_column, where)
            if not isinstance(text, str) or not text.strip():
                raise DataError(f"column '{text_column}' holds no text", where=where)
            rows.append(Row(text, _label(_column(record, label_column, where), labels, where)))
        except DataError as fault:
            faults.append(fault)
    if faults:
        first = faults[0]
        more = f" (the first of {len(faults)} rows that do not fit)" if len(faults) > 1 else ""
        raise DataError(first.what + more, where=first.where, there_is=first.there_is, try_=first.try_)
    if not rows:
        raise DataError("there are no rows", where=str(path))
    return rows


def read_texts(path: str | Path, text_column: str = "text") -> list[str]:
    """The texts alone of such a file."""
    path = Path(path)
    texts = []
    for line, record in _records(path, (text_column,)):
        text = _column(record, text_column, f"{path}:{line}")
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"column '{text_column}' holds no text", where=f"{path}:{line}")
        texts.append(text)
    if not texts:
        raise DataError("there are no rows", where=str(path))
    return texts


def labels_of(model: Any) -> Labels:
    """The labels of a task's model as `read_rows` wants them: names, or a count where they have none."""
    return known_labels([str(model.config.id2label[i]) for i in range(model.config.num_labels)])


def known_labels(names: Sequence[str]) -> Labels:
    """The same from names as a configuration or a manifest has them, which number what has no name."""
    names = tuple(names)
    return len(names) if names == tuple(f"LABEL_{i}" for i in range(len(names))) else names


def hold_out(rows: Sequence[Row], share: float, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """Split rows at random into those to train on and a `share` to validate with, at least one of each."""
    if len(rows) < 2:
        raise DataError("one row cannot be both trained on and held out", try_="give more rows, or validation data")
    order = list(rows)
    random.Random(seed).shuffle(order)
    held = min(max(round(len(order) * share), 1), len(order) - 1)
    return order[held:], order[:held]


def _records(path: Path, columns: tuple[str, ...]) -> Iterator[Record]:
    suffix = path.suffix.lower()
    if suffix not in (*DELIMITERS, *JSON_LINES):
        raise DataError("the format is told by the file's ending", where=str(path), there_is=(*DELIMITERS, *JSON_LINES))
    text = _read(path)
    return _json_records(path, text) if suffix in JSON_LINES else _csv_records(path, text, DELIMITERS[suffix], columns)


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=str(path)) from error
    if not data.strip():
        raise DataError("the file is empty", where=str(path))
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"the file is not UTF-8: byte 0x{data[error.start]:02x} in line {line}",
            where=f"{path}:{line}",
            try_="save it as UTF-8",
        ) from error


def _csv_records(path: Path, text: str, delimiter: str, columns: tuple[str, ...]) -> Iterator[Record]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            values = next(reader, None)
        except csv.Error as error:
            raise DataError(f"malformed CSV: {error}", where=f"{path}:{line}") from error
        if values is None:
            return
        if not values:
            continue
        if header is None:
            header = values
            for column in columns:
                _column(dict.fromkeys(header), column, f"{path}:{line}")
                if header.count(column) > 1:
                    raise DataError(f"column '{column}' is there twice", where=f"{path}:{line}", there_is=header)
        elif len(values) != len(header):
            raise DataError(
                f"{len(values)} values in a row of {len(header)} columns",
                where=f"{path}:{line}",
                there_is=header,
                try_=f'put a value that holds "{delimiter}" in quotes' if len(values) > len(header) else None,
            )
        else:
            yield line, dict(zip(header, values, strict=True))


def _json_records(path: Path, text: str) -> Iterator[Record]:
    for line, source in enumerate(text.split("\n"), 1):
        if not source.strip():
            continue
        try:
            record = json.loads(source)
        except (json.JSONDecodeError, RecursionError) as error:
            reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else "too deep"
            raise DataError(
                f"malformed JSON line: {reason}", where=f"{path}:{line}", try_="write one object a line"
            ) from error
        if not isinstance(record, dict):
            raise DataError("the line is no JSON object", where=f"{path}:{line}", try_="write one object a line")
        yield line, record


def _column(record: Mapping[str, Any], column: str, where: str) -> Any:
    if column not in record:
        close = did_you_mean(column, record)
        raise DataError(f"there is no column '{column}'", where=where, there_is=record, try_=close)
    return record[column]


def _label(value: Any, labels: Labels, where: str) -> int:
    if isinstance(labels, int):
        number = int(value) if isinstance(value, str) and value.isascii() and value.isdecimal() else value
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < labels:
            raise DataError(f"label {_short(value)} is no number from 0 to {labels - 1}", where=where)
        return number
    if not isinstance(value, str) or value not in labels:
        close = did_you_mean(str(value), labels)
        raise DataError(f"unknown label {_short(value)}", where=where, there_is=labels, try_=close)
    return list(labels).index(value)


def _short(value: Any) -> str:
    told = repr(value)
    return told if len(told) <= 60 else told[:57] + "…"
