"""Several tasks of one text in one run: against a call for each, AdapterDrop's cost model and its published figures."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bases import BASES, inputs
from benchmarks.measure import THREADS, Section, interleave, ratio
from surgeon import Session, compile

LAYERS = {"MiniLM-L6": 6, "BERT-base": 12}
CUTS = {"MiniLM-L6": (0, 1, 3), "BERT-base": (0, 1, 5)}
FANS, ROUNDS, LENGTH = (2, 4, 8, 16), {"MiniLM-L6": 12, "BERT-base": 5}, 64
PUBLISHED = {(1, 2): "4.3 %", (1, 16): "8.4 %", (5, 2): "21 %", (5, 8): "39 %", (5, 16): "42 %"}
"""AdapterDrop (arXiv:2010.11918), sections 1 and 3, table 2: gain by layers without adapters and tasks, of twelve."""


def several(folder: Path) -> Iterator[Section]:
    """Several tasks of one text, lower layers shared, against a call for each, AdapterDrop's model, and its figures."""
    for name in BASES:
        os.environ["SURGEON_CACHE"] = str(folder / "cache")
        one = {k: t.numpy() for k, t in inputs(1, LENGTH).items()}
        runs: dict[str, Callable[[], object]] = {}
        for cut in CUTS[name]:
            session = _adapters(name, folder, cut)
            for count in FANS:
                names = [f"t{i}" for i in range(count)]
                runs[f"{cut} {count}"] = partial(session.run, one, [names])
                if cut == 0:
                    runs[f"calls {count}"] = partial(_each, session, one, names)
        times = interleave(runs, ROUNDS[name], warm=1)
        yield _fanned(name, times)


def _fanned(name: str, times: dict[str, list[float]]) -> Section:
    layers, rows = LAYERS[name], []
    for cut in CUTS[name]:
        for count in FANS:
            cost = partial(_cost, layers=layers, count=count)
            calls = f"{ratio(times, f'{cut} {count}', f'calls {count}'):.2f}"
            gain = ratio(times, f"0 {count}", f"{cut} {count}") - 1
            published = PUBLISHED.get((cut, count), "–") if layers == 12 else "–"
            rows.append(
                (
                    f"{cut} of {layers}, N={count}",
                    f"**{calls}**",
                    f"{cost(cut) / (layers * count):.2f}",
                    "–" if cut == 0 else f"**{gain:.1%}**",
                    "–" if cut == 0 else f"{cost(0) / cost(cut) - 1:.1%}",
                    published,
                )
            )
    return Section(
        f"Several tasks a text, and AdapterDrop's figures: {name}",
        f"Pfeiffer adapters (m=48) above the lowest k layers, one text of {LENGTH} tokens, N tasks in one run. *to N "
        "calls*: time to that of a call for each task, with adapters in all layers. *gain*: how much faster than with "
        "adapters "
        "in all layers, N tasks in one run as well. Models: `(k+1) + (L−1−k)·N` layers, for an adapter stands behind "
        "its layer. Published: AdapterDrop (arXiv:2010.11918), on GPUs, per layer 4.3 % to 8.4 %, five layers as five "
        "times that.",
        ("k, N", "to N calls", "model", "gain", "model", "published"),
        tuple(rows),
    )


def _cost(cut: int, layers: int, count: int) -> int:
    """Layers that are computed for one text and so many tasks."""
    return (cut + 1) + (layers - 1 - cut) * count


def _adapters(name: str, folder: Path, cut: int) -> Session:
    spec: dict[str, Any] = {
        "base": BASES[name],
        "surgery": [
            {"adapter": {"placement": "pfeiffer", "bottleneck": 48}},
            *([{"drop": {"layers": cut}}] * (cut > 0)),
        ],
        "tasks": {f"t{i}": {"labels": 2} for i in range(max(FANS))},
        "export": {"modes": ["switch", "mixed"]},
    }
    compile(spec, out=folder / f"{name}-above-{cut}")
    return Session(folder / f"{name}-above-{cut}", threads=THREADS)


def _each(session: Session, fed: dict[str, np.ndarray], names: Sequence[str]) -> None:
    for name in names:
        session.run(fed, name)
