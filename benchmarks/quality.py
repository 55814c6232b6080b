"""Accuracy on real sentences: every technique, and its peer where there is one; run by `make quality`.

Both go through `surgeon.train`: same base, rows, batches, optimiser, learning rate and number of steps. Each finished
run is a line of benchmarks/out/quality.jsonl, so a run that was stopped goes on; the page is written from these lines.
Times of a step are taken at the end, ours and the peer's in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file

from benchmarks.bases import BASES, open_model
from benchmarks.measure import THREADS, interleave
from benchmarks.quality_table import BASE, HEAD, OURS, Result, Runs, Setting, page, table
from benchmarks.recipes import Recipe, recipes
from benchmarks.training import step
from demo.data import prepare
from surgeon import compile
from surgeon.compiler import Compiled
from surgeon.runtime.taskfile import write_adapter
from surgeon.train import Row, evaluate, labels_of, load_tokenizer, read_rows, train_task

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "out" / "quality.jsonl"
PAGE = HERE.parent / "docs" / "quality.md"
LABELS = ["negative", "positive"]


def main() -> None:
    """Train what is still missing, then show and write the table."""
    reader = argparse.ArgumentParser(description=__doc__)
    reader.add_argument("--rows", type=int, default=600, help="training rows")
    reader.add_argument("--test-rows", type=int, default=600)
    reader.add_argument("--epochs", type=int, default=3)
    reader.add_argument("--batch-size", type=int, default=16)
    reader.add_argument("--seeds", type=int, default=3, help="runs of each")
    reader.add_argument("--threads", type=int, default=THREADS, help="of the training; steps are timed with two")
    reader.add_argument("--techniques", nargs="+", default=None, help="only these; the page is then not written")
    given = reader.parse_args()
    setting = Setting(given.rows, given.test_rows, given.epochs, batch_size=given.batch_size)
    chosen = [recipe for name, recipe in recipes().items() if given.techniques is None or name in given.techniques]
    console = Console()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    warnings.simplefilter("ignore")  # of the peers
    torch.set_num_threads(given.threads)
    began = time.perf_counter()
    entries = list(_entries(chosen, setting))
    for recipe, own in entries:
        for who in recipe.sides(OURS):
            for seed in range(given.seeds):
                if (recipe.name, who, seed, recipe.rate) not in _done(own):
                    found = run(recipe, who, seed, own, given.threads)
                    _keep(own, found)
                    said = f"{found.accuracy:.3f} after {time.perf_counter() - began:.0f} s"
                    console.print(f"{recipe.name:12} {own.epochs:3} epochs {who:12} seed {seed}: {said}")
    rows = [Runs(recipe, own, _results(recipe, own, given.seeds)) for recipe, own in entries]
    torch.set_num_threads(THREADS)
    steps = {recipe.name: step_times(recipe, setting) for recipe in chosen}
    section = table(rows, steps, setting)
    console.print(section.markdown())
    if given.techniques is None:
        PAGE.write_text(page(section), encoding="utf-8")


def _entries(chosen: list[Recipe], setting: Setting) -> Iterator[tuple[Recipe, Setting]]:
    """What is trained, and how long; head-only as long as each of the others."""
    longer = sorted({recipe.epochs for recipe in chosen if recipe.epochs} - {setting.epochs})
    for recipe in chosen:
        own = recipe.epochs or setting.epochs
        for epochs in [own, *longer] if recipe.name == HEAD else [own]:
            yield recipe, replace(setting, epochs=epochs)


def run(recipe: Recipe, who: str, seed: int, setting: Setting, threads: int) -> Result:
    """Train one model and test it."""
    train, test = _rows(setting)
    torch.manual_seed(seed)
    if who == OURS:
        model = _compiled(recipe.name).model(f"seed{seed}")
        with torch.no_grad():  # the classifier starts as the peer's does, as the base has it
            for name in model.state_dict():
                if name in model.ledger.deltas and model.ledger.deltas[name].optional:
                    model.get_parameter(name).copy_(model.ledger.deltas[name].default)
    else:
        assert recipe.peer is not None
        model = recipe.peer(open_model(BASE), setting.steps)
        if recipe.begin is not None:
            recipe.begin(model, _compile(recipe.name).model(f"seed{seed}"))
    train_task(model, _tokenizer(), train, None, setting.options(recipe.rate, seed, threads))
    accuracy = evaluate(model, _tokenizer(), test, max_length=setting.max_length).accuracy
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    size = _size(model, who)
    return Result(recipe.name, who, seed, recipe.rate, accuracy, parameters, size)


def step_times(recipe: Recipe, setting: Setting) -> dict[str, list[float]]:
    """Seconds of a training step on one batch of 32 tokens a row, ours and the peer's in turn."""
    models = {OURS: _compiled(recipe.name).model("seed0").train()}
    if recipe.peer:
        models[recipe.by] = recipe.peer(open_model(BASE), setting.steps).train()
    return interleave({who: step(model, setting.batch_size, 32) for who, model in models.items()}, rounds=10)


@cache
def _compiled(name: str) -> Compiled:
    """The models that are trained."""
    return _compile(name)


def _compile(name: str) -> Compiled:
    recipe = recipes()[name]
    tasks = {f"seed{seed}": {"labels": LABELS} for seed in range(10)}
    return compile({"base": BASES[BASE], "surgery": list(recipe.surgery), "tasks": tasks})


@cache
def _tokenizer() -> Any:
    base = _compiled("head").base
    return load_tokenizer(base.tokenizer_path, base.max_length)


@cache
def _rows(setting: Setting) -> tuple[list[Row], list[Row]]:
    """The demo's `movie` task; its rows are shuffled already."""
    files = prepare(HERE / "out" / "data")["movie"]
    labels = labels_of(_compiled("head").model("seed0"))
    return read_rows(files["train"], labels)[: setting.rows], read_rows(files["test"], labels)[: setting.test_rows]


def _size(model: Any, who: str) -> int:
    """Bytes of the file that one keeps: the task file for ONNX Runtime, the adapter that PEFT saves, or the tensors."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "file")
        if who == OURS:
            deployed = model.ledger.shrink(model.deployed())
            write_adapter(path, {n: t.detach().contiguous().numpy() for n, t in deployed.items()}, "0" * 64)
        elif who == "PEFT":
            model.model.save_pretrained(folder)
            path = Path(folder, "adapter_model.safetensors")
        else:
            save_file({name: t.contiguous() for name, t in model.state_dict().items()}, path)
        return path.stat().st_size


def _done(setting: Setting) -> dict[tuple[str, str, int, float], Result]:
    """The finished runs of this setting."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.is_file() else []
    read = [json.loads(line) for line in lines]
    results = [Result(**line["result"]) for line in read if line["setting"] == asdict(setting)]
    return {(r.technique, r.by, r.seed, r.rate): r for r in results}


def _results(recipe: Recipe, setting: Setting, seeds: int) -> dict[str, list[Result]]:
    done = _done(setting)
    return {who: [done[recipe.name, who, seed, recipe.rate] for seed in range(seeds)] for who in recipe.sides(OURS)}


def _keep(setting: Setting, result: Result) -> None:
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"setting": asdict(setting), "result": asdict(result)}) + "\n")


if __name__ == "__main__":
    main()
