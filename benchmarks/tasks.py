"""What a task costs: its file against its tensors, and loading it."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from onnxruntime import LoraAdapter

from benchmarks.bases import BASES
from benchmarks.measure import THREADS, Section
from surgeon import Session, compile

ROUNDS = 50


def measure() -> Iterator[Section]:
    """One table."""
    rows = []
    for name, base in BASES.items():
        with tempfile.TemporaryDirectory() as folder:
            os.environ["SURGEON_CACHE"] = str(Path(folder, "cache"))
            surgery = [{"lora": {"rank": 16, "where": ["attention.query", "attention.value"]}}]
            compiled = compile({"base": base, "surgery": surgery, "tasks": {"t": {"labels": 2}}})
            rows.append(_row(name, compiled.save(Path(folder, "build"))))
    yield Section(
        "A task file",
        "LoRA r=16 on q and v with a head of two labels. *bare load* is ONNX Runtime mapping the file; *added* is "
        "`Session.add_task`: an own copy, checksum, names, shapes, types and finiteness before anybody sees it. "
        "Aims: file ≤ tensors + 100 bytes a tensor + 1 KB; load < 1 ms.",
        ("base", "tensors", "tensor bytes", "file bytes", "overhead", "allowed", "bare load", "added"),
        tuple(rows),
    )


def _row(name: str, build: Path) -> tuple[str, ...]:
    session = Session(build, threads=THREADS)
    path = build / session.manifest.tasks["t"].adapter
    count = len(session.manifest.deltas)
    size = 4 * session.tasks["t"].parameters
    bare, added = [], []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        LoraAdapter().Load(str(path))
        bare.append(time.perf_counter() - start)
        start = time.perf_counter()
        session.add_task(path, "again", replace=True)
        added.append(time.perf_counter() - start)
    overhead = path.stat().st_size - size
    loads = (f"{1000 * statistics.median(times):.2f} ms" for times in (bare, added))
    return (name, str(count), f"{size:,}", f"{size + overhead:,}", f"{overhead:,}", f"{100 * count + 1024:,}", *loads)
