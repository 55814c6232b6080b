"""Beam search: of all continuations of the best texts so far, the best go on; the best that ended is the answer.

The order of what is kept, scored and dropped is that of transformers, so that the tokens are its tokens: a text's score
is the sum of its log probabilities over length**length_penalty, and only an end among the best `count` continuations
ends a text. Scores are float32, as there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

from surgeon.errors import SpecError
from surgeon.runtime.taskfile import Array

NEVER = np.float32(-1e9)
"""Below it are texts that no rule allows."""


@dataclass(frozen=True)
class Beams:
    """How wide to search, what a long text gains, and whether to end as soon as `count` texts have ended."""

    count: int
    length_penalty: float = 1.0
    early: bool = False


class Search:
    """The search for one text of at most `limit` tokens.

    `scored(log_probabilities, tokens)` applies what is asked of the next token after these.
    """

    def __init__(
        self, beams: Beams, limit: int, ends: Collection[int], scored: Callable[[Array, list[int]], Array]
    ) -> None:
        self.running: list[list[int]] = [[]]
        self.done = False
        self._scores = np.zeros(1, np.float32)
        self._ended: list[tuple[np.float32, list[int]]] = []
        self._beams, self._limit, self._ends, self._scored = beams, limit, ends, scored

    @property
    def best(self) -> list[int]:
        """The best text that has ended."""
        return self._ended[0][1]

    def step(self, logits: Array) -> list[int]:
        """Take the logits `[running, vocabulary]` after every running text; tells which of them each new one goes on
        from.
        """
        count, length = self._beams.count, len(self.running[0]) + 1
        rows = [self._scored(_log_softmax(row), tokens) for row, tokens in zip(logits, self.running, strict=True)]
        sums = (np.stack(rows) + self._scores[:, None]).ravel()
        best = _largest(sums, max(2, 1 + len(self._ends)) * count)
        found = [(int(at) // logits.shape[1], int(at) % logits.shape[1], sums[at]) for at in best]
        hits = [token in self._ends or length >= self._limit for _, token, _ in found]
        full = self._beams.early and len(self._ended) == count
        for (origin, token, score), hit in list(zip(found, hits, strict=True))[:count]:
            if hit and not full and score > NEVER:
                self._ended.append((self._per_length(score, length), [*self.running[origin], token]))
        self._ended = sorted(self._ended, key=lambda text: -text[0])[:count]
        going = [item for item, hit in zip(found, hits, strict=True) if not hit][:count]
        self.done = self._is_done(going, length)
        self.running = [[*self.running[origin], token] for origin, token, _ in going]
        self._scores = np.array([score for _, _, score in going], np.float32)
        return [origin for origin, _, _ in going]

    def _per_length(self, score: np.float32, length: int) -> np.float32:
        return np.float32(score / np.float32(length**self._beams.length_penalty))

    def _is_done(self, going: list[tuple[int, int, np.float32]], length: int) -> bool:
        """Whether nothing goes on, or (as is guessed from the best that does) nothing better can come."""
        if not going or len(self._ended) < self._beams.count:
            return not going
        return self._beams.early or bool(self._per_length(going[0][2], length) <= self._ended[-1][0])


def check_beams(
    beams: int,
    length_penalty: float,
    early_stopping: bool,
    *,
    drawn: bool,
    stop: Sequence[str],
    stream: object,
    decoder: bool,
) -> Beams | None:
    """Check the options; None where there is one beam, which is no search. Raises SpecError."""
    if not isinstance(beams, int) or isinstance(beams, bool) or beams < 1:
        raise SpecError(f"beams is a whole number from 1 up, not {beams!r}", try_="1 takes the likeliest token")
    number = isinstance(length_penalty, int | float) and not isinstance(length_penalty, bool)
    if not number or not np.isfinite(length_penalty):
        raise SpecError(f"length_penalty is a number, not {length_penalty!r}", try_="1: a score is one a token")
    if not isinstance(early_stopping, bool):
        raise SpecError(f"early_stopping is true or false, not {early_stopping!r}")
    if beams == 1:
        if length_penalty != 1 or early_stopping:
            raise SpecError("length_penalty and early_stopping are of a beam search", try_="beams=4")
        return None
    if decoder:
        raise SpecError("beams are for encoder-decoders, and this base is a decoder", try_="beams=1")
    for there, what in ((drawn, "a temperature"), (bool(stop), "stop strings"), (stream is not None, "stream")):
        if there:
            raise SpecError(f"beams do not go with {what}: only at its end is it known which text is the best")
    return Beams(beams, float(length_penalty), early_stopping)


def _largest(values: Array, count: int) -> Array:
    """The places of the largest values, in order."""
    some = np.argpartition(-values, count)[:count] if count < values.size else np.arange(values.size)
    order: Array = some[np.lexsort((some, -values[some]))]
    return order


def _log_softmax(logits: Array) -> Array:
    logits = logits.astype(np.float32)
    shifted = logits - logits.max()
    result: Array = shifted - np.log(np.exp(shifted).sum())
    return result
