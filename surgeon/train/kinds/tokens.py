"""A class for each word: rows of words and their labels, for named entities and parts of speech."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from surgeon.errors import DataError
from surgeon.train.files import column, read_records
from surgeon.train.kinds.kind import IGNORED, Example, Kind, Room, filled
from surgeon.train.rows import Labels, label_number

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Words(NamedTuple):
    """One example: words, and the number of each one's label."""

    words: tuple[str, ...]
    labels: tuple[int, ...]
    where: str | None = None


class TokenClasses(Kind[Words]):
    """Token classification. A word's label is that of its first token; its other tokens have none."""

    columns = ("tokens", "labels")
    max_length = 128
    best_by = "accuracy"

    def __init__(self, labels: Labels) -> None:
        self.labels = labels
        self.count = labels if isinstance(labels, int) else len(labels)

    def rows(self, path: str | Path, columns: Mapping[str, str]) -> list[Words]:
        """Rows with a list of words and one of labels; in a table both are written with spaces between."""

        def listed(record: Mapping[str, Any], name: str, where: str) -> list[Any]:
            found = column(record, name, where)
            found = found.split() if isinstance(found, str) else found
            if not isinstance(found, list) or not found:
                raise DataError(f"column '{name}' holds no list", where=where)
            return found

        def make(record: Mapping[str, Any], where: str) -> Words:
            words = listed(record, columns["tokens"], where)
            labels = listed(record, columns["labels"], where)
            if not all(isinstance(word, str) and word.strip() for word in words):
                raise DataError(f"column '{columns['tokens']}' holds something that is no word", where=where)
            if len(words) != len(labels):
                raise DataError(f"{len(words)} words and {len(labels)} labels", where=where, try_="one label a word")
            return Words(tuple(words), tuple(label_number(label, self.labels, where) for label in labels), where)

        return read_records(path, (columns["tokens"], columns["labels"]), make)

    def check(self, rows: Sequence[Words]) -> None:
        """Raise DataError where words and labels are not as many, or a label is none of the task's."""
        for number, row in enumerate(rows, 1):
            where = row.where or f"row {number}"
            if len(row.words) != len(row.labels) or not row.words:
                raise DataError(f"{len(row.words)} words and {len(row.labels)} labels", where=where)
            if wrong := [label for label in row.labels if not 0 <= label < self.count]:
                raise DataError(f"label {wrong[0]} is no number from 0 to {self.count - 1}", where=where)

    def encode(self, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Words], room: Room) -> list[Example]:
        """The words with a space between, as they are tokenized when the task runs."""
        encoded = tokenizer([" ".join(row.words) for row in rows], truncation=True, max_length=room.length)
        return [self._example(row, whole, typed=room.typed) for row, whole in zip(rows, encoded.encodings, strict=True)]

    @staticmethod
    def _example(row: Words, encoding: Any, *, typed: bool) -> Example:
        ends = list(accumulate(len(word) + 1 for word in row.words))
        labels, last = [], -1
        for (start, end), special in zip(encoding.offsets, encoding.special_tokens_mask, strict=True):
            # A token's last character tells its word: some tokenizers let the space before belong to it.
            word = next(i for i, stop in enumerate(ends) if end <= stop) if end > start and not special else last
            labels.append(row.labels[word] if word > last else IGNORED)
            last = max(word, last)
        types = list(encoding.type_ids) if typed else None
        return Example(list(encoding.ids), types, labels, cut=bool(encoding.overflowing))

    def targets(self, examples: Sequence[Example], length: int) -> Mapping[str, list[Any]]:
        """Labels `[rows, length]`."""
        return {"labels": [filled(example.labels, length, IGNORED) for example in examples]}

    def judged(self, output: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """One answer a word."""
        return output.logits.argmax(-1) == batch["labels"], batch["labels"] != IGNORED
