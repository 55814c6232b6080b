"""What a caller asks to be written, checked: prompts become rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, cast

import numpy as np

from surgeon.errors import DataError
from surgeon.runtime.feeds import SEQUENCE
from surgeon.runtime.generation.chat import Chat, Message
from surgeon.runtime.generation.options import Choice
from surgeon.runtime.generation.rows import Listener, Row, Voice

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from surgeon.runtime.reading import Reader
    from surgeon.runtime.tasks import RunnableTask

Prompt = str | Sequence[int] | Sequence[Message]
"""A text, token ids, or a conversation."""


def ask(
    prompts: Sequence[Prompt],
    reader: Reader,
    *,
    tasks: Sequence[RunnableTask | None],
    room: int | None,
    taken: Callable[[RunnableTask | None, str], int],
    start: int | None = None,
    choice: Choice,
    limit: int,
    seed: int,
    stop: Sequence[str],
    stream: Listener | None,
) -> list[Row]:
    """A row for each prompt, of its one of the `tasks`. Raises DataError for what is no prompt, is empty or too long.

    The base has `room` positions, of which a task's own tokens take some; the last token written needs none. To an
    encoder-decoder a prompt is a source, and a text of its own begins with the token `start`.
    """
    chats = any(map(_is_chat, prompts))
    words = bool(stop) or stream is not None or chats or any(isinstance(prompt, str) for prompt in prompts)
    tokenizer = reader.tokenizer if words or reader.has_tokenizer else None
    chat = reader.chat if chats else None
    rows = []
    for number, (prompt, task) in enumerate(zip(prompts, tasks, strict=True)):
        ids = _read(prompt, number, tokenizer, chat)
        own = taken(task, SEQUENCE)
        _check(ids, number, room, own)
        begun, before = (ids, own) if start is None else ([start], taken(task, f"decoder_{SEQUENCE}"))
        most = limit if room is None else min(limit, room - before - len(begun) + 1)
        say = None if stream is None else partial(stream, number)
        voice = None if tokenizer is None else Voice(tokenizer, stop, say)
        source = () if start is None else ids
        rows.append(Row(number, begun, most, np.random.default_rng(seed + number), choice, task, voice, source))
    return rows


def check_list(prompts: object) -> None:
    """Raise DataError for what is no list of prompts."""
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise DataError("prompts are a list", try_="one prompt is a list of one")


def _check(ids: Sequence[int], number: int, room: int | None, taken: int) -> None:
    """Raise DataError for a prompt that is empty or too long."""
    if not ids:
        raise DataError(f"prompt {number} has no tokens", try_="a prompt has at least one word")
    if room is not None and len(ids) + taken > room:
        raise DataError(
            f"prompt {number} has {len(ids)} tokens, the base takes {room - taken} at most",
            there_is=f"tokens of the task's own: {taken}" if taken else None,
            try_="a shorter prompt: none is cut here",
        )


def _is_chat(prompt: Prompt) -> bool:
    """Whether a prompt is a conversation."""
    return isinstance(prompt, list | tuple) and any(isinstance(message, Mapping) for message in prompt)


def _read(prompt: Prompt, number: int, tokenizer: Tokenizer | None, chat: Chat | None) -> list[int]:
    """Token ids of a prompt of any kind."""
    if tokenizer is not None and isinstance(prompt, str):
        return list(tokenizer.encode(prompt).ids)
    if tokenizer is not None and chat is not None and _is_chat(prompt):
        text = chat.render(cast(Sequence[Message], prompt), number)
        return list(tokenizer.encode(text, add_special_tokens=False).ids)  # the template writes them
    ids = np.asarray(prompt) if isinstance(prompt, list | tuple | np.ndarray) else np.asarray("")
    if ids.ndim != 1 or (ids.size and (ids.dtype.kind not in "iu" or ids.min() < 0)):
        raise DataError(f"prompt {number} is no text, conversation or list of token ids", there_is=repr(prompt)[:80])
    return [int(i) for i in ids]
