"""What the texts of an encoder-decoder go on with: its two graphs, and the tensors of one task, or of a task a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from onnxruntime import InferenceSession, OrtValue

from surgeon.errors import DataError
from surgeon.runtime.bank import Bank
from surgeon.runtime.generation.rows import Row
from surgeon.runtime.manifest import Generation, Manifest
from surgeon.runtime.ort import ORT_ERRORS
from surgeon.runtime.taskfile import Array

LOGITS = "logits"


class Half:
    """One of the two graphs with some deltas bound, for as many calls as have the same."""

    def __init__(self, session: InferenceSession, outputs: Sequence[str]) -> None:
        self._session, self._outputs = session, outputs
        self._binding = session.io_binding()
        self._bound: dict[str, OrtValue] = {}

    def bind(self, deltas: Mapping[str, OrtValue]) -> None:
        """Let these tensors be the deltas from now on, and all others what they were."""
        for name, value in deltas.items():
            self._binding.bind_ortvalue_input(name, value)
        self._bound.update(deltas)  # whose memory is read at every call

    def run(self, given: Mapping[str, Array]) -> list[OrtValue]:
        """The outputs. Raises DataError where the graph cannot run."""
        fed = {name: OrtValue.ortvalue_from_numpy(array) for name, array in given.items()}
        for name, value in fed.items():
            self._binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            self._binding.bind_output(name)
        try:
            self._session.run_with_iobinding(self._binding)
        except ORT_ERRORS as error:
            raise DataError(
                f"the model cannot run on these inputs: {str(error).strip()}",
                there_is="; ".join(f"{name} {list(array.shape)}" for name, array in given.items()),
            ) from error
        found: list[OrtValue] = self._binding.get_outputs()
        return found


@dataclass(frozen=True)
class Pair:
    """The graphs of an encoder-decoder."""

    encoder: InferenceSession
    decoder: InferenceSession

    def halves(self, generation: Generation) -> tuple[Half, Half]:
        """Encoder and decoder with nothing bound."""
        assert generation.source is not None
        bridge = [port.name for port in generation.source.bridge]
        return Half(self.encoder, bridge), Half(self.decoder, [LOGITS, *(t.present for t in generation.cache)])


class Halves(Protocol):
    """The same for both: a source is read once, then its text goes on by a token a call."""

    def read(self, row: Row, fed: Mapping[str, Array]) -> list[OrtValue]:
        """What the decoder reads of a row's source."""

    def write(self, rows: Sequence[Row], fed: Mapping[str, Array]) -> list[OrtValue]:
        """The logits of all rows, and the cache after them."""


class OneTaskHalves:
    """All rows are of the task of these tensors."""

    def __init__(self, pair: Pair, generation: Generation, deltas: Mapping[str, OrtValue]) -> None:
        self._encoder, self._decoder = pair.halves(generation)
        for half in (self._encoder, self._decoder):
            half.bind(deltas)

    def read(self, row: Row, fed: Mapping[str, Array]) -> list[OrtValue]:
        """What the decoder reads of a row's source."""
        return self._encoder.run(fed)

    def write(self, rows: Sequence[Row], fed: Mapping[str, Array]) -> list[OrtValue]:
        """The logits of all rows, and the cache after them."""
        return self._decoder.run(fed)


class TaskPerRowHalves:
    """Every row is of its own task, or of none; the bank has them at hand."""

    def __init__(self, pair: Pair, manifest: Manifest, generation: Generation, bank: Bank) -> None:
        self._encoder, self._decoder = pair.halves(generation)
        self._bank, self._positions = bank, manifest.positions
        self._known: dict[Half, object] = {}

    def read(self, row: Row, fed: Mapping[str, Array]) -> list[OrtValue]:
        """What the decoder reads of a row's source."""
        return self._run(self._encoder, [row], {**fed, "rows": np.zeros(1, np.int64)})

    def write(self, rows: Sequence[Row], fed: Mapping[str, Array]) -> list[OrtValue]:
        """The logits of all rows, and the cache after them."""
        return self._run(self._decoder, rows, fed)

    def _run(self, half: Half, rows: Sequence[Row], fed: Mapping[str, Array]) -> list[OrtValue]:
        """Bound are the tasks of these rows alone, copied: of what takes positions no more than they need, for what
        others need would be lost to the text.
        """
        tasks = [row.task for row in rows if row.task is not None]
        sizes = {s: max((task.info.sizes.get(s, 0) for task in tasks), default=0) for s in self._positions}
        with self._bank.holding(tasks) as held:
            places = [0 if row.task is None else held.places[row.task] for row in rows]
            own = sorted({0, *places})
            if self._known.get(half) != (held.version, sizes, own):
                few = {name: array[own] for name, array in held.arrays.items()}
                arrays = self._bank.cut(replace(held, arrays=few), sizes)
                half.bind({name: OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()})
                self._known[half] = held.version, sizes, own
        return half.run({**fed, "task_ids": np.array([own.index(place) for place in places], np.int64)})
