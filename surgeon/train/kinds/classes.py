"""A class for each text: rows of text and label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from surgeon.errors import DataError, SpecError
from surgeon.train.kinds.kind import Example, Kind, Room
from surgeon.train.rows import Labels, Row, read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Classes(Kind[Row]):
    """Sequence classification. A text that is too long loses its end."""

    columns = ("text", "label")
    max_length = 128
    best_by = "accuracy"
    several = False

    def __init__(self, labels: Labels) -> None:
        self.labels = labels
        self.count = labels if isinstance(labels, int) else len(labels)
        if self.count < 2:
            raise SpecError(
                "rows of text and label train a classifier, and this task has a head of one number",
                try_="train Compiled.model(task) with transformers.Trainer",
            )

    def rows(self, path: str | Path, columns: Mapping[str, str]) -> list[Row]:
        """Rows with a text and a label."""
        return read_rows(path, self.labels, columns["text"], columns["label"])

    def check(self, rows: Sequence[Row]) -> None:
        """Raise DataError where a label is none of the task's."""
        if wrong := [row.label for row in rows if not 0 <= row.label < self.count]:
            raise DataError(f"label {wrong[0]} is no number from 0 to {self.count - 1}")

    def encode(self, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], room: Room) -> list[Example]:
        """One label a row."""
        encoded = tokenizer(
            [row.text for row in rows],
            truncation=True,
            max_length=room.length,
            return_attention_mask=False,
            return_token_type_ids=room.typed,
        )
        types = encoded["token_type_ids"] if room.typed else [None] * len(rows)
        return [
            Example(ids, typed, [row.label], cut=bool(whole.overflowing))
            for ids, typed, row, whole in zip(encoded["input_ids"], types, rows, encoded.encodings, strict=True)
        ]

    def targets(self, examples: Sequence[Example], length: int) -> Mapping[str, list[Any]]:
        """Labels `[rows]`."""
        return {"labels": [example.labels[0] for example in examples]}

    def judged(self, output: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """One answer a row."""
        right = (output.logits.argmax(-1) == batch["labels"]).unsqueeze(-1)
        return right, torch.ones_like(right)
