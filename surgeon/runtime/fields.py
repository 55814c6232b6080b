"""Typed reading of the manifest's JSON: every value is checked, and an error names its place in the document."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, TypeVar

from surgeon.errors import BuildError

REBUILD = "copy the build again from where it was made, or compile it again"

T = TypeVar("T")


@dataclass(frozen=True)
class Fields:
    """A JSON object and its place in the document, as `tasks.sentiment.`; `where` is the file."""

    doc: Any
    place: str
    where: str

    def __post_init__(self) -> None:
        if not isinstance(self.doc, dict):
            raise self.fault("", "an object")

    def fault(self, key: str, wanted: str) -> BuildError:
        """The error for a value that is absent or of another kind than wanted."""
        place = (self.place + key).rstrip(".") or "the document"
        return BuildError(f"'{place}' is missing or is not {wanted}", where=self.where, try_=REBUILD)

    def get(self, key: str, kind: type[T]) -> T:
        """The value of a key, which must be of this type."""
        value = self.doc.get(key)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
            raise self.fault(key, f"of type {kind.__name__}")
        return value

    def optional(self, key: str, kind: type[T]) -> T | None:
        """The same, where null stands for nothing."""
        return None if self.doc.get(key) is None else self.get(key, kind)

    def fields(self, key: str) -> Fields:
        """The object under a key."""
        return Fields(self.doc.get(key), f"{self.place}{key}.", self.where)

    def items(self, key: str) -> list[Fields]:
        """The objects of a list."""
        return [Fields(item, f"{self.place}{key}[{i}].", self.where) for i, item in enumerate(self.get(key, list))]

    def named(self, key: str) -> dict[str, Fields]:
        """The objects of an object, by name."""
        return {
            name: Fields(item, f"{self.place}{key}.{name}.", self.where) for name, item in self.get(key, dict).items()
        }

    def fingerprint(self, key: str) -> str:
        """A hash of at least eight hexadecimal digits."""
        value = self.get(key, str)
        if not re.fullmatch("[0-9a-f]{8,}", value):
            raise self.fault(key, "a hexadecimal hash")
        return value

    def inside(self, name: str) -> str:
        """A file name, refused where it leaves the build."""
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or not path.parts:
            raise BuildError(f"names a file outside the build: '{name}'", where=self.where, try_=REBUILD)
        return name
