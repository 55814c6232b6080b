"""How a task's model does on rows: what training looks at after each epoch, and what a user asks for afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from surgeon.errors import DataError, SpecError
from surgeon.train.batches import Example, by_length, collate, encode, pad_id
from surgeon.train.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from surgeon.model import TaskModel


@dataclass(frozen=True)
class Evaluation:
    """How a model does on rows."""

    accuracy: float
    loss: float


def evaluate(
    model: TaskModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    max_length: int = 128,
    batch_size: int = 64,
) -> Evaluation:
    """Accuracy and mean loss of the model on rows, without dropout."""
    check_rows(model, rows)
    return evaluate_examples(model, encode(model, tokenizer, rows, max_length), pad_id(model, tokenizer), batch_size)


def evaluate_examples(model: TaskModel, examples: list[Example], pad: int, batch_size: int) -> Evaluation:
    """The same for rows that are tokenized already; the model stays in the mode it was in."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    right, loss = 0, 0.0
    with torch.no_grad():
        for part in by_length(examples, batch_size):
            batch = collate(part, pad, device)
            output = model(**batch)
            right += int((output.logits.argmax(-1) == batch["labels"]).sum())
            loss += float(output.loss) * len(part)
    model.train(training)
    return Evaluation(right / len(examples), loss / len(examples))


def check_rows(model: TaskModel, rows: Sequence[Row]) -> None:
    """Raise SpecError where the task is no classifier, DataError where a label is none of its own."""
    count = model.config.num_labels
    if model.head_name != "sequence-classification" or count < 2:
        what = f"head '{model.head_name}'" if model.head_name != "sequence-classification" else "a head of one number"
        raise SpecError(
            f"rows of text and label train a classifier, and this task has {what}",
            try_="train Compiled.model(task) with transformers.Trainer",
        )
    if not rows:
        raise DataError("there are no rows")
    if wrong := [row.label for row in rows if not 0 <= row.label < count]:
        raise DataError(f"label {wrong[0]} is no number from 0 to {count - 1}")
