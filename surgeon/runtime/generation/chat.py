"""Conversations to prompts, by the base's own chat template and without transformers.

A template is code of the base's makers. It runs in jinja2's sandbox, where it can change nothing and reach nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from surgeon.errors import BuildError, DataError, SpecError, shorten

Message = Mapping[str, Any]
"""`{"role": "user", "content": "…"}`, and what else the template reads."""


class Chat:
    """A template, and the special tokens that it may name."""

    def __init__(self, template: str, tokens: Mapping[str, str], where: str) -> None:
        try:
            from jinja2 import TemplateError
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ModuleNotFoundError as error:
            raise SpecError(
                "conversations need jinja2, which is not installed", try_="pip install 'modelsurgeon[chat]'"
            ) from error
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.globals.update(raise_exception=_refuse, strftime_now=lambda form: datetime.now().strftime(form))
        self._tokens = dict(tokens)
        self._fault = TemplateError
        try:
            self._template = environment.from_string(template)
        except TemplateError as error:
            raise BuildError(f"the chat template cannot be read: {error}", where=where) from error

    def render(self, messages: Sequence[Message], number: int = 0) -> str:
        """The prompt that the assistant's answer goes on from. Raises DataError for what is no conversation."""
        if not messages or not all(isinstance(m, Mapping) and isinstance(m.get("role"), str) for m in messages):
            raise DataError(
                f"prompt {number} is no conversation", try_="a list of {'role': 'user', 'content': '…'}, at least one"
            )
        try:
            return str(self._template.render(messages=list(messages), add_generation_prompt=True, **self._tokens))
        except (self._fault, TypeError, ValueError) as error:
            raise DataError(
                f"the base's chat template does not take prompt {number}: {error}",
                there_is=f"roles {shorten(str(m['role']) for m in messages)}",
            ) from error


def _tojson(value: Any, indent: int | None = None) -> str:
    """jinja2's own filter would write for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    """What templates call where roles do not alternate, say."""
    raise ValueError(message)
