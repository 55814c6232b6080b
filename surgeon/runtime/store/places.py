"""Where a store's files lie: a folder of this machine, or whatever fsspec reaches. Names in, bytes out."""

from __future__ import annotations

import io
import os
import secrets
import time
from collections.abc import Hashable
from pathlib import Path
from typing import Any, Protocol

from surgeon.errors import BuildError, SpecError

Stream = io.FileIO | io.BytesIO

STALE = 3600.0
"""Seconds after which what a writer left unfinished is nobody's."""


def failing(error: OSError, where: str) -> BuildError:
    """The error for a store that cannot be read or written."""
    return BuildError(f"the store fails: {error.strerror or error}", where=where)


class Place(Protocol):
    """Files by name. A write shows whole or not at all; all may be called from many threads and processes."""

    where: str

    def names(self) -> list[str]:
        """All files, in no order."""

    def version(self, name: str) -> Hashable | None:
        """Something else after every change of a file; None where there is none."""

    def open(self, name: str) -> Stream | None:
        """A file as it is at this moment, whatever becomes of its name; None where there is none."""

    def write(self, name: str, data: bytes, *, new: bool) -> bool:
        """Write a file; with `new`, only where there is none. Whether it was written."""

    def delete(self, name: str) -> bool:
        """Delete a file; whether there was one."""


class Folder:
    """A folder. Files are written aside, flushed, and then take their name: rename and link are atomic."""

    def __init__(self, path: Path) -> None:
        self.where = str(path)
        self._path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BuildError(f"no store can be here: {error.strerror}", where=self.where) from error
        self._sweep()

    def names(self) -> list[str]:
        """All files but those being written."""
        return [name for name in os.listdir(self._path) if not name.startswith(".")]

    def version(self, name: str) -> Hashable | None:
        """Inode, time and size: a renamed file has another inode."""
        try:
            stat = os.stat(self._path / name)
        except OSError:
            return None
        return stat.st_ino, stat.st_mtime_ns, stat.st_size

    def open(self, name: str) -> io.FileIO | None:
        """A file that is replaced meanwhile is read to its end."""
        try:
            return io.FileIO(self._path / name)
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes, *, new: bool) -> bool:
        """Aside, flushed, then renamed, or linked where it must be new: a link to a name that is taken fails."""
        temporary = self._path / f".{secrets.token_hex(8)}.tmp"
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if new:
                os.link(temporary, self._path / name)
            else:
                os.replace(temporary, self._path / name)
            self._flush()
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def delete(self, name: str) -> bool:
        """Whoever reads the file reads on."""
        try:
            os.unlink(self._path / name)
        except FileNotFoundError:
            return False
        self._flush()
        return True

    def _flush(self) -> None:
        """The names, too, must outlive a loss of power."""
        if os.name == "posix":
            handle = os.open(self._path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)

    def _sweep(self) -> None:
        """Remove what writers left that died."""
        for path in self._path.glob(".*.tmp"):
            try:
                if time.time() - path.stat().st_mtime > STALE:
                    path.unlink()
            except OSError:  # another process was faster, or may and we may not
                continue


class Remote:
    """What fsspec reaches. A file that is there but half is found by its checksum; a version holds for `refresh`
    seconds, within which a change elsewhere does not show.
    """

    def __init__(self, url: str, refresh: float) -> None:
        try:
            from fsspec.core import url_to_fs
        except ModuleNotFoundError as error:
            raise SpecError("a store elsewhere needs fsspec", where=url, try_="pip install fsspec") from error
        self.where = url
        try:
            self._files, self._root = url_to_fs(url, use_listings_cache=False)
            self._files.makedirs(self._root, exist_ok=True)
        except Exception as error:  # each protocol has errors of its own
            raise BuildError(f"no store can be here: {error}", where=url) from error
        self._refresh = refresh
        self._seen: dict[str, tuple[float, Hashable | None]] = {}

    def names(self) -> list[str]:
        """All files."""
        return [str(path).rsplit("/", 1)[-1] for path in self._files.ls(self._root, detail=False)]

    def version(self, name: str) -> Hashable | None:
        """What the protocol tells of a file that changes with it."""
        now = time.monotonic()
        at, version = self._seen.get(name, (-self._refresh, None))
        if now - at < self._refresh:
            return version
        try:
            facts: dict[str, Any] = self._files.info(self._at(name))
        except FileNotFoundError:
            version = None
        else:
            keys = ("ETag", "etag", "mtime", "LastModified", "created", "size")
            version = tuple(str(facts[key]) for key in keys if facts.get(key) is not None)
        self._seen[name] = (now, version)
        return version

    def open(self, name: str) -> io.BytesIO | None:
        """All of it, in one request."""
        try:
            return io.BytesIO(self._files.cat_file(self._at(name)))
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes, *, new: bool) -> bool:
        """In one request. Where the protocol has no exclusive writes, of two that add a name at once both may."""
        if new and self._files.exists(self._at(name)):
            return False
        self._files.pipe_file(self._at(name), data)
        self._seen.pop(name, None)
        return True

    def delete(self, name: str) -> bool:
        """By the protocol's own means."""
        try:
            self._files.rm_file(self._at(name))
        except FileNotFoundError:
            return False
        finally:
            self._seen.pop(name, None)
        return True

    def _at(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"


def place_of(location: str | Path, refresh: float = 1.0) -> Place:
    """The place that a path or URL names."""
    text = str(location)
    if text.startswith("file://"):
        return Folder(Path(text.removeprefix("file://")))
    return Remote(text, refresh) if "://" in text else Folder(Path(text))
