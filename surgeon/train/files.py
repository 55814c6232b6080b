"""Records of a CSV, TSV or JSON-lines file that a person made, each with the line it is on."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from surgeon.errors import DataError, did_you_mean

DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON_LINES = (".jsonl", ".ndjson", ".json")

Record = tuple[int, Mapping[str, Any]]
R = TypeVar("R")


def read_records(path: str | Path, columns: tuple[str, ...], make: Callable[[Mapping[str, Any], str], R]) -> list[R]:
    """What `make` makes of every record and its place, `FILE:LINE`.

    `columns` must stand in a table's header. Raises DataError with the line of the first record that does not fit, and
    how many there are.
    """
    path = Path(path)
    made: list[R] = []
    faults: list[DataError] = []
    for line, record in _records(path, columns):
        try:
            made.append(make(record, f"{path}:{line}"))
        except DataError as fault:
            faults.append(fault)
    raise_first(faults)
    if not made:
        raise DataError("there are no rows", where=str(path))
    return made


def raise_first(faults: list[DataError]) -> None:
    """Raise the first of the faults, if there is one, and tell how many there are."""
    if faults:
        first = faults[0]
        more = f" (the first of {len(faults)} rows that do not fit)" if len(faults) > 1 else ""
        raise DataError(first.what + more, where=first.where, there_is=first.there_is, try_=first.try_)


def column(record: Mapping[str, Any], name: str, where: str) -> Any:
    """The value of a column. Raises DataError where there is none of that name."""
    if name not in record:
        close = did_you_mean(name, record)
        raise DataError(f"there is no column '{name}'", where=where, there_is=record, try_=close)
    return record[name]


def text_of(record: Mapping[str, Any], name: str, where: str) -> str:
    """The text in a column. Raises DataError where it holds none."""
    text = column(record, name, where)
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"column '{name}' holds no text", where=where)
    return text


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
            for wanted in columns:
                column(dict.fromkeys(header), wanted, f"{path}:{line}")
                if header.count(wanted) > 1:
                    raise DataError(f"column '{wanted}' is there twice", where=f"{path}:{line}", there_is=header)
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
