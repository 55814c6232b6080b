"""The graphs of a build, each a session of ONNX Runtime: one task a batch, or a task a row."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from onnxruntime import InferenceSession

from surgeon.errors import BuildError
from surgeon.runtime.bank import Bank
from surgeon.runtime.generation import Pair
from surgeon.runtime.manifest import DECODER, ENCODER, MIXED, MIXED_DECODER, MIXED_ENCODER, Manifest
from surgeon.runtime.mixed import MixedGraph, open_bank
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
        self._manifest = manifest
        self._bank: Bank | None = None
        self._several: MixedGraph | None = None
        self._pairs: dict[bool, Pair] = {}
        self._opening = partial(opening, build, manifest)
        self._opening_bank = partial(open_bank, build, manifest, private, bounds)
        self._lock = threading.RLock()
        self._single: SingleGraph | None = None if mixed else SingleGraph(opening(build, manifest), manifest)
        if mixed:
            self.open_several()

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

    def open_pair(self, *, several: bool = False) -> Pair:
        """Encoder and decoder of a build that writes texts with both, for a batch of one task or of several tasks."""
        self.check_open()
        pair = self._pairs.get(several)
        if pair is None:
            with self._lock:
                pair = self._pairs.get(several)
                if pair is None:
                    graphs = (MIXED_ENCODER, MIXED_DECODER) if several else (ENCODER, DECODER)
                    pair = self._pairs[several] = Pair(*(self._opening(graph=graph) for graph in graphs))
        return pair

    def open_bank(self) -> Bank:
        """The tasks at hand for batches of several. Raises SpecError where the build takes one task a batch."""
        self.check_open()
        with self._lock:
            bank = self._bank = self._bank or self._opening_bank()
        return bank

    def open_several(self) -> MixedGraph:
        """The graph of several tasks a batch, opened if it is not. Raises SpecError where the build has none."""
        self.check_open()
        several = self._several
        if several is None:
            with self._lock:
                several = self._several
                if several is None:
                    bank = self.open_bank()
                    several = self._several = MixedGraph(self._opening(graph=MIXED), self._manifest, bank)
        return several

    @property
    def resident(self) -> tuple[str, ...]:
        """Names of the tasks at hand for batches of several tasks, the one used longest ago first."""
        return () if self._bank is None else self._bank.tasks

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
        if task is not None and self._bank is not None:
            self._bank.forget(task)

    def close(self) -> None:
        """Let go of the model; runs under way keep it to their end."""
        with self._lock:  # not while a graph is being opened, which would stay
            self._closed, self._single, self._several, self._bank, self._pairs = True, None, None, None, {}

    def check_open(self) -> None:
        """Raise BuildError where the session is closed."""
        if self._closed:
            raise BuildError("this session is closed", where=str(self._build))
