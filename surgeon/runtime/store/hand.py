"""Tasks of a store that a session has at hand: bounded, and the one used longest ago gives way.

A run holds its task, so one that gives way stays until its last run is over, and whoever names it until then finds it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from pathlib import Path
from weakref import WeakValueDictionary

from surgeon.errors import SpecError
from surgeon.runtime.store.store import Stored, TaskStore
from surgeon.runtime.tasks import RunnableTask

Key = tuple[str, Hashable]
"""A task's name, and the version of its file."""


class Hand:
    """At most `limit` tasks, and at most `limit_bytes` of their files. May be used from many threads."""

    def __init__(self, store: TaskStore, private: Path, limit: int, limit_bytes: int | None) -> None:
        self.store = store
        self._private, self._limit, self._limit_bytes = private, limit, limit_bytes
        self._lock = threading.Lock()
        self._held: OrderedDict[Key, Stored] = OrderedDict()
        self._alive: WeakValueDictionary[Key, RunnableTask] = WeakValueDictionary()

    @property
    def names(self) -> tuple[str, ...]:
        """Tasks at hand, the one used longest ago first."""
        with self._lock:
            return tuple(name for name, _ in self._held)

    def find(self, name: str) -> RunnableTask | None:
        """The task as the store has it now, None where it has none. Raises DeltaError for a damaged file."""
        version = self.store.version(name)
        if version is None:
            return None
        with self._lock:
            stored = self._held.get((name, version))
            if stored is not None:
                self._held.move_to_end((name, version))
                return stored.task
            alive = self._alive.get((name, version))
        try:
            found = self.store.load(name, self._private) if alive is None else Stored(alive, version, _bytes(alive))
        except SpecError:  # removed since
            return None
        return self._hold(name, found)

    def _hold(self, name: str, stored: Stored) -> RunnableTask:
        key = (name, stored.version)
        with self._lock:
            if key in self._held:  # another thread was faster
                return self._held[key].task
            for other in [known for known in self._held if known[0] == name]:
                del self._held[other]
            self._held[key] = stored
            self._alive[key] = stored.task
            while len(self._held) > 1 and self._over():
                self._held.popitem(last=False)
        return stored.task

    def _over(self) -> bool:
        return len(self._held) > self._limit or (
            self._limit_bytes is not None and sum(stored.nbytes for stored in self._held.values()) > self._limit_bytes
        )

    def clear(self) -> None:
        """Let go of all of them."""
        with self._lock:
            self._held.clear()


def _bytes(task: RunnableTask) -> int:
    return task.path.stat().st_size
