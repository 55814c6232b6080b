"""Words of a spec as token ids of the base, with the base's own tokenizer."""

from __future__ import annotations

import re
from pathlib import Path

from tokenizers import Tokenizer

from surgeon.errors import SpecError, did_you_mean

SPECIAL = re.compile(r"\[[A-Z]+\d*\]|<[^<>\s]+>")
"""How special tokens are written; cut into pieces, such a word would be a misspelt one."""


def tokenize(path: Path | None, text: str) -> list[int]:
    """Ids of `text` alone. Raises SpecError without a tokenizer, or where the tokenizer does not know a part of it."""
    if path is None:
        raise SpecError(
            f"'{text}' are words, and this base has no tokenizer",
            try_="a base with a tokenizer.json, or leave the words out",
        )
    tokenizer = Tokenizer.from_file(str(path))
    for word in SPECIAL.findall(text):
        if tokenizer.token_to_id(word) is None:
            special = [t.content for t in tokenizer.get_added_tokens_decoder().values()]
            close = did_you_mean(word, tokenizer.get_vocab())
            raise SpecError(f"'{word}' is no token of this base", there_is=special or None, try_=close)
    encoding = tokenizer.encode(text, add_special_tokens=False)
    unknown = getattr(tokenizer.model, "unk_token", None)
    for token, (start, end) in zip(encoding.tokens, encoding.offsets, strict=True):
        if unknown is not None and token == unknown and text[start:end] != unknown:
            raise SpecError(f"the tokenizer of this base does not know '{text[start:end]}'", try_="another word")
    if not encoding.ids:
        raise SpecError(f"'{text}' has no tokens", try_="some words")
    return [int(i) for i in encoding.ids]
