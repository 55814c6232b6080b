"""Accuracy on real sentences: every technique, and its peer where there is one; run by `make quality`.

Both go through `surgeon.train`: same base, rows, batches, optimiser, learning rate and number of steps. Each finished
run is a line of benchmarks/out/quality.jsonl, so a run that was stopped goes on; the page is written from these lines.
Times of a step are taken at the end, ours and the peer's in turn.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file

from benchmarks.bases import BASES, open_model
from benchmarks.measure import THREADS, Section, interleave, milliseconds, ratio
from benchmarks.recipes import LEFT_OUT, Recipe, recipes
from benchmarks.training import step
from demo.data import prepare
from surgeon import compile
from surgeon.runtime.taskfile import write_adapter
from surgeon.train import Row, TrainOptions, evaluate, labels_of, load_tokenizer, read_rows, train_task

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "out" / "quality.jsonl"
PAGE = HERE.parent / "docs" / "quality.md"
BASE, LABELS = "MiniLM-L6", ["negative", "positive"]
OURS, HEAD = "Surgeon", "head"


@dataclass(frozen=True)
class Setting:
    """What all runs of a table have in common."""

    rows: int
    test_rows: int
    epochs: int
    max_length: int = 64
    batch_size: int = 16

    @property
    def steps(self) -> int:
        """Of one run."""
        return self.epochs * math.ceil(self.rows / self.batch_size)

    def options(self, rate: float, seed: int, threads: int) -> TrainOptions:
        """For the one loop."""
        own = {"epochs": self.epochs, "batch_size": self.batch_size, "max_length": self.max_length}
        return TrainOptions(**own, learning_rate=rate, seed=seed, threads=threads)


@dataclass(frozen=True)
class Result:
    """One finished run."""

    technique: str
    by: str
    seed: int
    rate: float
    accuracy: float
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Runs:
    """The finished runs of a row of the table, by whose they are."""

    recipe: Recipe
    setting: Setting
    results: Mapping[str, list[Result]]

    @property
    def own(self) -> list[Result]:
        """Ours."""
        return self.results[OURS]

    @property
    def peer(self) -> list[Result]:
        """The peer's; empty where there is none."""
        return self.results.get(self.recipe.by, [])


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
    section = table(rows, steps, setting, given.seeds)
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
def _compiled(name: str) -> Any:
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


def table(rows: list[Runs], steps: Mapping[str, Mapping[str, list[float]]], setting: Setting, seeds: int) -> Section:
    """A row for each technique, with a verdict."""
    text = (
        f"The demo's `movie` task on {BASE}: {setting.rows} training rows of two labels, {setting.test_rows} test "
        f"rows, {setting.epochs} epochs of batches of {setting.batch_size}, {setting.steps} steps, or the epochs that "
        f"the table says, texts cut at {setting.max_length} tokens, {seeds} seeds; the last step's weights are tested. "
        "Accuracy is the mean ± standard deviation over the seeds. *Peer* is PEFT, or the base itself in plain torch "
        "with the same parameters trained; both go through the same loop with the same rows, batches, optimiser and "
        f"learning rate. A *step* is forward, backward and AdamW on {setting.batch_size} × 32 tokens with two threads, "
        "ours and the peer's in turn: medians."
        "\n\n*Above head only*: than head-only trained as long, by more than two pooled standard errors. *As the "
        "peer*: no further apart than two pooled standard errors, or than one test row."
    )
    columns = (
        "technique",
        "epochs",
        "learning rate",
        "accuracy",
        "peer's",
        "trained",
        "file",
        "peer's file",
        "step",
        "step / peer's",
    )
    heads = {row.setting.epochs: row.own for row in rows if row.recipe.name == HEAD}
    cells = tuple(tuple(_row(row, heads.get(row.setting.epochs), steps[row.recipe.name])) for row in rows)
    return Section("Accuracy of every technique", text, (*columns, "above head only", "as the peer"), cells)


def _row(row: Runs, head: list[Result] | None, steps: Mapping[str, list[float]]) -> Iterator[str]:
    own, peer, by = row.own, row.peer, row.recipe.by
    yield f"`{row.recipe.name}`"
    yield str(row.setting.epochs)
    yield f"{row.recipe.rate:g}"
    yield _spread(own)
    yield f"{_spread(peer)} ({by})" if peer else "none"
    yield f"{own[0].parameters:,}"
    yield f"{own[0].bytes / 1e6:.2f} MB"
    yield f"{peer[0].bytes / 1e6:.2f} MB" if peer else ""
    yield milliseconds(steps[OURS])
    yield f"{ratio(steps, OURS, by):.2f}" if peer else ""
    yield "" if row.recipe.name == HEAD or head is None else _above(own, head)
    yield _like(own, peer, row.setting) if peer else ""


def _spread(results: list[Result]) -> str:
    accuracies = [r.accuracy for r in results]
    spread = f" ± {statistics.stdev(accuracies):.3f}" if len(accuracies) > 1 else ""
    return f"{statistics.mean(accuracies):.3f}{spread}"


def _difference(one: list[Result], other: list[Result]) -> tuple[float, float]:
    """Difference of the means, and twice its pooled standard error."""
    a, b = ([r.accuracy for r in side] for side in (one, other))
    if min(len(a), len(b)) < 2:
        return statistics.mean(a) - statistics.mean(b), math.nan
    squares = (len(a) - 1) * statistics.variance(a) + (len(b) - 1) * statistics.variance(b)
    pooled = squares / (len(a) + len(b) - 2)
    return statistics.mean(a) - statistics.mean(b), 2 * math.sqrt(pooled * (1 / len(a) + 1 / len(b)))


def _above(own: list[Result], head: list[Result]) -> str:
    gap, allowed = _difference(own, head)
    verdict = (
        "unknown" if math.isnan(allowed) else "yes" if gap > allowed else "within noise" if gap > -allowed else "**no**"
    )
    return f"{verdict} ({gap:+.3f})"


def _like(own: list[Result], peer: list[Result], setting: Setting) -> str:
    gap, allowed = _difference(own, peer)
    allowed = max(allowed, 1 / setting.test_rows) if not math.isnan(allowed) else allowed
    verdict = "unknown" if math.isnan(allowed) else "yes" if abs(gap) <= allowed + 1e-9 else "**no**"
    return f"{verdict} ({gap:+.3f}, noise {allowed:.3f})"


def page(section: Section) -> str:
    """docs/quality.md."""
    left = "\n".join(f"- `{name}`: {why}." for name, why in LEFT_OUT.items())
    silent = (
        "PEFT has no adapters, AdapterDrop or Compacter; its prefixes refuse a classifier under this version of "
        "transformers, so `prefix` and `p_tuning_v2` have no peer here. The classifier over virtual tokens (`prompt`, "
        "`p_tuning`) has a rate of its own, ours and the peer's alike (`HEAD_RATES` of benchmarks/recipes.py). Prompts "
        "need more steps than the other techniques (`EPOCHS` there); head-only is shown with as many."
    )
    return f"# Quality\n\nWritten by `make quality`.\n\n{section.markdown()}\n{silent}\n\nNot in the table:\n\n{left}\n"


if __name__ == "__main__":
    main()
