"""The files that a base's weights were read from, and where in them every tensor lies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LENGTH = 8
"""Bytes in front of a safetensors file's header that say how long it is."""


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a file of a checkpoint; `dtype` in safetensors' words, such as `BF16`."""

    name: str
    file: str
    dtype: str
    offset: int
    length: int


@dataclass(frozen=True)
class Checkpoint:
    """Safetensors files in a folder. `inside` is that folder's path in the build where it is a part of it."""

    folder: Path
    files: tuple[str, ...]
    inside: str = ""

    def tensors(self) -> Iterator[Place]:
        """Every tensor that has numbers, file by file."""
        for file in self.files:
            header = self._header(file)
            start = LENGTH + len(header)
            for name, entry in json.loads(header).items():
                if name != "__metadata__" and (place := _place(name, file, start, entry)).length:
                    yield place

    @property
    def dtypes(self) -> frozenset[str]:
        """The types of its tensors."""
        return frozenset(place.dtype for place in self.tensors())

    @property
    def layout(self) -> str:
        """A hash of where everything lies."""
        digest = hashlib.sha256(self.inside.encode())
        for file in self.files:
            digest.update(f"\n{file}\n".encode() + self._header(file))
        return digest.hexdigest()

    def _header(self, file: str) -> bytes:
        with (self.folder / file).open("rb") as opened:
            return opened.read(int.from_bytes(opened.read(LENGTH), "little"))


def _place(name: str, file: str, start: int, entry: dict[str, Any]) -> Place:
    first, end = entry["data_offsets"]
    return Place(name, file, entry["dtype"], start + first, end - first)
