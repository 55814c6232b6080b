"""What adapters and fused adapters cost, and what dropping the lowest layers saves, at run time and in training."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from benchmarks.bases import BASES, inputs
from benchmarks.measure import THREADS, Section, interleave, milliseconds, ratio
from benchmarks.training import step
from surgeon import Session, compile
from surgeon.compiler import Compiled

SHAPES = {(1, 32): 40, (4, 64): 20}
TRAINED = (8, 64, 6)
DROPS = (0, 1, 3, 5)
FUSED = (0, 2, 4, 8)
SURGERY = {
    "adapter": {"adapter": {"placement": "pfeiffer", "activation": "relu", "bottleneck": 48}},
    "fusion": {"fusion": {"of": max(FUSED), "bottleneck": 48}},
}
NO_TASK, AGAIN = "no task", "base again"


def measure() -> Iterator[Section]:
    """Three tables a base."""
    for name in BASES:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["SURGEON_CACHE"] = str(Path(folder, "cache"))
            yield from _base(name, Path(folder))


def _base(name: str, folder: Path) -> Iterator[Section]:
    compile({"base": BASES[name]}, out=folder / "plain")
    counts = [f"of-{n}" for n in FUSED if n]
    sessions = {"plain": Session(folder / "plain", threads=THREADS)}
    trained = {}
    for kind, surgery in SURGERY.items():
        tasks = ["t"] if kind == "adapter" else counts
        spec = {"base": BASES[name], "surgery": [surgery], "tasks": {task: {"labels": 2} for task in tasks}}
        trained[kind] = compile(spec)
        for task in counts if kind == "fusion" else ():
            _keep(trained[kind], task, int(task.removeprefix("of-")))
        sessions[kind] = Session(trained[kind].save(folder / kind), threads=THREADS)
    yield _fused(name, sessions, counts)
    yield _dropped(name, sessions, counts[-1])
    yield _training(name, trained, counts[-1])


def _keep(compiled: Compiled, task: str, count: int) -> None:
    """Fuse only the first `count` adapters."""
    model = compiled.model(task)
    free = compiled.program.ledger.free
    model.load_state_dict(
        {
            name: tensor[:count] if free(name).get(0, "").endswith("adapters") else tensor
            for name, tensor in model.state_dict().items()
        }
    )


def _fused(name: str, sessions: dict[str, Session], counts: list[str]) -> Section:
    rows = []
    for (batch, tokens), rounds in SHAPES.items():
        arrays = {k: t.numpy() for k, t in inputs(batch, tokens).items()}
        runs = {"plain": partial(sessions["plain"].run, arrays), "of-0": partial(sessions["fusion"].run, arrays)}
        runs |= {task: partial(sessions["fusion"].run, arrays, task) for task in counts}
        times = interleave(runs, rounds)
        shown = [f"**{ratio(times, task, 'plain'):.2f}**" for task in ("of-0", *counts)]
        rows.append((f"{batch} × {tokens}", milliseconds(times["plain"]), *shown))
    return Section(
        f"Fused adapters: {name}",
        "AdapterFusion of N adapters, m=48, on one graph; ratio to our export of the base without surgery. "
        "Aim: four at 4 × 64 ≤ 1.15.",
        ("batch × tokens", "plain", *(f"N={n}" for n in FUSED)),
        tuple(rows),
    )


def _dropped(name: str, sessions: dict[str, Session], most: str) -> Section:
    rows = []
    columns = (*(f"n={n}" for n in DROPS), NO_TASK, AGAIN)
    for (batch, tokens), rounds in SHAPES.items():
        arrays = {k: t.numpy() for k, t in inputs(batch, tokens).items()}
        for kind, task in (("adapter", "t"), ("fusion", most)):
            runs = {"plain": partial(sessions["plain"].run, arrays), AGAIN: partial(sessions["plain"].run, arrays)}
            runs |= {f"n={n}": partial(sessions[kind].run, arrays, task, drop=n) for n in DROPS}
            runs |= {NO_TASK: partial(sessions[kind].run, arrays)}
            times = interleave(runs, rounds)
            shown = [f"**{ratio(times, column, 'plain'):.3f}**" for column in columns]
            rows.append((f"{kind if kind == 'adapter' else most}, {batch} × {tokens}", *shown))
    return Section(
        f"AdapterDrop at run time: {name}",
        "`Session.run(…, drop=n)`; ratio to the base without surgery, which also stands against itself. One adapter a "
        "layer, m=48, or a fusion of eight. Where adapters may act, ONNX Runtime does not fuse the norm behind them, "
        "and unfused that is faster: so a build may be faster than its base.",
        ("what, batch × tokens", *columns),
        tuple(rows),
    )


def _training(name: str, trained: dict[str, Compiled], most: str) -> Section:
    batch, tokens, rounds = TRAINED
    rows = []
    for kind, task in (("adapter", "t"), ("fusion", most)):
        model = trained[kind].model(task).train()
        take = step(model, batch, tokens)

        def dropped(n: int, model: torch.nn.Module = model, take: object = take) -> None:
            model.drop(n)
            take()

        times = interleave({f"n={n}": partial(dropped, n) for n in DROPS}, rounds, warm=1)
        shown = [f"**{ratio(times, f'n={n}', 'n=0'):.2f}**" for n in DROPS[1:]]
        rows.append((f"{kind if kind == 'adapter' else most}, {batch} × {tokens}", milliseconds(times["n=0"]), *shown))
        model.drop(0)
    return Section(
        f"AdapterDrop in training: {name}",
        "A step without the adapters of the first n layers; ratio to a step with all of them.",
        ("what, batch × tokens", "n=0", *(f"n={n}" for n in DROPS[1:])),
        tuple(rows),
    )
