"""The deployment side of the demo: runs a build where torch and transformers cannot be imported.

    python demo/serve.py BUILD PLAIN_BUILD SERVED.npz TASK=TEST.csv …

Prints JSON: accuracy per task, latency of swapped tasks against the plain base, and which heavy modules were loaded.
"""

from __future__ import annotations

import csv
import json
import statistics
import sys
import time
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

FORBIDDEN = ("torch", "transformers", "onnx", "onnxscript", "pydantic", "safetensors")


class NotHere(MetaPathFinder):
    """Makes the compile side's packages unimportable, as on a machine that has none of them."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        if fullname.partition(".")[0] in FORBIDDEN:
            raise ImportError(f"'{fullname}' is not installed here")
        return None


sys.meta_path.insert(0, NotHere())

import numpy as np  # noqa: E402
from rich.console import Console  # noqa: E402

from surgeon.runtime import Session  # noqa: E402

MAX_LENGTH = 64
COMPARED = 64
SHAPES = ((1, 32), (1, 128), (8, 128))
REST = 0.02  # seconds between calls, at least
ROUNDS = 15


def main() -> None:
    """Serve every test set and measure."""
    build, plain, served, *tests = sys.argv[1:]
    kept: dict[str, Any] = {}
    tasks = {}
    with Session(build, threads=2) as session:
        for item in tests:
            task, _, path = item.partition("=")
            tasks[task] = test(session, Path(build), task, Path(path), kept)
        with Session(plain, threads=2) as bare:
            latencies = [latency(session, bare, batch, tokens) for batch, tokens in SHAPES]
        np.savez(served, **kept)
    heavy = [name for name in FORBIDDEN if name in sys.modules]
    size = sum((Path(build) / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    print(json.dumps({"tasks": tasks, "latency": latencies, "heavy": heavy, "base_bytes": size}))


def test(session: Session, build: Path, task: str, path: Path, kept: dict[str, Any]) -> dict[str, Any]:
    """Accuracy of one task on its test rows; the first rows' inputs and logits are kept for comparison."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    texts = [row["text"] for row in rows]
    with Console(stderr=True).status(f"serving {len(texts)} texts to {task}"):
        answers = session.classify(texts, task, max_length=MAX_LENGTH)
    right = sum(answer.label == row["label"] for answer, row in zip(answers, rows, strict=True))
    first = session.encode(texts[:COMPARED], max_length=MAX_LENGTH)
    kept |= {f"{task}.{name}": array for name, array in first.items()}
    kept[f"{task}.logits"] = session.run(first, task)["logits"]
    info = session.tasks[task]
    file_size = (build / session.manifest.tasks[task].adapter).stat().st_size
    return {
        "accuracy": right / len(rows),
        "rows": len(rows),
        "labels": info.columns,
        "parameters": info.parameters,
        "bytes": file_size,
    }


def latency(session: Session, bare: Session, batch: int, tokens: int) -> dict[str, Any]:
    """Median milliseconds of the plain base and of another task on every call, interleaved.

    Between calls it rests as long as the last one took: the other session's threads spin for a while after theirs.
    """
    rng = np.random.default_rng(0)
    inputs = {"input_ids": rng.integers(1000, 20000, (batch, tokens))}
    names = list(session.tasks)
    times: dict[str, list[float]] = {"plain": [], "task": []}
    took = 0.0
    for i in range(-3, ROUNDS):
        for kind, one, task in (("plain", bare, None), ("task", session, names[i % len(names)])):
            time.sleep(max(REST, took))
            start = time.perf_counter()
            one.run(inputs, task)
            took = time.perf_counter() - start
            if i >= 0:
                times[kind].append(1000 * took)
    return {"shape": f"{batch} × {tokens}"} | {kind: statistics.median(values) for kind, values in times.items()}


if __name__ == "__main__":
    main()
