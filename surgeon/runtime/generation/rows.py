"""One text in the making: its tokens, its words as they come, and why it ends."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from surgeon.runtime.generation.options import Choice

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from surgeon.runtime.tasks import RunnableTask

Reason = Literal["end", "stop", "length", "gone"]
Listener = Callable[[int, str], None]
"""Gets a row's number and what it goes on with."""


@dataclass(frozen=True)
class Written:
    """A text that was written: without the prompt, an end token and a stop string.

    `tokens` are all that the model gave. `reason` is `end` for its own end, `stop` for a stop string, `length` where
    it was cut, `gone` where nobody waited for it. `text` is empty where the build has no tokenizer; `prompt` is how
    many tokens the prompt had.
    """

    text: str
    tokens: tuple[int, ...]
    reason: Reason
    prompt: int


@dataclass(eq=False)
class Row:
    """A row of a batch: a prompt's tokens, and those written so far; an encoder-decoder's has a source beside.

    `choice` is how its next token is chosen, `task` the one that writes it, None for the base.
    """

    number: int
    prompt: Sequence[int]
    limit: int
    rng: np.random.Generator
    choice: Choice
    task: RunnableTask | None = None
    voice: Voice | None = None
    source: Sequence[int] = ()
    tokens: list[int] = field(default_factory=list)
    reason: Reason | None = None

    def push(self, token: int, ends: Collection[int]) -> None:
        """Take the next token, and say whether the text is at its end."""
        self.tokens.append(token)
        if token in ends:
            self.reason = "end"
        elif self.voice is not None and self.voice.push(token):
            self.reason = "stop"
        elif len(self.tokens) >= self.limit:
            self.reason = "length"
        if self.reason and self.voice is not None:
            self.voice.finish(self.tokens[:-1] if self.reason == "end" else self.tokens)

    @property
    def written(self) -> Written:
        """The whole of it."""
        assert self.reason is not None
        return Written(
            "" if self.voice is None else self.voice.text,
            tuple(self.tokens),
            self.reason,
            len(self.source or self.prompt),
        )


class Voice:
    """Tokens to text as they come. What may be the beginning of a stop string is held back until it is none."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], say: Callable[[str], None] | None) -> None:
        from tokenizers.decoders import DecodeStream

        self.text = ""
        self._tokenizer, self._stop, self._say = tokenizer, stop, say
        self._stream = DecodeStream(skip_special_tokens=True)
        self._said = 0
        self._stopped = False

    def push(self, token: int) -> bool:
        """Go on by a token; whether a stop string is met, which ends the text before it."""
        known = len(self.text)
        self.text += self._stream.step(self._tokenizer, token) or ""
        self._cut(known)
        if not self._stopped:
            self._speak(len(self.text) - self._held())
        return self._stopped

    def finish(self, tokens: Sequence[int]) -> None:
        """Say what was held back: no more comes."""
        if not self._stopped:
            whole = self._tokenizer.decode(tokens, skip_special_tokens=True)
            if whole.startswith(self.text):  # a character that never became whole
                known = len(self.text)
                self.text = whole
                self._cut(known)
        self._speak(len(self.text))

    def _cut(self, known: int) -> None:
        """End the text before the first stop string, which lies at least in part behind what was known before."""
        found = [self.text.find(word, max(known - len(word) + 1, 0)) for word in self._stop]
        places = [place for place in found if place >= 0]
        if places:
            self.text, self._stopped = self.text[: min(places)], True

    def _held(self) -> int:
        """How much at the end may be the beginning of a stop string."""
        sizes = range(1, max(map(len, self._stop), default=1))
        return max((n for n in sizes if any(w.startswith(self.text[-n:]) for w in self._stop if len(w) > n)), default=0)

    def _speak(self, end: int) -> None:
        if self._say is not None and end > self._said:
            self._say(self.text[self._said : end])
        self._said = max(self._said, end)
