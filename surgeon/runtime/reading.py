"""What a build reads texts with, opened when the first text comes: its tokenizer, its template of conversations."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from surgeon.errors import BuildError
from surgeon.runtime.files import read_file
from surgeon.runtime.generation.chat import Chat
from surgeon.runtime.manifest import TEMPLATE, TOKENIZER, Manifest
from surgeon.runtime.taskfile import Array
from surgeon.runtime.text import Text, Texts, read_texts

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Reader:
    """The text files of a build."""

    def __init__(self, build: Path, manifest: Manifest, *, verify: bool) -> None:
        self._build, self._manifest, self._verify = build, manifest, verify

    @property
    def has_tokenizer(self) -> bool:
        """Whether the build can read texts at all."""
        return TOKENIZER in self._manifest.files

    @cached_property
    def texts(self) -> Texts:
        """The tokenizer. Raises BuildError where there is none."""
        return read_texts(self._build, self._manifest, verify=self._verify)

    @cached_property
    def chat(self) -> Chat:
        """The base's chat template. Raises BuildError where it has none."""
        generation = self._manifest.generation
        if TEMPLATE not in self._manifest.files or generation is None:
            raise BuildError(
                "this base has no chat template, so it takes no conversations",
                where=str(self._build),
                try_="prompts that are texts",
            )
        data = read_file(self._build, TEMPLATE, self._manifest.files[TEMPLATE], verify=self._verify)
        return Chat(data.decode(), generation.tokens, str(self._build / TEMPLATE))

    @property
    def tokenizer(self) -> Tokenizer:
        """The one that neither pads nor cuts."""
        return self.texts.plain()

    def encode(self, texts: Sequence[Text], max_length: int | None, taken: int) -> dict[str, Array]:
        """The graph's inputs, cut to what is left beside `taken` positions."""
        room = self._manifest.base.max_length
        if room is not None and taken:
            max_length = min(room - taken, max_length or room)
        return self.texts.encode(texts, self._manifest.inputs, max_length)
