"""Rows of several tasks in one run: a second graph over the same weights, which reads tasks from a bank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnxruntime import InferenceSession, RunOptions

from surgeon.errors import DataError, SpecError, shorten
from surgeon.runtime.bank import Bank
from surgeon.runtime.engine import WARNING
from surgeon.runtime.files import read_file
from surgeon.runtime.fit import LABELS, check_task, columns
from surgeon.runtime.generation import TaskPerRow
from surgeon.runtime.manifest import MIXED, NO_TASK, Manifest
from surgeon.runtime.ort import ORT_ERRORS
from surgeon.runtime.single import MASK, refused, unpadded
from surgeon.runtime.taskfile import Array, parse_adapter, private_copy
from surgeon.runtime.tasks import RunnableTask

Names = str | None
PerRow = list[Names] | list[list[Names]] | tuple[Names, ...]
"""A task for every row, None for the base; or, for every text, the tasks it is asked for."""


def rows_of(task: PerRow, rows: Sequence[int] | None, texts: int) -> tuple[list[Names], list[int]]:
    """The task of every row and the number of its text. Raises DataError or SpecError for what does not fit."""
    several = [isinstance(entry, list | tuple) for entry in task]
    if any(several):
        if not all(several) or rows is not None:
            raise SpecError(
                "tasks are one a row, or a list of them for every text", try_="task=[['a', 'b'], ['a']], without `rows`"
            )
        rows = [i for i, entry in enumerate(task) for _ in entry or ()]
        if len(task) != texts:
            raise DataError(f"there are {len(task)} lists of tasks for {texts} texts")
        task = [name for entry in task for name in entry or ()]
    names: list[Names] = list(task)  # type: ignore[arg-type]
    if rows is None:
        rows = range(texts)
        if len(names) != texts:
            raise DataError(
                f"there are {len(names)} tasks for {texts} texts",
                try_="a task for every text, or `rows` with the number of each row's text",
            )
    numbers = _numbers(rows, texts)
    if len(names) != len(numbers):
        raise DataError(f"there are {len(names)} tasks for {len(numbers)} rows", try_="a task for every row")
    if not numbers:
        raise DataError("there are no rows to run", try_="a task for at least one row")
    return names, numbers


def _numbers(rows: Sequence[int], texts: int) -> list[int]:
    array = np.asarray(rows if isinstance(rows, np.ndarray) else list(rows))
    if array.size and (array.ndim != 1 or array.dtype.kind not in "iu" or array.min() < 0 or array.max() >= texts):
        raise DataError(
            "rows are numbers of texts",
            there_is=f"texts 0 to {texts - 1}; rows {shorten(map(str, array.ravel().tolist()))}",
        )
    return [int(row) for row in array]


class MixedGraph:
    """The second graph of a build, and the tasks it has at hand."""

    def __init__(self, session: InferenceSession, manifest: Manifest, bank: Bank) -> None:
        self.bank = bank
        self._session, self._manifest = session, manifest
        self._columns = columns(manifest, bank.base)
        self._cache = manifest.generation.cache if manifest.generation is not None and manifest.goes_on else ()
        self._shared = manifest.generation is not None and manifest.generation.shared
        inside = {tensor.present for tensor in self._cache}
        self._outputs = {port.name: port.axes for port in manifest.mixed if port.name not in inside}
        # What takes positions is cut to what a call needs: what others need would be lost to the text.
        starts = {tensor.start for tensor in self._cache}
        begun = (symbol for delta in manifest.deltas if delta.name in starts for symbol in delta.free.values())
        self._limiting = {*manifest.positions, *begun}

    def run(
        self, feed: Mapping[str, Array], tasks: Sequence[RunnableTask | None], rows: Sequence[int]
    ) -> list[dict[str, Array]]:
        """The outputs of every row, as its task alone gives them for its text. Raises DataError."""
        if not self._cache:
            return self._run(feed, tasks, rows)
        feed = {name: array[list(rows)] for name, array in feed.items()}
        started = any(tensor.start is not None for tensor in self._cache)
        if not self._shared or not (started or not feed[MASK].all()):
            return self._run(feed, tasks, None)
        return [row for one, task in zip(unpadded(feed), tasks, strict=True) for row in self._run(one, [task], None)]

    def decoding(self) -> TaskPerRow:
        """What rows go on with, each by its task."""
        assert self._manifest.generation is not None
        return TaskPerRow(self._session, self._manifest, self._manifest.generation, self.bank)

    def _run(
        self, feed: Mapping[str, Array], tasks: Sequence[RunnableTask | None], rows: Sequence[int] | None
    ) -> list[dict[str, Array]]:
        """One run; `rows` is None where the graph goes on from a cache, and a row is a text."""
        own = [task for task in tasks if task is not None]
        with self.bank.holding(own) as held:
            ids = np.array([0 if task is None else held.places[task] for task in tasks], np.int64)
            sizes = {s: max((task.info.sizes.get(s, 0) for task in own), default=0) for s in self._limiting}
            given = {**feed, **self.bank.cut(held, sizes), "task_ids": ids}
            if rows is None:
                given |= self._begun(given, ids)
            else:
                given["rows"] = np.array(rows, np.int64)
            options = RunOptions()
            options.log_severity_level = WARNING
            try:
                found = self._session.run(list(self._outputs), given, options)
            except ORT_ERRORS as error:
                raise refused(error, feed) from error
        outputs = dict(zip(self._outputs, found, strict=True))
        return [
            {name: self._of(name, array[i], task) for name, array in outputs.items()} for i, task in enumerate(tasks)
        ]

    def _begun(self, given: Mapping[str, Array], ids: Array) -> dict[str, Array]:
        """The cache of a text that begins: empty, or with the row's prefix where the cache is shared."""
        begun = {}
        for tensor in self._cache:
            empty = np.zeros(tensor.shape(batch=len(ids), past=0), tensor.past.dtype)
            begun[tensor.past.name] = empty if tensor.start is None else given[tensor.start][ids]
        return begun

    def _of(self, name: str, output: Array, task: RunnableTask | None) -> Array:
        """A row's output with the columns of its task's own head."""
        count = self._columns if task is None or task.info.columns is None else task.info.columns
        axes: Sequence[Any] = self._outputs[name][1:]
        return output[tuple(slice(0, count) if axis == LABELS else slice(None) for axis in axes)]


def open_bank(build: Path, manifest: Manifest, private: Path, bounds: tuple[int, int | None]) -> Bank:
    """A bank with the base alone. Raises SpecError where the build takes one task a call, BuildError where the file of
    the base's deltas is not the manifest's.
    """
    if MIXED not in manifest.files or NO_TASK not in manifest.files:
        raise SpecError(
            "this build takes one task a call",
            where=str(build),
            there_is=f"modes {', '.join(manifest.modes)}",
            try_="`modes: [switch, mixed]` in the spec's `export`, and compile it again",
        )
    path = build / NO_TASK
    data = read_file(build, NO_TASK, manifest.files[NO_TASK])
    copy, _ = private_copy(path, private)
    try:
        base = parse_adapter(copy, data, str(path)).tensors
        check_task(manifest, base, str(path))
    finally:
        copy.unlink(missing_ok=True)
    return Bank(manifest, base, *bounds)
