"""What a base of one head is trained on: a class each reads rows, makes batches of them and says how to measure."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from surgeon.errors import DataError, SpecError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from surgeon.model import TaskModel

R = TypeVar("R")

IGNORED = -100
"""The label of a position that is not learned."""


class Example(NamedTuple):
    """A tokenized row. `labels` are its class, or one label a token; `cut` says that not all of it was kept."""

    input_ids: list[int]
    token_type_ids: list[int] | None
    labels: list[int]
    cut: bool = False


class Kind(ABC, Generic[R]):
    """Rows of one kind, from a file to a batch, and what is right about an answer."""

    columns: ClassVar[tuple[str, ...]]
    """What a file calls its columns, unless the user says otherwise."""
    max_length: ClassVar[int]
    """Tokens of a row that are kept, unless the user says otherwise."""
    best_by: ClassVar[Literal["accuracy", "loss"]]
    """What tells the best epoch."""
    several: ClassVar[bool] = True
    """Whether a row has more than one answer: that all are right is then another thing than that one is."""

    def read(self, path: str | Path, renamed: Mapping[str, str]) -> list[R]:
        """The rows of a file; `renamed` gives other names for columns. Raises DataError with the line of a misfit."""
        if unknown := sorted(set(renamed) - set(self.columns)):
            close = did_you_mean(unknown[0], self.columns)
            raise SpecError(f"rows of this task have no '{unknown[0]}'", there_is=self.columns, try_=close)
        return self.rows(path, {name: renamed.get(name, name) for name in self.columns})

    @abstractmethod
    def rows(self, path: str | Path, columns: Mapping[str, str]) -> list[R]:
        """The rows of a file with these columns."""

    @abstractmethod
    def check(self, rows: Sequence[R]) -> None:
        """Raise DataError for a row that was not read from a file and does not fit the task."""

    @abstractmethod
    def encode(self, tokenizer: PreTrainedTokenizerBase, rows: Sequence[R], room: Room) -> list[Example]:
        """Tokenize rows."""

    @abstractmethod
    def targets(self, examples: Sequence[Example], length: int) -> Mapping[str, list[Any]]:
        """The labels of a batch whose texts are padded to `length`, under the names the model takes them by."""

    @abstractmethod
    def judged(self, output: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Which answers are right, and which are counted: `[rows, labels of a row]` each."""

    def padding(self, model: TaskModel, tokenizer: PreTrainedTokenizerBase) -> int:
        """The id that fills a row up. Raises DataError where neither tokenizer nor base names one."""
        for owner in (tokenizer, model.config):
            found = getattr(owner, "pad_token_id", None)
            if found is not None:
                return int(found)
        raise DataError(
            "neither the tokenizer nor the base names a padding token",
            try_="set `tokenizer.pad_token` and the base's `config.pad_token_id`",
        )

    def batch(self, examples: Sequence[Example], pad: int, device: torch.device) -> dict[str, Tensor]:
        """Tensors of a batch, padded on the right to its longest row, with the mask and the labels."""
        length = max(len(e.input_ids) for e in examples)
        arrays: dict[str, list[Any]] = {
            "input_ids": [filled(e.input_ids, length, pad) for e in examples],
            "attention_mask": [filled([1] * len(e.input_ids), length, 0) for e in examples],
        }
        if all(e.token_type_ids is not None for e in examples):
            arrays["token_type_ids"] = [filled(e.token_type_ids or [], length, 0) for e in examples]
        arrays |= self.targets(examples, length)
        return {name: torch.tensor(values, device=device) for name, values in arrays.items()}

    def packed(
        self, examples: Sequence[Example], pad: int, device: torch.device, length: int | None = None
    ) -> dict[str, Tensor]:
        """Several texts in a row of `length`, or as long as the longest. Raises SpecError where none can."""
        raise SpecError("rows of this task are not packed: each has an answer of its own", try_="without packing")


class Room(NamedTuple):
    """What a model leaves a row: tokens to keep, whether it takes token types, and the id that ends a text."""

    length: int
    typed: bool
    end: int | None


def room(model: TaskModel, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Room:
    """`max_length`, or what the tokenizer says the base can take, less what the task's own tokens do."""
    end = tokenizer.eos_token_id
    if end is None:
        end = getattr(model.config, "eos_token_id", None)
    return Room(
        length=min(max_length, tokenizer.model_max_length - model.occupied()),
        typed=any(i.name == "token_type_ids" for i in model.inputs),
        end=end[0] if isinstance(end, list) else end,
    )


def filled(values: list[int], length: int, fill: int) -> list[int]:
    """`values` with `fill` behind, so many in all."""
    return values + [fill] * (length - len(values))


def learned(example: Example) -> int:
    """How many labels of an example are learned: what it weighs in a mean."""
    return sum(label != IGNORED for label in example.labels)
