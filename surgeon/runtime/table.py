"""The tasks of a session by name: the build's own, and those of a store, which come in when they are named.

Each is a private copy, which goes when nobody holds the task any more.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from surgeon.errors import BuildError, DeltaError, SpecError, UnknownTaskError, did_you_mean, shorten
from surgeon.runtime.manifest import Manifest
from surgeon.runtime.store import Hand, TaskStore
from surgeon.runtime.tasks import RunnableTask, TaskInfo, load_task, name_of

MANY = 1000
"""Names among which one that is alike is looked for."""


class TaskTable:
    """May be used from many threads. Whoever looked a task up keeps it, whatever becomes of its name."""

    def __init__(
        self,
        build: Path,
        manifest: Manifest,
        *,
        verify: bool,
        store: TaskStore | None = None,
        limits: tuple[int, int | None] = (64, None),
    ) -> None:
        self._manifest, self._where = manifest, str(build)
        self._lock, self._closed = threading.Lock(), False
        self.private = Path(tempfile.mkdtemp(prefix="surgeon-"))
        """A directory that goes with the table."""
        self._cleanup = weakref.finalize(self, shutil.rmtree, self.private, ignore_errors=True)
        self._hand = None if store is None else Hand(store, self.private, *limits)
        self._tasks: Mapping[str, RunnableTask] = {}
        try:
            self._tasks = {
                task.name: load_task(
                    manifest,
                    build / task.adapter,
                    self.private,
                    name=task.name,
                    labels=task.labels,
                    sha256=task.adapter_sha256 if verify else None,
                )
                for task in manifest.tasks.values()
            }
        except BaseException:
            self.close()
            raise

    @property
    def infos(self) -> Mapping[str, TaskInfo]:
        """The tasks of this moment. Later changes do not show in the mapping."""
        own = MappingProxyType({name: task.info for name, task in self._tasks.items()})
        return own if self._hand is None else Infos(self._hand.store, own)

    @property
    def held(self) -> tuple[str, ...]:
        """The store's tasks that are at hand, the one used longest ago first."""
        return () if self._hand is None else self._hand.names

    def find(self, name: str | None, drop: int = 0) -> RunnableTask | None:
        """The task of a name, without what can be dropped in its `drop` lowest layers; None is the base.

        Raises SpecError for an unknown name, BuildError once the table is closed.
        """
        self._open()
        tasks = self._tasks  # one look: other threads exchange the mapping
        if name is None:
            if drop != 0:
                raise SpecError("drop leaves out adapters of a task, and no task is named", there_is=shorten(tasks))
            return None
        task = None if self._hand is None else self._hand.find(name)
        task = tasks.get(name) if task is None else task
        if task is None:
            names = list(self.infos)
            raise UnknownTaskError(
                f"there is no task '{name}'",
                there_is=shorten(names) or "no task; task=None is the base itself",
                try_=did_you_mean(str(name), names) if len(names) <= MANY else None,
            )
        return task.without(self._manifest, drop)

    def add(
        self, path: Path, name: str | None, labels: Sequence[str] | None, *, replace: bool
    ) -> tuple[RunnableTask, RunnableTask | None]:
        """The new task, and the one that gave way to it; into the store where there is one. Raises DeltaError and
        SpecError.
        """
        self._open()
        name = name_of(path) if name is None else name
        if isinstance(labels, str):
            raise SpecError("labels are a list of names", try_=f"labels=['{labels}', …]")
        if self._hand is not None:
            return self._store(self._hand, path, name, labels, replace=replace)
        task = load_task(self._manifest, path, self.private, name=name, labels=labels)
        with self._lock:
            self._open()
            if name in self._tasks and not replace:
                raise self._taken(name)
            former = self._tasks.get(name)
            self._tasks = {**self._tasks, name: task}
        return task, former

    def remove(self, name: str) -> RunnableTask | None:
        """The task that had the name. Raises SpecError for an unknown one."""
        with self._lock:
            if self._hand is not None and name in self._hand.store:
                former = self._now(self._hand, name)
                self._hand.store.remove(name)
            else:
                former = self.find(name)
            self._tasks = {other: task for other, task in self._tasks.items() if other != name}
        return former

    def _store(
        self, hand: Hand, path: Path, name: str, labels: Sequence[str] | None, *, replace: bool
    ) -> tuple[RunnableTask, RunnableTask | None]:
        if name in self._tasks and not replace:
            raise self._taken(name)
        former = self._now(hand, name)
        hand.store.add(path, name, labels, replace=replace)
        task = self.find(name)
        assert task is not None
        return task, former

    def _now(self, hand: Hand, name: str) -> RunnableTask | None:
        """What has the name now; a damaged file has no name that counts, for it is to be replaced."""
        try:
            return hand.find(name) or self._tasks.get(name)
        except DeltaError:
            return None

    def _taken(self, name: str) -> SpecError:
        return SpecError(
            f"there is a task '{name}' already",
            there_is=shorten(self._tasks),
            try_="give it another name, or say replace=True",
        )

    def close(self) -> None:
        """Let go of all tasks."""
        with self._lock:
            self._closed, self._tasks = True, {}
            if self._hand is not None:
                self._hand.clear()
        self._cleanup()

    def _open(self) -> None:
        if self._closed:
            raise BuildError("this session is closed", where=self._where)


class Infos(Mapping[str, TaskInfo]):
    """The names of one moment; what is known of a store's task is read when somebody asks, without loading it."""

    def __init__(self, store: TaskStore, own: Mapping[str, TaskInfo]) -> None:
        self._store, self._own = store, own
        self._names = dict.fromkeys([*own, *store.names()])

    def __getitem__(self, name: str) -> TaskInfo:
        if name not in self._names:
            raise KeyError(name)
        return self._own[name] if name in self._own and name not in self._store else self._store.info(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names
