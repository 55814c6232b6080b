"""Which of ONNX Runtime's fusions help on this machine: measured, for more fusion is not always faster."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from onnxruntime import InferenceSession

from surgeon.runtime.engine import Provider, open_model
from surgeon.runtime.manifest import Manifest, Port
from surgeon.runtime.taskfile import Array

CANDIDATE = "SkipLayerNormFusion"  # seen to cost a post-norm encoder some per cent on CPUs
MARGIN = 0.99  # a gain below one per cent is noise


def faster_without(
    build: Path,
    manifest: Manifest,
    *,
    threads: int | None = None,
    providers: Sequence[Provider] | None = None,
    shape: tuple[int, int] = (1, 64),
    rounds: int = 15,
) -> tuple[str, ...]:
    """Names of the optimizers to leave out, for `Session(fusions=…)`: one, or none.

    Two throwaway sessions of the base, the files of which must have been checked, run in turns on a batch of `shape`;
    their medians decide.
    """
    feed = {port.name: _sample(port, shape) for port in manifest.inputs}
    if manifest.goes_on and manifest.generation is not None:
        feed |= {
            t.past.name: np.zeros(t.shape(batch=shape[0], past=0), t.past.dtype) for t in manifest.generation.cache
        }
    sessions = [
        open_model(build, manifest, threads=threads, providers=providers, verify=False, fusions=fusions)
        for fusions in ((), (CANDIDATE,))
    ]
    times: list[list[float]] = [[], []]
    for turn in range(rounds + 2):
        for session, taken in zip(sessions, times, strict=True):
            seconds = _time(session, feed)
            if turn >= 2:  # the first runs allocate
                taken.append(seconds)
    with_all, without = (statistics.median(taken) for taken in times)
    return (CANDIDATE,) if without < MARGIN * with_all else ()


def _time(session: InferenceSession, feed: dict[str, Array]) -> float:
    start = time.perf_counter()
    session.run(None, feed)
    return time.perf_counter() - start


def _sample(port: Port, shape: tuple[int, int]) -> Array:
    """Values of any kind: time does not depend on them. Symbolic axes take the sizes of `shape` in turn."""
    sizes = iter(shape)
    return np.ones([axis if isinstance(axis, int) else next(sizes) for axis in port.axes], dtype=port.dtype)
