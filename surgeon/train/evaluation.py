"""How a task's model does on rows: what training looks at after each epoch, and what a user asks for afterwards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from surgeon.errors import DataError
from surgeon.train.batches import by_length, encode
from surgeon.train.kinds import Example, Kind, kind_of, learned
from surgeon.train.processes import ALONE, Processes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from surgeon.model import TaskModel


@dataclass(frozen=True)
class Evaluation:
    """How a model does on rows.

    `accuracy` is the share of labels that are right: of classes, of words, of tokens foretold from those before.
    `exact_match` is the share of rows of which all are, which for a text is what greedy decoding would write; None
    where a row has one label, since that is the accuracy.
    """

    accuracy: float
    loss: float
    exact_match: float | None

    @property
    def perplexity(self) -> float:
        """Among how many tokens the model is undecided: exp of the loss."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def evaluate(
    model: TaskModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Any],
    *,
    max_length: int | None = None,
    batch_size: int = 64,
) -> Evaluation:
    """Accuracy, exact match and mean loss of the model on rows, without dropout."""
    kind = kind_of(model)
    check_rows(kind, rows)
    examples = encode(model, tokenizer, rows, max_length or kind.max_length)
    return evaluate_examples(model, kind, examples, kind.padding(model, tokenizer), batch_size)


def evaluate_examples(
    model: TaskModel,
    kind: Kind[Any],
    examples: list[Example],
    pad: int,
    batch_size: int,
    *,
    processes: Processes = ALONE,
) -> Evaluation:
    """The same for rows that are tokenized already; the model stays in the mode it was in."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    right = labels = exact = 0
    loss = 0.0
    with torch.no_grad():
        for part in by_length(processes.own(examples), batch_size):
            batch = kind.batch(part, pad, device)
            output = model(**batch)
            hit, counted = kind.judged(output, batch)
            right += int((hit & counted).sum())
            exact += int((hit | ~counted).all(-1).sum())
            weight = sum(learned(example) for example in part)
            loss += float(output.loss) * weight
            labels += int(weight)
    model.train(training)
    right, exact, labels, loss = processes.add(torch.tensor([right, exact, labels, loss], dtype=torch.float64)).tolist()
    return Evaluation(right / labels, loss / labels, exact / len(examples) if kind.several else None)


def check_rows(kind: Kind[Any], rows: Sequence[Any]) -> None:
    """Raise DataError where there are no rows, or one does not fit the task."""
    if not rows:
        raise DataError("there are no rows")
    kind.check(rows)
