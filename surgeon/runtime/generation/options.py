"""How the next token is chosen: what may be asked for, and the choice itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from surgeon.errors import SpecError
from surgeon.runtime.taskfile import Array


@dataclass(frozen=True)
class Choice:
    """The likeliest token where `temperature` is 0; else one drawn from what `top_k` and `top_p` leave."""

    temperature: float
    top_k: int | None
    top_p: float | None
    repetition_penalty: float

    def next(self, logits: Array, before: Sequence[int], rng: np.random.Generator) -> int:
        """The token after `before`, from its logits `[vocabulary]`."""
        if self.temperature == 0 and self.repetition_penalty == 1:
            return int(logits.argmax())
        scores = self.penalised(logits.astype(np.float64), before)
        if self.temperature == 0:
            return int(scores.argmax())
        shares = self._shares(scores)
        # Of the last that has a share: the sum may be a rounding below 1.
        return int(min(np.searchsorted(shares.cumsum(), rng.random(), side="right"), shares.nonzero()[0][-1]))

    def penalised(self, scores: Array, before: Sequence[int]) -> Array:
        """The scores, of which those of earlier tokens are made smaller in place.

        Keskar et al., "CTRL" (arXiv:1909.05858), section 4.1.
        """
        if self.repetition_penalty != 1:
            seen = np.unique(np.asarray(before))
            scores[seen] *= np.where(scores[seen] < 0, self.repetition_penalty, 1 / self.repetition_penalty)
        return scores

    def _shares(self, scores: Array) -> Array:
        """Probabilities to draw from: the `top_k` likeliest, and of these the fewest that have `top_p` together."""
        scores = scores / self.temperature
        order = np.argsort(-scores, kind="stable")[: self.top_k]
        shares = np.exp(scores[order] - scores[order[0]])
        shares /= shares.sum()
        if self.top_p is not None:
            shares = np.where(shares.cumsum() - shares < self.top_p, shares, 0.0)
        every = np.zeros_like(scores)
        every[order] = shares / shares.sum()
        return every


def choice(
    temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None, repetition_penalty: float = 1.0
) -> Choice:
    """Check the options. Raises SpecError for what is out of range, or has no effect."""
    if not _number(temperature) or temperature < 0:
        raise SpecError(f"temperature is a number from 0 up, not {temperature!r}", try_="0 takes the likeliest token")
    if top_k is not None and (not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1):
        raise SpecError(f"top_k is a number of tokens from 1 up, not {top_k!r}")
    if top_p is not None and (not _number(top_p) or not 0 < top_p <= 1):
        raise SpecError(f"top_p is a share above 0 and up to 1, not {top_p!r}")
    if not _number(repetition_penalty) or repetition_penalty <= 0:
        raise SpecError(f"repetition_penalty is a number above 0, not {repetition_penalty!r}", try_="1 changes nothing")
    if temperature == 0 and (top_k, top_p) != (None, None):
        raise SpecError("top_k and top_p need a temperature: with 0 the likeliest token is taken", try_="temperature=1")
    return Choice(float(temperature), top_k, top_p, float(repetition_penalty))


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_counts(
    *, max_new_tokens: int = 1, batch: int = 1, seed: int = 0, stop: str | Sequence[str] = ()
) -> tuple[str, ...]:
    """Check the other options; returns the stop strings. Raises SpecError."""
    for name, value, least in (("max_new_tokens", max_new_tokens, 1), ("batch", batch, 1), ("seed", seed, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise SpecError(f"{name} is a whole number from {least} up, not {value!r}")
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(word, str) and word for word in stops):
        raise SpecError(f"stop is a string or a list of strings that are not empty, not {stop!r}")
    return stops
