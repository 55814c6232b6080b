"""Rows of many tasks in one batch against the plain base and PEFT, and several tasks a text against each alone."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from benchmarks.bases import BASES, inputs, open_model
from benchmarks.measure import THREADS, Section, interleave, milliseconds, ratio
from surgeon import Session, compile
from surgeon.runtime.tuning import CANDIDATE

SHAPES = {(8, 32, THREADS): 20, (8, 128, THREADS): 10, (64, 16, THREADS): 10, (8, 128, 1): 10}
"""Rounds by rows, tokens and threads."""
TASKS = (1, 8, 64)
MOST = max(TASKS)
NAMES = [f"t{i}" for i in range(MOST)]
LAYERS = {"MiniLM-L6": 6, "BERT-base": 12}
FANS = {"MiniLM-L6": (0, 3), "BERT-base": (0, 5)}
ASKED = (4, 16)
ROUNDS = {32: 20, 128: 8}


def measure() -> Iterator[Section]:
    """Two tables a base."""
    for name in BASES:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["SURGEON_CACHE"] = str(Path(folder, "cache"))
            compile({"base": BASES[name]}, out=Path(folder, "plain"))
            yield _mixed(name, Path(folder))
            yield _fans(name, Path(folder))


def _open(name: str, folder: Path, lowest: int = 0, count: int = MOST) -> Session:
    """A build of LoRA r=16 on q and v from a layer on, of so many tasks."""
    where = [f"attention.{side}@{lowest}-{LAYERS[name] - 1}" for side in ("query", "value")]
    spec: dict[str, Any] = {
        "base": BASES[name],
        "surgery": [{"lora": {"rank": 16, "where": where}}],
        "tasks": {task: {"labels": 2} for task in NAMES[:count]},
        "export": {"modes": ["switch", "mixed"]},
    }
    compile(spec, out=folder / f"from-{lowest}")
    return Session(folder / f"from-{lowest}", threads=THREADS)


def _mixed(name: str, folder: Path) -> Section:
    _open(name, folder).close()
    peer = _peer(name)
    rows = []
    for (batch, tokens, threads), rounds in SHAPES.items():
        session, plain = (Session(folder / build, threads=threads) for build in ("from-0", "plain"))
        slim = Session(folder / "from-0", threads=threads, fusions=(CANDIDATE,))
        torch.set_num_threads(threads)
        fed = inputs(batch, tokens)
        arrays = {key: t.numpy() for key, t in fed.items()}
        runs: dict[str, Callable[[], object]] = {"plain": partial(plain.run, arrays)}
        for count in TASKS:
            draw = partial(random.Random(count).choices, NAMES[:count], k=batch)
            runs[f"{count}"] = partial(_drawn, session.run, arrays, draw)
            runs[f"PEFT {count}"] = partial(_drawn, peer, fed, draw)
        runs["slim"] = partial(_drawn, slim.run, arrays, partial(random.Random(MOST).choices, NAMES, k=batch))
        runs["one by one"] = partial(_one_by_one, session, arrays, random.Random(0))
        times = interleave(runs, rounds * min(LAYERS.values()) // LAYERS[name])
        ours = [f"**{ratio(times, f'{count}', 'plain'):.2f}**" for count in TASKS]
        peers = [f"{ratio(times, f'PEFT {count}', f'{count}'):.2f}" for count in TASKS]
        fewer = f"**{ratio(times, 'slim', 'plain'):.2f}**", f"{ratio(times, f'PEFT {MOST}', 'slim'):.2f}"
        switched = f"{ratio(times, 'one by one', str(MOST)):.2f}"
        shape = f"{batch} × {tokens}" + ("" if threads == THREADS else f", {threads} thread")
        rows.append((shape, milliseconds(times["plain"]), *ours, *peers, *fewer, switched))
        for opened in (session, plain, slim):
            opened.close()
    torch.set_num_threads(THREADS)
    return Section(
        f"Rows of many tasks in one batch: {name}",
        "LoRA r=16 on q and v; every row draws its task anew each call, from 1, 8 or 64 tasks at hand. Ratios to "
        "our export of the base without surgery; then of PEFT's `adapter_names` in eager PyTorch, and of a run for "
        "each task in turn, to the mixed batch. *without SLN* leaves out ONNX Runtime's SkipLayerNorm fusion, as "
        "`Session.tuned` and `surgeon serve --tune` do where that is faster, to the plain base with it. "
        "Aims: 64 tasks / plain ≤ 1.03 at 8 × 128, PEFT / ours ≥ 1.5.",
        (
            "batch × tokens",
            "plain",
            *(f"{count} / plain" for count in TASKS),
            *(f"PEFT / ours, {count}" for count in TASKS),
            f"{MOST} without SLN / plain",
            "PEFT / that",
            f"one by one / {MOST}",
        ),
        tuple(rows),
    )


def _drawn(run: Callable[..., object], fed: dict[str, Any], draw: Callable[[], list[str]]) -> object:
    return run(fed, draw())


def _one_by_one(session: Session, arrays: dict[str, Any], draw: random.Random) -> None:
    """What one does without a mixed batch: a run for each task of a batch."""
    tasks = draw.choices(NAMES, k=len(arrays["input_ids"]))
    for task in dict.fromkeys(tasks):
        own = [i for i, other in enumerate(tasks) if other == task]
        session.run({key: array[own] for key, array in arrays.items()}, task)


def _peer(name: str) -> Callable[[dict[str, torch.Tensor], list[str]], object]:
    config = LoraConfig(r=16, lora_alpha=16, target_modules=["query", "value"], init_lora_weights=False)
    model = get_peft_model(open_model(name), config, adapter_name=NAMES[0]).eval()
    assert isinstance(model, PeftModel)
    for task in NAMES[1:]:
        model.add_adapter(task, config)
    model.eval()

    def run(fed: dict[str, torch.Tensor], tasks: list[str]) -> object:
        with torch.no_grad():
            return model(**fed, adapter_names=tasks)

    return run


def _fans(name: str, folder: Path) -> Section:
    plain, layers = Session(folder / "plain", threads=THREADS), LAYERS[name]
    rows = []
    for lowest in FANS[name]:
        session = _open(name, folder / "fan", lowest, max(ASKED))
        for tokens, rounds in ROUNDS.items():
            one = {key: t.numpy() for key, t in inputs(1, tokens).items()}
            runs: dict[str, Callable[[], object]] = {}
            for count in ASKED:
                many = {key: array.repeat(count, 0) for key, array in one.items()}
                runs[f"{count} texts"] = partial(plain.run, many)
                runs[f"{count} tasks"] = partial(session.run, one, [NAMES[:count]])
            times = interleave(runs, rounds)
            shown = []
            for count in ASKED:
                model = (lowest + (layers - lowest) * count) / (layers * count)
                shown += [f"**{ratio(times, f'{count} tasks', f'{count} texts'):.2f}**", f"{model:.2f}"]
            rows.append((f"{lowest} of {layers}, 1 × {tokens}", *shown))
    return Section(
        f"Several tasks a text: {name}",
        "LoRA r=16 on q and v above the lowest k layers, which are computed once; ratio to the base without surgery on "
        "as many texts, beside AdapterDrop's cost model (k + (L − k)·N) / (L·N).",
        ("k, batch × tokens", *(head for count in ASKED for head in (f"N={count}", "model"))),
        tuple(rows),
    )
