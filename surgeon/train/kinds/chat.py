"""Conversations as a base's chat template writes them, and which part of that the assistant says."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import TemplateError

from surgeon.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = tuple[Mapping[str, str], ...]

ASSISTANT = "assistant"
MARKED = re.compile(r"\{%-?\s*generation\b")
"""How a template says by itself which part the assistant says."""


class Piece(NamedTuple):
    """Tokens, and whether they are learned."""

    ids: list[int]
    learned: bool


def check_messages(found: Any, name: str, where: str) -> Messages:
    """Messages as a file or a caller gives them. Raises DataError for others, or where the assistant is silent."""
    if not isinstance(found, Sequence) or isinstance(found, str) or not found:
        raise DataError(
            f"'{name}' holds no list of messages", where=where, try_='[{"role": "user", "content": "…"}, …]'
        )
    for number, message in enumerate(found, 1):
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise DataError(
                f"message {number} is no object with a text under 'role' and 'content'",
                where=where,
                there_is=message if isinstance(message, Mapping) else None,
            )
        if message["role"] == ASSISTANT and not message["content"].strip():
            raise DataError(f"message {number}: the assistant says nothing", where=where)
    if not any(message["role"] == ASSISTANT for message in found):
        roles = [str(message["role"]) for message in found]
        raise DataError("no message is the assistant's, so nothing is learned", where=where, there_is=roles)
    return tuple(found)


def split_turns(tokenizer: PreTrainedTokenizerBase, messages: Messages, where: str) -> list[Piece]:
    """A conversation in tokens: what stands before each of the assistant's turns, and the turn with its end."""
    if MARKED.search(_template(tokenizer, where)):
        encoded = _render(
            tokenizer, messages, where, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
        return [Piece([token], bool(mask)) for token, mask in pairs]
    whole = _render(tokenizer, messages, where, tokenize=False)
    pieces, done = [], 0
    for number, message in enumerate(messages):
        if message["role"] != ASSISTANT:
            continue
        asked = _render(tokenizer, messages[:number], where, tokenize=False, add_generation_prompt=True)
        answered = _render(tokenizer, messages[: number + 1], where, tokenize=False)
        if not (whole.startswith(answered) and answered.startswith(asked) and len(asked) >= done):
            raise DataError(
                f"the base's chat template writes message {number + 1} another way once the rest is there, so what the "
                "assistant says cannot be told apart",
                where=where,
                try_="a row for each of the assistant's turns, or a template that marks them with {% generation %}",
            )
        pieces += [Piece(_ids(tokenizer, whole[done : len(asked)]), False)]
        pieces += [Piece(_ids(tokenizer, whole[len(asked) : len(answered)]), True)]
        done = len(answered)
    return pieces


def split_last(tokenizer: PreTrainedTokenizerBase, messages: Messages, where: str) -> tuple[str, str]:
    """A conversation as the text before its last message, and that message. Raises DataError where it is another's."""
    if messages[-1]["role"] != ASSISTANT:
        raise DataError("the last message is not the assistant's", where=where, there_is=[m["role"] for m in messages])
    _template(tokenizer, where)
    asked = _render(tokenizer, messages[:-1], where, tokenize=False, add_generation_prompt=True)
    return asked, messages[-1]["content"]


def _template(tokenizer: PreTrainedTokenizerBase, where: str) -> str:
    template = tokenizer.chat_template
    if not isinstance(template, str):
        raise DataError(
            "these are messages, and the base has no chat template",
            where=where,
            try_="rows of prompt and completion, or a chat_template.jinja in the base's folder",
        )
    return template


def _render(tokenizer: PreTrainedTokenizerBase, messages: Messages, where: str, **options: Any) -> Any:
    try:
        return tokenizer.apply_chat_template([dict(message) for message in messages], **options)
    except TemplateError as error:
        raise DataError(f"the base's chat template refuses these messages: {error}", where=where) from error


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a part: the template writes the special ones itself."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
