"""What the base's generation configuration asks of every text, as changes of the next token's scores."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from surgeon.runtime.manifest import Rules
from surgeon.runtime.taskfile import Array


def ruled(
    scores: Array, rules: Rules, written: Sequence[int], *, start: int, limit: int, ends: Collection[int]
) -> Array:
    """The scores `[vocabulary]` of the token after `written`, of a text that starts with `start`: -inf for what may
    not come. It has `limit` tokens at most.
    """
    if not written and rules.first is not None:
        return _only(scores, rules.first)
    if len(written) == limit - 1 and rules.last is not None:
        return _only(scores, rules.last)
    never = [*rules.banned, *_repeats([start, *written], rules.ngram)]
    if len(written) < rules.least:
        never += ends
    if never:
        scores = scores.copy()
        scores[never] = -np.inf
    return scores


def _only(scores: Array, token: int) -> Array:
    forced = np.full_like(scores, -np.inf)
    forced[token] = 0
    return forced


def _repeats(tokens: Sequence[int], size: int) -> list[int]:
    """Tokens that would end a sequence of `size` which is there already."""
    if not size or len(tokens) < size:
        return []
    last = tokens[len(tokens) - size + 1 :]
    places = range(len(tokens) - size + 1)
    return [tokens[at + size - 1] for at in places if tokens[at : at + size - 1] == last]
