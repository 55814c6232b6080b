"""From rows to tensors: tokenize once, put rows of like length together, pad each batch to its longest."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from surgeon.errors import DataError
from surgeon.train.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from surgeon.model import TaskModel

POOL = 16


class Example(NamedTuple):
    """A tokenized row."""

    input_ids: list[int]
    token_type_ids: list[int] | None
    label: int


def load_tokenizer(path: str | Path, max_length: int | None = None) -> PreTrainedTokenizerBase:
    """Open the `tokenizer.json` of a build or a base's folder; `max_length` is the most the base can take."""
    from transformers import PreTrainedTokenizerFast

    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise DataError("there is no tokenizer.json", where=str(path), try_="train with your own tokenizer in Python")
    limit = {} if max_length is None else {"model_max_length": max_length}
    try:
        return PreTrainedTokenizerFast(tokenizer_file=str(file), **limit)  # type: ignore[no-untyped-call]
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise DataError(f"the tokenizer cannot be read: {error}", where=str(file)) from error


def encode(model: TaskModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], max_length: int) -> list[Example]:
    """Tokenize rows for the inputs that the model takes, cut to `max_length` or to what the tokenizer says it can."""
    typed = any(i.name == "token_type_ids" for i in model.inputs)
    encoded = tokenizer(
        [row.text for row in rows],
        truncation=True,
        max_length=min(max_length, tokenizer.model_max_length - model.occupied()),
        return_attention_mask=False,
        return_token_type_ids=typed,
    )
    types = encoded["token_type_ids"] if typed else [None] * len(rows)
    return [Example(*fields) for fields in zip(encoded["input_ids"], types, (r.label for r in rows), strict=True)]


def epoch_order(examples: Sequence[Example], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of an epoch, a function of seed and epoch alone: lengths are alike within each, its place is random.

    Rows are sorted by length within shuffled pools of 16 batches, so that little is spent on padding.
    """
    draw = random.Random(f"{seed}/{epoch}")
    order = list(range(len(examples)))
    draw.shuffle(order)
    batches: list[list[int]] = []
    for start in range(0, len(order), batch_size * POOL):
        pool = sorted(order[start : start + batch_size * POOL], key=lambda i: len(examples[i].input_ids))
        batches += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
    draw.shuffle(batches)
    return batches


def pad_id(model: TaskModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills a row up. Raises DataError where neither tokenizer nor base names one."""
    for owner in (tokenizer, model.config):
        found = getattr(owner, "pad_token_id", None)
        if found is not None:
            return int(found)
    raise DataError(
        "neither the tokenizer nor the base names a padding token",
        try_="set `tokenizer.pad_token` and the base's `config.pad_token_id`",
    )


def collate(examples: Sequence[Example], pad: int, device: torch.device) -> dict[str, Tensor]:
    """Tensors of a batch, padded on the right to its longest row, with the mask and the labels."""
    length = max(len(e.input_ids) for e in examples)
    batch = {
        "input_ids": [e.input_ids + [pad] * (length - len(e.input_ids)) for e in examples],
        "attention_mask": [[1] * len(e.input_ids) + [0] * (length - len(e.input_ids)) for e in examples],
    }
    if all(e.token_type_ids is not None for e in examples):
        batch["token_type_ids"] = [(e.token_type_ids or []) + [0] * (length - len(e.input_ids)) for e in examples]
    tensors = {name: torch.tensor(values, device=device) for name, values in batch.items()}
    return tensors | {"labels": torch.tensor([e.label for e in examples], device=device)}


def by_length(examples: Sequence[Example], batch_size: int) -> Iterator[list[Example]]:
    """Batches for evaluation, in order of length."""
    ordered = sorted(examples, key=lambda e: len(e.input_ids))
    for start in range(0, len(ordered), batch_size):
        yield ordered[start : start + batch_size]
