"""Texts to the base's token ids, with the build's tokenizer.json and without transformers."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from surgeon.errors import BuildError, DataError
from surgeon.runtime.files import read_file
from surgeon.runtime.manifest import TOKENIZER, Manifest, Port
from surgeon.runtime.taskfile import Array

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Text = str | tuple[str, str]


class Texts:
    """The tokenizer of a build. It says itself how to pad, the base's maximum how much to keep."""

    def __init__(self, source: str, max_length: int | None, where: str) -> None:
        self._source, self._max_length, self._where = source, max_length, where
        self._made: Mapping[int | None, Tokenizer] = {}
        self._plain: Tokenizer | None = None
        self._lock = threading.Lock()

    def encode(self, texts: Sequence[Text], ports: Sequence[Port], max_length: int | None = None) -> dict[str, Array]:
        """Arrays for those inputs of the graph that a tokenizer makes. Raises DataError for what is no text."""
        check_texts(texts)
        if not texts:
            raise DataError("there are no texts")
        tokenizer = self._limited(max_length)
        encodings = tokenizer.encode_batch(list(texts))
        if len({len(encoding.ids) for encoding in encodings}) > 1:
            raise BuildError(
                "texts of different lengths need padding, and the tokenizer of this base has none",
                where=self._where,
                try_="run them one by one",
            )
        names = {port.name for port in ports}
        made = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
        return {
            name: np.array([getattr(encoding, field) for encoding in encodings], dtype=np.int64)
            for name, field in made.items()
            if name in names
        }

    def plain(self) -> Tokenizer:
        """The tokenizer that neither pads nor cuts."""
        with self._lock:
            if self._plain is None:
                self._plain = self._make(None)
                self._plain.no_padding()
            return self._plain

    def _limited(self, max_length: int | None) -> Tokenizer:
        """The tokenizer that keeps so many tokens. One is made per length, for truncation is part of its state."""
        limits = [limit for limit in (max_length, self._max_length) if limit is not None]
        limit = min(limits) if limits else None
        with self._lock:
            if limit not in self._made:
                self._made = {**self._made, limit: self._make(limit)}
            return self._made[limit]

    def _make(self, limit: int | None) -> Tokenizer:
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_str(self._source)
        except Exception as error:  # the library raises plain Exception
            raise BuildError(f"cannot be read: {error}", where=self._where) from error
        if limit is None:
            tokenizer.no_truncation()
        else:
            tokenizer.enable_truncation(limit, direction=(tokenizer.truncation or {}).get("direction", "right"))
        padding = tokenizer.padding or _pad_token(tokenizer)
        if padding is not None:
            keep = ("direction", "pad_id", "pad_type_id", "pad_token")
            tokenizer.enable_padding(**{key: padding[key] for key in keep if key in padding})
        return tokenizer


def read_texts(build: Path, manifest: Manifest, *, verify: bool) -> Texts:
    """Open the tokenizer of a build. Raises BuildError where it has none, or another than the manifest says."""
    path = build / TOKENIZER
    if TOKENIZER not in manifest.files:
        raise BuildError(
            "this build has no tokenizer.json: it takes token ids and no texts",
            where=str(build),
            try_="use Session.run with arrays",
        )
    data = read_file(build, TOKENIZER, manifest.files[TOKENIZER], verify=verify)
    try:
        return Texts(data.decode(), manifest.base.max_length, str(path))
    except UnicodeDecodeError as error:
        raise BuildError("is not UTF-8", where=str(path)) from error


def _pad_token(tokenizer: Tokenizer) -> dict[str, Any] | None:
    """The special token made for padding, as `[PAD]` or `<pad>`; checkpoints seldom have more of it than the name."""
    special = {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    pads = [(i, content) for i, content in special.items() if "pad" in content.casefold()]
    return {"pad_id": pads[0][0], "pad_token": pads[0][1]} if len(pads) == 1 else None


def check_texts(texts: Sequence[Text]) -> None:
    """Raise DataError for what is no list of texts."""
    if isinstance(texts, str) or not all(_is_text(text) for text in texts):
        raise DataError("texts are a list of strings, or of pairs of strings", try_="one text is a list of one")


def length(text: Text) -> int:
    """Characters, a stand-in for tokens where only the order matters."""
    return len(text) if isinstance(text, str) else sum(map(len, text))


def _is_text(text: object) -> bool:
    pair = isinstance(text, tuple) and len(text) == 2 and all(isinstance(part, str) for part in text)
    return isinstance(text, str) or pair
