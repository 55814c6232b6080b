"""The store: tasks are checked when they are put in, and what is read again is what was checked."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

from surgeon.errors import SpecError, UnknownTaskError, did_you_mean, shorten
from surgeon.runtime.document import read_manifest
from surgeon.runtime.manifest import Manifest
from surgeon.runtime.store.places import Place, failing, place_of
from surgeon.runtime.store.sealed import Seal, ledger_of, seal, unseal
from surgeon.runtime.taskfile import SUFFIX, private_file
from surgeon.runtime.tasks import RunnableTask, TaskInfo, check_name, load_task, name_of, runnable

T = TypeVar("T")

LONGEST = 200
"""Bytes of a name: file systems take 255 with what is around it."""


@dataclass(frozen=True)
class Stored:
    """A task as it was read, and the version of its file then."""

    task: RunnableTask
    version: Hashable
    nbytes: int


class TaskStore:
    """Tasks of one build in a folder, or at any fsspec URL: added, replaced, removed and listed while others read.

    Every method may be called from many threads, and several processes may share a folder. A change is one rename;
    a writer that dies leaves the store as it was before or after.
    """

    def __init__(self, location: str | Path, build: str | Path | Manifest, *, refresh: float = 1.0) -> None:
        self._manifest = build if isinstance(build, Manifest) else read_manifest(build)
        self._ledger = ledger_of(self._manifest)
        self._place: Place = place_of(location, refresh)

    @property
    def where(self) -> str:
        """The path or URL."""
        return self._place.where

    def names(self) -> list[str]:
        """All tasks, sorted."""
        found = self._tried(self._place.names)
        return sorted(name.removesuffix(SUFFIX) for name in found if name.endswith(SUFFIX))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self.names())

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.version(name) is not None

    def version(self, name: str) -> Hashable | None:
        """Another after each change of a task; None where there is none."""
        return self._tried(lambda: self._place.version(name + SUFFIX)) if _nameable(name) else None

    def info(self, name: str) -> TaskInfo:
        """What is known of a task. Raises SpecError where there is none, DeltaError where its file is damaged."""
        return self._read(name).info

    def add(
        self, path: str | Path, name: str | None = None, labels: Sequence[str] | None = None, *, replace: bool = False
    ) -> TaskInfo:
        """Check a task file against the build, and put it in. Raises DeltaError for one that does not fit.

        The name defaults to the file's. Without `replace`, a name that is taken is refused.
        """
        path = Path(path)
        name = name_of(path) if name is None else name
        _check(name)
        if isinstance(labels, str):
            raise SpecError("labels are a list of names", try_=f"labels=['{labels}', …]")
        with tempfile.TemporaryDirectory(prefix="surgeon-") as directory:
            task = load_task(self._manifest, path, Path(directory), name=name, labels=labels)
            data = seal(task.path.read_bytes(), task.info, self._ledger)
            info = task.info
            del task
        if not self._tried(lambda: self._place.write(name + SUFFIX, data, new=not replace)):
            raise SpecError(
                f"there is a task '{name}' already",
                where=self.where,
                try_="give it another name, or say replace=True",
            )
        return info

    def remove(self, name: str) -> None:
        """Remove a task; runs that use it end with it. Raises SpecError where there is none."""
        if not _nameable(name) or not self._tried(lambda: self._place.delete(name + SUFFIX)):
            raise self.unknown(name)

    def load(self, name: str, directory: Path) -> Stored:
        """A task ready to run, its file a copy in `directory`. Raises as `info`."""
        version = self.version(name)
        with private_file(directory) as file:
            found = self._read(name, file)
            size = file.tell()
        return Stored(runnable(found.info, Path(file.name)), version, size)

    def unknown(self, name: str) -> UnknownTaskError:
        """The error for a name that no task has."""
        names = self.names()
        return UnknownTaskError(
            f"there is no task '{name}'",
            where=self.where,
            there_is=shorten(names) or "no task; task=None is the base itself",
            try_=did_you_mean(str(name), names) if len(names) <= 1000 else None,
        )

    def _read(self, name: str, out: IO[bytes] | None = None) -> Seal:
        stream = self._tried(lambda: self._place.open(name + SUFFIX)) if _nameable(name) else None
        if stream is None:
            raise self.unknown(name)
        with stream:
            return unseal(stream, name, self._ledger, f"{self.where}/{name}{SUFFIX}", out)

    def _tried(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except OSError as error:
            raise failing(error, self.where) from error


def _nameable(name: str) -> bool:
    try:
        _check(name)
    except SpecError:
        return False
    return True


def _check(name: str) -> None:
    check_name(name)
    if len(name.encode()) > LONGEST:
        raise SpecError(f"the name of a task has {LONGEST} bytes at most", there_is=f"{len(name.encode())} bytes")
