"""What the base's generation configuration asks of every text, as changes of the next token's scores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from surgeon.errors import DataError
from surgeon.runtime.manifest import Generation
from surgeon.runtime.taskfile import Array


def ruled(scores: Array, generation: Generation, written: Sequence[int], limit: int) -> Array:
    """The scores `[vocabulary]` of the token after `written`, of a text of at most `limit` tokens: -inf for what may
    not come. A decoder's build has no rules.
    """
    if generation.source is None:
        return scores
    rules, start = generation.source.rules, generation.source.start
    if not written and rules.first is not None:
        return _only(scores, rules.first)
    if len(written) == limit - 1 and rules.last is not None:
        return _only(scores, rules.last)
    never = [*rules.banned, *_repeats([start, *written], rules.ngram)]
    if len(written) < rules.least:
        never += generation.ends
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


def check_finite(logits: Array, row: int, tokens: int) -> None:
    """Raise DataError for NaN or infinity after so many tokens."""
    if not np.isfinite(logits).all():
        raise DataError(f"the model gives NaN or infinity after {tokens} tokens of row {row}")
