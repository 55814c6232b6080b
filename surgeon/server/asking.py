"""A request of OpenAI's protocol, read: what a client may ask of this server, and a word on what it may not."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surgeon.errors import DataError, shorten
from surgeon.runtime.generation import Prompt

TOKENS, CHAT_TOKENS = 16, 256
"""Tokens at most where a request does not say; the first is OpenAI's own number."""
MOST = 16
"""Texts of one request."""
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "best_of": (None, 1), "echo": (None, False), "logprobs": (None, False), "top_logprobs": (None, 0),
    "suffix": (None, ""),
    "presence_penalty": (None, 0), "frequency_penalty": (None, 0), "logit_bias": (None, {}), "tools": (None, []),
    "functions": (None, []), "response_format": (None, {"type": "text"}), "modalities": (None, ["text"]),
}  # fmt: skip
"""What is only read where it asks for nothing."""


@dataclass(frozen=True)
class Ask:
    """Prompts, and options as `Session.generate` takes them; `usage` closes a stream with the counts."""

    model: str
    prompts: list[Prompt]
    options: Mapping[str, Any]
    stream: bool
    usage: bool


def read_ask(doc: Mapping[str, Any], *, chat: bool) -> Ask:
    """Read a request. Raises DataError for what is missing, of another kind, or not done here."""
    model = doc.get("model")
    if not isinstance(model, str):
        raise DataError("'model' is missing", try_="the name of a task; /v1/models lists them")
    for name, neutral in NEUTRAL.items():
        if doc.get(name) not in neutral:
            raise DataError(f"'{name}' is not done here", try_="leave it out")
    count = _whole(doc, "n", 1)
    prompts = [_messages(doc)] if chat else _prompts(doc.get("prompt"))
    prompts = [prompt for prompt in prompts for _ in range(count)]
    if len(prompts) > MOST:
        raise DataError(f"the request asks for {len(prompts)} texts, and {MOST} are the most")
    extra = doc.get("stream_options") or {}
    return Ask(
        model=model,
        prompts=prompts,
        options=_options(doc, chat),
        stream=doc.get("stream") is True,
        usage=isinstance(extra, Mapping) and extra.get("include_usage") is True,
    )


def _options(doc: Mapping[str, Any], chat: bool) -> dict[str, Any]:
    tokens = "max_completion_tokens" if chat and doc.get("max_completion_tokens") is not None else "max_tokens"
    temperature = _number(doc, "temperature", 1.0)
    options: dict[str, Any] = {
        "max_new_tokens": _whole(doc, tokens, CHAT_TOKENS if chat else TOKENS),
        "temperature": temperature,
        "repetition_penalty": _number(doc, "repetition_penalty", 1.0),
        "seed": _whole(doc, "seed", secrets.randbelow(1 << 31), least=0),
        "stop": _stops(doc.get("stop")),
    }
    if temperature > 0:  # with 0 the likeliest token is taken, and what is left to draw from does not matter
        top_p = _number(doc, "top_p", 1.0)
        options["top_p"] = None if top_p == 1 else top_p
        options["top_k"] = None if doc.get("top_k") is None else _whole(doc, "top_k", 1)
    return options


def _prompts(prompt: Any) -> list[Prompt]:
    """A text, token ids, or a list of either."""
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise DataError("'prompt' is missing", try_="a text, token ids, or a list of either")
    if all(type(item) is int for item in prompt):
        return [prompt]
    if all(isinstance(item, str) for item in prompt):
        return list(prompt)
    if all(isinstance(item, list) and item and all(type(token) is int for token in item) for item in prompt):
        return list(prompt)
    raise DataError("'prompt' is neither a text, nor token ids, nor a list of either", there_is=repr(prompt)[:80])


def _messages(doc: Mapping[str, Any]) -> Prompt:
    messages = doc.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise DataError("'messages' is missing or empty", try_='[{"role": "user", "content": "…"}]')
    return [{**message, "content": _content(message.get("content"))} for message in messages]


def _content(content: Any) -> str:
    """A text, or parts that are texts."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        return "".join(part["text"] for part in content)
    raise DataError("a message's content is a text", there_is=repr(content)[:80])


def _stops(stop: Any) -> Sequence[str]:
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or len(stops) > MOST or not all(isinstance(word, str) and word for word in stops):
        raise DataError("'stop' is a string, or a list of strings that are not empty", there_is=shorten([repr(stop)]))
    return stops


def _whole(doc: Mapping[str, Any], name: str, default: int, *, least: int = 1) -> int:
    value = doc.get(name)
    if value is None:
        return default
    if type(value) is not int or value < least:
        raise DataError(f"'{name}' is a whole number from {least} up", there_is=repr(value)[:80])
    return value


def _number(doc: Mapping[str, Any], name: str, default: float) -> float:
    value = doc.get(name)
    if value is None:
        return default
    if type(value) not in {int, float}:
        raise DataError(f"'{name}' is a number", there_is=repr(value)[:80])
    return float(value)
