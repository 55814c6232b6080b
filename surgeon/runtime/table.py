"""The tasks of a session by name. Each is a private copy, which goes when nobody holds the task any more."""

from __future__ import annotations

import shutil
import tempfile
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from surgeon.errors import BuildError, SpecError, did_you_mean, shorten
from surgeon.runtime.manifest import Manifest
from surgeon.runtime.tasks import RunnableTask, TaskInfo, load_task, name_of


class TaskTable:
    """May be used from many threads. Whoever looked a task up keeps it, whatever becomes of its name."""

    def __init__(self, build: Path, manifest: Manifest, *, verify: bool) -> None:
        self._manifest, self._where = manifest, str(build)
        self._lock, self._closed = threading.Lock(), False
        self.private = Path(tempfile.mkdtemp(prefix="surgeon-"))
        """A directory that goes with the table."""
        self._cleanup = weakref.finalize(self, shutil.rmtree, self.private, ignore_errors=True)
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
        return MappingProxyType({name: task.info for name, task in self._tasks.items()})

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
        if name not in tasks:
            raise SpecError(
                f"there is no task '{name}'",
                there_is=shorten(tasks) or "no task; task=None is the base itself",
                try_=did_you_mean(str(name), tasks),
            )
        return tasks[name].without(self._manifest, drop)

    def add(
        self, path: Path, name: str | None, labels: Sequence[str] | None, *, replace: bool
    ) -> tuple[RunnableTask, RunnableTask | None]:
        """The new task, and the one that gave way to it. Raises DeltaError and SpecError."""
        self._open()
        name = name_of(path) if name is None else name
        if isinstance(labels, str):
            raise SpecError("labels are a list of names", try_=f"labels=['{labels}', …]")
        task = load_task(self._manifest, path, self.private, name=name, labels=labels)
        with self._lock:
            self._open()
            if name in self._tasks and not replace:
                raise SpecError(
                    f"there is a task '{name}' already",
                    there_is=shorten(self._tasks),
                    try_="give it another name, or say replace=True",
                )
            former = self._tasks.get(name)
            self._tasks = {**self._tasks, name: task}
        return task, former

    def remove(self, name: str) -> RunnableTask | None:
        """The task that had the name. Raises SpecError for an unknown one."""
        with self._lock:
            former = self.find(name)
            self._tasks = {other: task for other, task in self._tasks.items() if other != name}
        return former

    def close(self) -> None:
        """Let go of all tasks."""
        with self._lock:
            self._closed, self._tasks = True, {}
        self._cleanup()

    def _open(self) -> None:
        if self._closed:
            raise BuildError("this session is closed", where=self._where)
