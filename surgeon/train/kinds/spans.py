"""A part of each text: rows of question, context and the answer that stands in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from surgeon.errors import DataError
from surgeon.train.files import column, raise_first, read_records, text_of
from surgeon.train.kinds.kind import Example, Kind, Room

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Question(NamedTuple):
    """One example: the answer begins at character `start` of the context."""

    question: str
    context: str
    answer: str
    start: int
    where: str | None = None


class Spans(Kind[Question]):
    """Extractive question answering. A context that is too long loses its end, but never its answer."""

    columns = ("question", "context", "answer", "start")
    max_length = 384
    best_by = "accuracy"

    def rows(self, path: str | Path, columns: Mapping[str, str]) -> list[Question]:
        """Rows with a question, a context and an answer; `start` may be absent where the answer stands there once."""

        def make(record: Mapping[str, Any], where: str) -> Question:
            question, context, answer = (text_of(record, columns[name], where) for name in self.columns[:3])
            if columns["start"] in record:
                start = _number(column(record, columns["start"], where), columns["start"], where)
            elif context.count(answer) > 1:
                raise DataError(
                    "the answer stands in the context more than once", where=where, try_="its place under 'start'"
                )
            else:
                start = context.find(answer)
            row = Question(question, context, answer, start, where)
            self.check([row])
            return row

        return read_records(path, tuple(columns[name] for name in self.columns[:3]), make)

    def check(self, rows: Sequence[Question]) -> None:
        """Raise DataError where an answer does not stand where it should."""
        for number, row in enumerate(rows, 1):
            if not row.answer.strip() or row.start < 0 or not row.context.startswith(row.answer, row.start):
                place = f"at character {row.start} of" if row.start >= 0 else "in"
                raise DataError(f"the answer does not stand {place} the context", where=row.where or f"row {number}")

    def encode(self, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Question], room: Room) -> list[Example]:
        """The labels are the answer's first and last token."""
        examples: list[Example] = []
        faults: list[DataError] = []
        for number, row in enumerate(rows, 1):
            try:
                examples.append(_example(tokenizer, row, room, row.where or f"row {number}"))
            except DataError as fault:
                faults.append(fault)
        raise_first(faults)
        return examples

    def targets(self, examples: Sequence[Example], length: int) -> Mapping[str, list[Any]]:
        """Positions `[rows]` of the answers' ends."""
        starts, ends = zip(*(example.labels for example in examples), strict=True)
        return {"start_positions": list(starts), "end_positions": list(ends)}

    def judged(self, output: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Two answers a row: where it starts and where it ends."""
        starts = output.start_logits.argmax(-1) == batch["start_positions"]
        ends = output.end_logits.argmax(-1) == batch["end_positions"]
        right = torch.stack((starts, ends), -1)
        return right, torch.ones_like(right)


def _example(tokenizer: PreTrainedTokenizerBase, row: Question, room: Room, where: str) -> Example:
    whole = tokenizer(row.question, row.context).encodings[0]
    before = sum(part == 0 for part in whole.sequence_ids)
    if before >= room.length - 3:
        raise DataError(f"the question has {before} tokens, which leaves no room of {room.length}", where=where)
    encoding = tokenizer(row.question, row.context, truncation="only_second", max_length=room.length).encodings[0]
    end = row.start + len(row.answer)
    within = [
        place
        for place, (part, (begin, stop)) in enumerate(zip(encoding.sequence_ids, encoding.offsets, strict=True))
        if part == 1 and begin < end and stop > row.start
    ]
    if not within or encoding.offsets[within[-1]][1] < len(row.answer.rstrip()) + row.start:
        raise DataError(
            f"the answer is not among the first {room.length} tokens of question and context",
            where=where,
            try_="a shorter context, or more with `--max-length` where the base can take more",
        )
    types = list(encoding.type_ids) if room.typed else None
    return Example(list(encoding.ids), types, [within[0], within[-1]], cut=len(encoding.ids) < len(whole.ids))


def _number(value: Any, name: str, where: str) -> int:
    number = int(value) if isinstance(value, str) and value.isascii() and value.isdecimal() else value
    if isinstance(number, bool) or not isinstance(number, int):
        raise DataError(f"column '{name}' holds no number of a character", where=where)
    return number
