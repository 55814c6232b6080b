"""The tasks that a mixed graph has at hand: one array a delta, `[places, …]`, of which every task has an entry.

Entry 0 is the base. Places are few; tasks come in on demand and the one used longest ago gives way, but never one
that a run is using. A free size is that of the largest task at hand, and what is shorter is filled up.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from surgeon.errors import SpecError
from surgeon.runtime.manifest import Delta, Manifest
from surgeon.runtime.taskfile import Array
from surgeon.runtime.tasks import RunnableTask

FIRST = 128
"""Places to begin with: what nobody wrote to takes no memory, and what need not move leaves none behind."""

Tensors = Mapping[str, Array]


@dataclass(frozen=True)
class Held:
    """What a run reads: arrays by name, which nobody changes where it reads, and the entry of each task."""

    arrays: Tensors
    places: Mapping[RunnableTask, int]
    version: int
    """Another after each task that came in."""


class Bank:
    """At most `limit` tasks, and at most `limit_bytes` where that is given. May be used from many threads."""

    def __init__(self, manifest: Manifest, base: Tensors, limit: int, limit_bytes: int | None = None) -> None:
        self._deltas, self._counted = manifest.deltas, manifest.counted
        self.base = base
        self._axes = {d.name: {axis + 1: symbol for axis, symbol in d.free.items()} for d in self._deltas}
        self._axes |= {name: {1: symbol} for name, symbol in self._counted.items()}
        self._limit, self._limit_bytes = limit, limit_bytes
        self._places: OrderedDict[RunnableTask, int] = OrderedDict()
        self._used: Counter[RunnableTask] = Counter()
        self._version = 0
        self.base_sizes = self._sizes = self._sizes_of(base)
        self._arrays, self._present = self._make(0, self._sizes), 0
        self._changed = threading.Condition()

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks at hand, the one used longest ago first."""
        with self._changed:
            return tuple(task.info.name for task in self._places)

    @property
    def nbytes(self) -> int:
        """Memory of all arrays."""
        return sum(array.nbytes for array in self._arrays.values())

    @contextmanager
    def holding(self, tasks: Sequence[RunnableTask]) -> Iterator[Held]:
        """Have these tasks at hand until the end of the block; waits where others use all places meanwhile.

        Raises SpecError where there are more of them than places.
        """
        wanted = list(dict.fromkeys(tasks))
        with self._changed:
            fresh = [task for task in wanted if task not in self._places]
        read = {task: task.tensors() for task in fresh}  # not under the lock: it takes a file's time
        with self._changed:
            self._changed.wait_for(lambda: self._room(wanted, read))
            for task in wanted:
                if task not in self._places:
                    self._take_in(task, read.get(task) or task.tensors(), wanted)
                self._places.move_to_end(task)
                self._used[task] += 1
            held = Held(dict(self._arrays), {task: self._places[task] for task in wanted}, self._version)
        try:
            yield held
        finally:
            with self._changed:
                self._used -= Counter(wanted)
                self._changed.notify_all()

    def holds(self, tasks: Collection[RunnableTask]) -> bool:
        """Whether all of these can be at hand at once."""
        with self._changed:
            sizes = self._sizes
            for task in tasks:
                sizes = _larger(sizes, task.info.sizes)
            return len(set(tasks)) <= self._most(sizes)

    def cut(self, held: Held, sizes: Mapping[str, int], without: Collection[str] = ()) -> dict[str, Array]:
        """The arrays, with no more than these sizes; the deltas `without` are the base's in every entry."""
        arrays = dict(held.arrays)
        for name in without:
            arrays[name] = np.repeat(self.base[name][None], len(arrays[name]), 0)
        for name, axes in self._axes.items():
            array = arrays[name]
            for axis, symbol in axes.items():
                array = array[(slice(None),) * axis + (slice(0, sizes.get(symbol)),)]
            arrays[name] = arrays[name] if array.shape == arrays[name].shape else np.ascontiguousarray(array)
        return arrays

    def forget(self, task: RunnableTask) -> None:
        """Let a task that was removed or replaced give way before all others."""
        with self._changed:
            if task in self._places:
                self._places.move_to_end(task, last=False)

    def _room(self, wanted: Sequence[RunnableTask], read: Mapping[RunnableTask, Tensors]) -> bool:
        """Whether all can be at hand now. Raises SpecError where they never can."""
        sizes = self._sizes
        for task in wanted:
            if task not in self._places and task in read:
                sizes = _larger(sizes, self._sizes_of(read[task]))
        limit = self._most(sizes)
        if len(wanted) > limit:
            raise SpecError(
                f"this call names {len(wanted)} tasks, and {limit} can be at hand at once",
                there_is=f"places for {self._limit} tasks"
                + (f" and {self._limit_bytes} bytes, of {self._bytes(sizes)} a task" if self._limit_bytes else ""),
                try_="smaller calls, or a larger `resident` of the session",
            )
        busy = [t for t in self._places if self._used[t] and t not in wanted]
        return len(busy) + len(wanted) <= limit

    def _most(self, sizes: Mapping[str, int]) -> int:
        if self._limit_bytes is None:
            return self._limit
        return min(self._limit, self._limit_bytes // max(self._bytes(sizes), 1) - 1)

    def _take_in(self, task: RunnableTask, tensors: Tensors, wanted: Sequence[RunnableTask]) -> None:
        """Give a task a place: a free one, that of the task used longest ago, or a new one."""
        own = self._sizes_of(tensors)
        sizes = _larger(self._sizes, own)
        limit = self._most(sizes)
        while len(self._places) >= limit:
            del self._places[next(t for t in self._places if not self._used[t] and t not in wanted)]
        free = self._free()
        if sizes != self._sizes or free is None:
            needed, present = len(self._places) + 1, self._present
            self._move(min(limit, max(needed, FIRST, present if free else 2 * present)), own)
            free = needed
        self._write(self._arrays, free, tensors)
        self._places[task] = free
        self._version += 1

    def _free(self) -> int | None:
        taken = set(self._places.values())
        return next((place for place in range(1, self._present + 1) if place not in taken), None)

    def _move(self, present: int, own: Mapping[str, int]) -> None:
        """Into other arrays, as large as the tasks need now; runs under way keep reading the old ones."""
        sizes = _larger(self._sizes_of(self.base), own)
        for task in self._places:
            sizes = _larger(sizes, task.info.sizes)
        arrays = self._make(present, sizes)
        for place, (task, old) in enumerate(self._places.items(), 1):
            for name, array in arrays.items():
                entry, before = array[place], self._arrays[name][old]
                kept = tuple(slice(0, min(pair)) for pair in zip(entry.shape, before.shape, strict=True))
                entry[kept] = before[kept]
            self._places[task] = place
        self._arrays, self._sizes, self._present = arrays, sizes, present

    def _make(self, places: int, sizes: Mapping[str, int]) -> dict[str, Array]:
        arrays = {d.name: _filled((places + 1, *_shape(d, sizes)), d.padding, d.dtype) for d in self._deltas}
        arrays |= {name: np.zeros((places + 1, sizes[symbol]), np.int64) for name, symbol in self._counted.items()}
        self._write(arrays, 0, {})
        return arrays

    def _write(self, arrays: Tensors, place: int, tensors: Tensors) -> None:
        """Fill an entry; what a task leaves to the base is the base's."""
        for delta in self._deltas:
            tensor, entry = tensors.get(delta.name, self.base[delta.name]), arrays[delta.name][place]
            if tensor.shape != entry.shape:
                entry[...] = delta.padding
            entry[tuple(slice(0, size) for size in tensor.shape)] = tensor
        own = self._sizes_of({**self.base, **tensors})
        for name, symbol in self._counted.items():
            arrays[name][place] = np.arange(arrays[name].shape[1]) < own[symbol]

    def _sizes_of(self, tensors: Tensors) -> dict[str, int]:
        return {
            symbol: tensors[delta.name].shape[axis]
            for delta in self._deltas
            if delta.name in tensors
            for axis, symbol in delta.free.items()
        }

    def _bytes(self, sizes: Mapping[str, int]) -> int:
        """Of one place."""
        counted = sum(8 * sizes[symbol] for symbol in self._counted.values())
        return counted + sum(int(np.prod(_shape(d, sizes))) * np.dtype(d.dtype).itemsize for d in self._deltas)


def _filled(shape: tuple[int, ...], value: float, dtype: str) -> Array:
    """Of zeros memory is taken only where it is written: a place that no task has costs none."""
    return np.full(shape, value, dtype) if value else np.zeros(shape, dtype)


def _shape(delta: Delta, sizes: Mapping[str, int]) -> list[int]:
    return [sizes[axis] if isinstance(axis, str) else axis for axis in delta.axes]


def _larger(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    return {symbol: max(size, other.get(symbol, 0)) for symbol, size in one.items()}
