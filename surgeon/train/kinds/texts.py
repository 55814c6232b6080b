"""A text for each text: prompts with their completions, and conversations, of which only the answers are learned."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from surgeon.errors import DataError
from surgeon.train.files import column, raise_first, read_records, text_of
from surgeon.train.kinds.chat import Piece, check_messages, split_last, split_turns
from surgeon.train.kinds.kind import IGNORED, Example, Kind, Room, filled

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from surgeon.model import TaskModel


class Completion(NamedTuple):
    """A prompt, which is read, and a completion, which is learned. `where` is for messages only."""

    prompt: str
    completion: str
    where: str | None = None


class Chat(NamedTuple):
    """A conversation, `{"role": …, "content": …}` a turn, of which the assistant's turns are learned."""

    messages: tuple[Mapping[str, str], ...]
    where: str | None = None


Text = Completion | Chat


class Texts(Kind[Text]):
    """What causal and sequence-to-sequence models have in common. The loss is over what is learned alone."""

    columns = ("prompt", "completion", "messages")
    max_length = 1024
    best_by = "loss"

    def rows(self, path: str | Path, columns: Mapping[str, str]) -> list[Text]:
        """Rows with messages, or else with a prompt, which may be empty, and a completion."""

        def make(record: Mapping[str, Any], where: str) -> Text:
            if columns["messages"] in record:
                return Chat(check_messages(record[columns["messages"]], columns["messages"], where), where)
            prompt = column(record, columns["prompt"], where)
            if not isinstance(prompt, str):
                raise DataError(f"column '{columns['prompt']}' holds no text", where=where)
            return Completion(prompt, text_of(record, columns["completion"], where), where)

        return read_records(path, (columns["prompt"], columns["completion"]), make)

    def check(self, rows: Sequence[Text]) -> None:
        """Raise DataError where there is nothing to learn."""
        for number, row in enumerate(rows, 1):
            if isinstance(row, Chat):
                check_messages(row.messages, "messages", row.where or f"row {number}")
            elif not row.completion.strip():
                raise DataError("the completion is empty", where=row.where or f"row {number}")

    def padding(self, model: TaskModel, tokenizer: PreTrainedTokenizerBase) -> int:
        """The padding id, or any where none is named: the mask hides it, and it is not learned."""
        try:
            return super().padding(model, tokenizer)
        except DataError:
            return 0

    def encode(self, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Text], room: Room) -> list[Example]:
        """Prompts are kept whole, what is learned is cut at its end. Raises DataError where nothing of it is left."""
        if room.end is None:
            raise DataError(
                "neither the tokenizer nor the base names the token that ends a text, so no completion would end",
                try_="set `tokenizer.eos_token`, or the base's `config.eos_token_id`",
            )
        examples: list[Example] = []
        faults: list[DataError] = []
        for number, row in enumerate(rows, 1):
            where = row.where or f"row {number}"
            try:
                examples.append(self.example(tokenizer, row, room, where))
            except DataError as fault:
                faults.append(fault)
        raise_first(faults)
        return examples

    @abstractmethod
    def example(self, tokenizer: PreTrainedTokenizerBase, row: Text, room: Room, where: str) -> Example:
        """Tokenize one row."""


