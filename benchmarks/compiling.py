"""Compiling against plainly exporting the same base: time and peak memory, each in a process of its own."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.bases import BASES
from benchmarks.measure import THREADS, Section

ROUNDS = {"MiniLM-L6": 3, "BERT-base": 2}


def measure() -> Iterator[Section]:
    """One table."""
    yield Section(
        "Compiling",
        "A spec with LoRA r=16 and one task, against `torch.onnx.export` of the same base: time from the loaded base "
        "to the written files, peak memory of the process. *another rank* and *another task* compile a changed spec "
        "after the first one: the converted graph is reused, since its free dimensions depend on neither. Aims: time "
        "and memory ≤ 1.3.",
        (
            "base",
            "torch.onnx.export",
            "compile",
            "time ratio",
            "peak export",
            "peak compile",
            "memory ratio",
            "another rank",
            "to compile",
            "another task",
        ),
        tuple(_row(name) for name in BASES),
    )


def _row(name: str) -> tuple[str, ...]:
    found: dict[str, list[dict[str, float]]] = {variant: [] for variant in ("export", "compile", "rank", "task")}
    for _ in range(ROUNDS[name]):
        with tempfile.TemporaryDirectory() as folder:
            for variant, runs in found.items():
                runs.append(_run(name, variant, Path(folder)))
    seconds = {v: statistics.median(r["seconds"] for r in runs) for v, runs in found.items()}
    peaks = {v: statistics.median(r["peak"] for r in runs) for v, runs in found.items()}
    return (
        name,
        f"{seconds['export']:.1f} s",
        f"{seconds['compile']:.1f} s",
        f"**{seconds['compile'] / seconds['export']:.2f}**",
        f"{peaks['export'] / 1e6:.0f} MB",
        f"{peaks['compile'] / 1e6:.0f} MB",
        f"**{peaks['compile'] / peaks['export']:.2f}**",
        f"{seconds['rank']:.1f} s",
        f"**{seconds['rank'] / seconds['compile']:.2f}**",
        f"{seconds['task']:.1f} s",
    )


def _run(name: str, variant: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.compiling_once", name, variant, str(folder)]
    environment = {**os.environ, "SURGEON_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": str(THREADS)}
    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    found: dict[str, float] = json.loads(finished.stdout)
    return found
