"""A batch of one task in one run: the graph whose deltas are overridden by the task's tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from onnxruntime import InferenceSession, RunOptions

from surgeon.errors import DataError
from surgeon.runtime.engine import WARNING
from surgeon.runtime.manifest import Manifest
from surgeon.runtime.ort import ORT_ERRORS
from surgeon.runtime.taskfile import Array
from surgeon.runtime.tasks import RunnableTask

MASK = "attention_mask"


class SingleGraph:
    """The first graph of a build. A decoder's scores whole texts: its cache ends unread.

    It begins empty, or with the task's prefix where the cache is shared.
    """

    def __init__(self, session: InferenceSession, manifest: Manifest) -> None:
        self.session = session
        generation = manifest.generation
        self._cache = () if generation is None or generation.source is not None else generation.cache
        self._shared = generation is not None and generation.shared
        inside = {tensor.present for tensor in self._cache}
        self._outputs = [port.name for port in manifest.outputs if port.name not in inside]

    def run(self, feed: Mapping[str, Array], active: RunnableTask | None) -> dict[str, Array]:
        """The outputs by name. Raises DataError where the model cannot run on these inputs."""
        begun = active is not None and any(t.start is not None for t in self._cache)
        if self._shared and (begun or not feed[MASK].all()):  # such a graph reads several tokens alone, and no padding
            found = [self._run(row, active) for row in unpadded(feed)]
            return {name: np.concatenate([row[name] for row in found]) for name in self._outputs}
        return self._run(feed, active)

    def _run(self, feed: Mapping[str, Array], active: RunnableTask | None) -> dict[str, Array]:
        rows = next(iter(feed.values())).shape[0]
        given = {**feed, **{t.past.name: np.zeros(t.shape(batch=rows, past=0), t.past.dtype) for t in self._cache}}
        options = RunOptions()
        options.log_severity_level = WARNING
        if active is not None:
            active.activate(options)
            begun = [(t.past.name, t.start) for t in self._cache if t.start is not None]
            given |= {past: active.values()[start].numpy()[None] for past, start in begun}
        # `active` must outlive the run: the options hold no reference to its tensors.
        try:
            outputs = self.session.run(self._outputs, given, options)
        except ORT_ERRORS as error:
            raise refused(error, feed) from error
        return dict(zip(self._outputs, outputs, strict=True))


def unpadded(feed: Mapping[str, Array]) -> Iterator[dict[str, Array]]:
    """Every row without its padding."""
    for i, mask in enumerate(feed[MASK]):
        yield {name: array[i : i + 1, mask > 0] for name, array in feed.items()}


def refused(error: Exception, feed: Mapping[str, Array]) -> DataError:
    """The error for what ONNX Runtime says of a run."""
    return DataError(
        f"the model cannot run on these inputs: {str(error).strip()}",
        there_is="; ".join(f"{name} {array.dtype}{list(array.shape)}" for name, array in feed.items()),
    )