class Causal(Texts):
    """Prompt and completion are one text. They are tokenized apart, so that a prompt is what it is when asked."""

    def example(self, tokenizer: PreTrainedTokenizerBase, row: Text, room: Room, where: str) -> Example:
        """Tokens with their labels; what is not learned has none."""
        ids: list[int] = []
        labels: list[int] = []
        for piece in self._pieces(tokenizer, row, room, where):
            ids += piece.ids
            labels += piece.ids if piece.learned else [IGNORED] * len(piece.ids)
        labels[:1] = [IGNORED]  # nothing stands before the first token to foretell it from
        kept = labels[: room.length]
        if all(label == IGNORED for label in kept):
            before = next((i for i, label in enumerate(labels) if label != IGNORED), len(labels))
            raise DataError(
                f"the prompt has {before} tokens, which leaves nothing of {room.length} for what is learned",
                where=where,
                try_="a shorter prompt, or more with `--max-length` where the base can take more",
            )
        types = [0] * len(kept) if room.typed else None
        return Example(ids[: room.length], types, kept, cut=len(ids) > room.length)

    def packed(
        self, examples: Sequence[Example], pad: int, device: torch.device, length: int | None = None
    ) -> dict[str, Tensor]:
        """Rows of several texts, as `TaskModel` takes them; the sum over their labels is what it is without."""
        length = length or max(len(e.input_ids) for e in examples)
        rows = bins(examples, length)
        arrays = {
            "input_ids": [filled([i for e in row for i in e.input_ids], length, pad) for row in rows],
            "texts": [filled([n for n, e in enumerate(row, 1) for _ in e.input_ids], length, 0) for row in rows],
            "labels": [filled([i for e in row for i in e.labels], length, IGNORED) for row in rows],
        }
        if all(e.token_type_ids is not None for e in examples):
            arrays["token_type_ids"] = [[0] * length for _ in rows]
        return {name: torch.tensor(values, device=device) for name, values in arrays.items()}

    def targets(self, examples: Sequence[Example], length: int) -> Mapping[str, list[Any]]:
        """Labels `[rows, length]`; the loss shifts them."""
        return {"labels": [filled(example.labels, length, IGNORED) for example in examples]}

    def judged(self, output: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Each token foretold from those before it: where all are right, greedy decoding writes this very text."""
        labels = batch["labels"][:, 1:]
        return output.logits[:, :-1].argmax(-1) == labels, labels != IGNORED

    @staticmethod
    def _pieces(tokenizer: PreTrainedTokenizerBase, row: Text, room: Room, where: str) -> list[Piece]:
        assert room.end is not None
        if isinstance(row, Chat):
            return split_turns(tokenizer, row.messages, where)
        prompt = tokenizer(row.prompt)["input_ids"]
        completion = tokenizer(row.completion, add_special_tokens=False)["input_ids"]
        return [Piece(prompt, False), Piece([*completion, room.end], True)]


class SequenceToSequence(Texts):
    """The encoder reads the prompt, the decoder learns the completion. Both are cut to the same length."""

    def example(self, tokenizer: PreTrainedTokenizerBase, row: Text, room: Room, where: str) -> Example:
        """The prompt's tokens, and the completion's as labels."""
        prompt, completion = (
            split_last(tokenizer, row.messages, where) if isinstance(row, Chat) else (row.prompt, row.completion)
        )
        ids, labels = tokenizer(prompt)["input_ids"], tokenizer(completion)["input_ids"]
        if labels[-1:] != [room.end]:
            labels = [*labels, room.end]
        if len(ids) > room.length or not ids:
            what = f"has {len(ids)} tokens, and {room.length} are kept" if ids else "has no tokens"
            raise DataError(
                f"the prompt {what}",
                where=where,
                try_="a shorter prompt, or more with `--max-length` where the base can take more" if ids else None,
            )
        return Example(
            ids, [0] * len(ids) if room.typed else None, labels[: room.length], cut=len(labels) > room.length
        )

    def targets(self, examples: Sequence[Example], length: int) -> Mapping[str, list[Any]]:
        """Labels `[rows, longest completion]`."""
        longest = max(len(example.labels) for example in examples)
        return {"labels": [filled(example.labels, longest, IGNORED) for example in examples]}

    def judged(self, output: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Each token foretold from the prompt and those before it."""
        return output.logits.argmax(-1) == batch["labels"], batch["labels"] != IGNORED


def bins(examples: Sequence[Example], length: int) -> list[list[Example]]:
    """Examples in as few rows of at most `length` tokens as first fit, the longest first, needs."""
    rows: list[list[Example]] = []
    left: list[int] = []
    for example in sorted(examples, key=lambda e: -len(e.input_ids)):
        size = len(example.input_ids)
        place = next((i for i, room in enumerate(left) if room >= size), len(rows))
        if place == len(rows):
            rows.append([])
            left.append(length)
        rows[place].append(example)
        left[place] -= size
    return rows
