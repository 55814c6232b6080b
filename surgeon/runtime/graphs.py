"""The graphs of a build, each a session of ONNX Runtime: one task a batch, or a task a row."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from onnxruntime import InferenceSession

from surgeon.errors import BuildError
from surgeon.runtime.generation import Pair
from surgeon.runtime.manifest import DECODER, ENCODER, Manifest
from surgeon.runtime.mixed import MixedGraph, open_mixed
from surgeon.runtime.single import SingleGraph
from surgeon.runtime.taskfile import Array
from surgeon.runtime.tasks import RunnableTask

Rows = list[dict[str, Array]]


class Graphs:
    """The first graph is opened at once, that of several tasks by the first batch of several tasks.

    With `mixed` it is that one alone: it serves batches of one task too, and the base's weights are in memory once.
    """

    def __init__(
        self,
        build: Path,
        manifest: Manifest,
        opening: Callable[..., InferenceSession],
        private: Path,
        bounds: tuple[int, int | None],
        *,
        mixed: bool,
    ) -> None:
        self._build, self._closed = build, False
        self._several: MixedGraph | None = None
        self._pair: Pair | None = None
        self._opening = partial(opening, build, manifest)
        self._lock = threading.Lock()
        self._opening_several = partial(open_mixed, build, manifest, private, opening, bounds)
        self._single: SingleGraph | None = None if mixed else SingleGraph(opening(build, manifest), manifest)
        if mixed:
            self._several = self._opening_several()

    @property
    def single(self) -> SingleGraph:
        """The graph of one task a batch. Raises BuildError where it is not open."""
        self.check_open()
        if self._single is None:
            raise BuildError("this session has the graph of several tasks a batch alone", where=str(self._build))
        return self._single

    @property
    def alone(self) -> bool:
        """Whether the graph of several tasks is the only one."""
        return self._single is None

    @property
    def pair(self) -> Pair:
        """Encoder and decoder of a build that writes texts with both, opened by the first text."""
        self.check_open()
        if self._pair is None:
            with self._lock:
                if self._pair is None:
                    self._pair = Pair(self._opening(graph=ENCODER), self._opening(graph=DECODER))
        return self._pair

    def open_several(self) -> MixedGraph:
        """The graph of several tasks a batch, opened if it is not. Raises SpecError where the build has none."""
        self.check_open()
        if self._several is None:
            with self._lock:
                if self._several is None:
                    self._several = self._opening_several()
        return self._several

    @property
    def resident(self) -> tuple[str, ...]:
        """Names of the tasks at hand for batches of several tasks, the one used longest ago first."""
        return () if self._several is None else self._several.bank.tasks

    def run(self, feed: Mapping[str, Array], task: RunnableTask | None) -> dict[str, Array]:
        """The outputs of a batch of one task."""
        self.check_open()
        if self._single is not None:
            return self._single.run(feed, task)
        count = next(iter(feed.values())).shape[0]
        rows = self.run_rows(feed, [task] * count, range(count))
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def run_rows(self, feed: Mapping[str, Array], tasks: Sequence[RunnableTask | None], rows: Sequence[int]) -> Rows:
        """The outputs of every row, by its own task."""
        return self.open_several().run(feed, tasks, rows)

    def forget(self, task: RunnableTask | None) -> None:
        """Let a task that nobody can name any more give way before all others."""
        if task is not None and self._several is not None:
            self._several.bank.forget(task)

    def close(self) -> None:
        """Let go of the model; runs under way keep it to their end."""
        self._closed, self._single, self._several, self._pair = True, None, None, None

    def check_open(self) -> None:
        """Raise BuildError where the session is closed."""
        if self._closed:
            raise BuildError("this session is closed", where=str(self._build))
