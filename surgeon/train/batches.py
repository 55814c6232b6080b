"""From rows to batches: tokenize once, and put rows of like length together."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon.errors import DataError
from surgeon.train.kinds import Example, kind_of, room

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from surgeon.model import TaskModel

POOL = 16
NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")


def load_tokenizer(
    path: str | Path, max_length: int | None = None, beside: Path | None = None
) -> PreTrainedTokenizerBase:
    """Open the `tokenizer.json` of a build or a base's folder; `max_length` is the most the base can take.

    Which tokens begin, end and fill a text, and the chat template, stand in files beside a base's tokenizer: `beside`
    is that folder where it is another.
    """
    from transformers import PreTrainedTokenizerFast

    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise DataError("there is no tokenizer.json", where=str(path), try_="train with your own tokenizer in Python")
    limit = {} if max_length is None else {"model_max_length": max_length}
    said = _said(beside or file.parent)
    try:
        return PreTrainedTokenizerFast(tokenizer_file=str(file), **limit, **said)  # type: ignore[no-untyped-call]
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise DataError(f"the tokenizer cannot be read: {error}", where=str(file)) from error


def _said(folder: Path) -> dict[str, Any]:
    """What `tokenizer_config.json` and `chat_template.jinja` say of special tokens and conversations."""
    path, template = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        said = {name: found[name] for name in NAMED if found.get(name)}
        named = {name: token["content"] if isinstance(token, dict) else token for name, token in said.items()}
        chat = template.read_text(encoding="utf-8") if template.is_file() else found.get("chat_template")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise DataError(f"cannot be read: {error}", where=str(path)) from error
    if isinstance(chat, list):  # several by name
        chat = {entry["name"]: entry["template"] for entry in chat}.get("default")
    return named | ({"chat_template": chat} if chat else {})


def encode(model: TaskModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Any], max_length: int) -> list[Example]:
    """Tokenize rows for the inputs that the model takes, cut to `max_length` or to what the tokenizer says it can."""
    return kind_of(model).encode(tokenizer, rows, room(model, tokenizer, max_length))


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


def by_length(examples: Sequence[Example], batch_size: int) -> Iterator[list[Example]]:
    """Batches for evaluation, in order of length."""
    ordered = sorted(examples, key=lambda e: len(e.input_ids))
    for start in range(0, len(ordered), batch_size):
        yield ordered[start : start + batch_size]
