"""The comparison of AdapterFusion's paper, on the demo's three real tasks; run by `make quality-fusion`.

    head          the classifier alone
    ST-A          an adapter trained on the task alone
    MT-A          adapters of all tasks trained together with the base (Multi-Task Adapters)
    F. w/ ST-A    the frozen ST-A adapters of all tasks, fused for the task
    F. w/ MT-A    the frozen MT-A adapters, fused for the task over the frozen base of MT-A
    full          every parameter of the base

The tasks have few, some and many rows, and change places from seed to seed: what a small task can use is what larger
ones learned. Every run is written to benchmarks/out as soon as it is done, so a comparison that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from safetensors.torch import save_file

from demo.data import prepare
from surgeon import compile, read_spec
from surgeon.base import write_base
from surgeon.compiler import Compiled
from surgeon.train import (
    TaskRows,
    TrainOptions,
    evaluate,
    labels_of,
    load_tokenizer,
    read_rows,
    train_task,
    train_tasks,
)

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "quality-fusion.md"
SPEC = HERE.parent / "specs" / "demo.yaml"
OUT = HERE / "out" / "quality-fusion"
LENGTH, BATCH = 64, 16
ADAPTER = {"adapter": {"placement": "pfeiffer", "activation": "relu", "bottleneck": 48}}
RATES = {"head": 1e-2, "ST-A": 1e-3, "MT-A": 1e-3, "F. w/ ST-A": 1e-3, "F. w/ MT-A": 1e-3, "full": 1e-4}
BASE_RATE = RATES["full"]

console = Console()


class Setting(NamedTuple):
    """What all runs of a table have in common."""

    rows: tuple[int, ...]
    steps: int
    epochs: int
    validation_rows: int
    test_rows: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return "-".join([*map(str, self.rows), *map(str, self[1:])])

    def epochs_of(self, rows: int) -> int:
        """As many epochs as make so many steps, but so many at least."""
        return max(self.epochs, math.ceil(self.steps / math.ceil(rows / BATCH)))


class Job(NamedTuple):
    """One number of the table. Its rows follow from task and seed."""

    method: str
    task: str
    seed: int


class Bench:
    """The data, and what was done already."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.files = prepare(HERE.parent / "demo" / "out" / "data")
        self.spec = read_spec(SPEC).model_dump(mode="json", exclude_none=True)
        self.folder = OUT / setting.name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.results = self.folder / "results.jsonl"
        lines = self.results.read_text(encoding="utf-8").splitlines() if self.results.is_file() else []
        self.done = {Job(*entry["job"]): float(entry["accuracy"]) for entry in map(json.loads, lines)}

    def size(self, task: str, seed: int) -> int:
        """The training rows of a task: the sizes go round."""
        return self.setting.rows[(list(self.files).index(task) + seed) % len(self.setting.rows)]

    def seed(self, seed: int, written: Callable[[], None]) -> None:
        """All runs of a seed that are missing."""
        for method in RATES:
            jobs = [Job(method, task, seed) for task in self.files]
            missing = [job for job in jobs if job not in self.done]
            if method == "MT-A" and missing:
                self._together(seed)
            elif missing:
                for job in missing:
                    self._alone(job)
            written()
        shutil.rmtree(self._base(seed), ignore_errors=True)

    def _alone(self, job: Job) -> None:
        began, sources = time.perf_counter(), job.method.removeprefix("F. w/ ")
        surgery: dict[str, list[dict[str, Any]]] = {"head": [], "ST-A": [ADAPTER], "full": [{"full": {}}]}
        if sources != job.method:
            adapters = [str(self._adapter(Job(sources, task, job.seed))) for task in self.files]
            surgery[job.method] = [{"fusion": {"of": adapters}}]
        base = {"base": {**self.spec["base"], "model": str(self._base(job.seed))}} if sources == "MT-A" else {}
        tasks = {job.task: self.spec["tasks"][job.task]}
        compiled = compile({**self.spec, **base, "surgery": surgery[job.method], "tasks": tasks, "seed": job.seed})
        rows = self._rows(compiled, job.task, job.seed)
        options = self._options(job.method, job.seed, self.setting.epochs_of(len(rows.training)))
        train_task(compiled.model(job.task), self._tokenizer(compiled), rows.training, rows.validation, options)
        if job.method == "ST-A":
            self._save(compiled, job)
        self._test(compiled, job, began)

    def _together(self, seed: int) -> None:
        """MT-A: one run for all tasks; the new base is kept until the seed is done."""
        began = time.perf_counter()
        compiled = compile({**self.spec, "surgery": [ADAPTER], "seed": seed})
        rows = {task: self._rows(compiled, task, seed) for task in self.files}
        epochs = self.setting.epochs_of(sum(len(one.training) for one in rows.values()))
        options = self._options("MT-A", seed, epochs)
        train_tasks(compiled, rows, self._tokenizer(compiled), options, train_base=True)
        shutil.rmtree(self._base(seed), ignore_errors=True)
        write_base(compiled.base, self._base(seed))
        for task in self.files:
            self._save(compiled, Job("MT-A", task, seed))
        for task in self.files:
            self._test(compiled, Job("MT-A", task, seed), began)

    def _options(self, method: str, seed: int, epochs: int) -> TrainOptions:
        return TrainOptions(
            epochs=epochs,
            learning_rate=RATES[method],
            base_learning_rate=BASE_RATE,
            max_length=LENGTH,
            seed=seed,
            batch_size=BATCH,
        )

    def _rows(self, compiled: Compiled, task: str, seed: int) -> TaskRows:
        labels, paths = labels_of(compiled.model(task)), self.files[task]
        training, validation = (read_rows(paths[split], labels, "text", "label") for split in ("train", "validation"))
        return TaskRows(training[: self.size(task, seed)], validation[: self.setting.validation_rows])

    def _test(self, compiled: Compiled, job: Job, began: float) -> None:
        model = compiled.model(job.task)
        rows = read_rows(self.files[job.task]["test"], labels_of(model), "text", "label")[: self.setting.test_rows]
        accuracy = evaluate(model, self._tokenizer(compiled), rows, max_length=LENGTH).accuracy
        with self.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"job": list(job), "accuracy": accuracy}) + "\n")
        self.done[job] = accuracy
        size, seconds = self.size(job.task, job.seed), time.perf_counter() - began
        console.print(f"{job.method:12} {job.task:8} {size:>5} rows, seed {job.seed}: {accuracy:.3f}  {seconds:.0f} s")

    def _save(self, compiled: Compiled, job: Job) -> None:
        """The trained tensors as a build keeps them."""
        tensors = {n: t.detach().contiguous() for n, t in compiled.model(job.task).state_dict().items()}
        save_file(tensors, self._path(job), metadata={"base": compiled.program.fingerprint})

    def _adapter(self, job: Job) -> Path:
        """A trained adapter, trained again where its file, or its base, is gone."""
        if not self._path(job).is_file() or (job.method == "MT-A" and not self._base(job.seed).is_dir()):
            if job.method == "MT-A":
                self._together(job.seed)
            else:
                self._alone(job)
        return self._path(job)

    def _path(self, job: Job) -> Path:
        return self.folder / f"{job.method}-{job.task}-{job.seed}.safetensors"

    def _base(self, seed: int) -> Path:
        return self.folder / f"base-{seed}"

    @staticmethod
    def _tokenizer(compiled: Compiled) -> Any:
        return load_tokenizer(str(compiled.base.tokenizer_path), compiled.base.max_length)


def page(bench: Bench, seeds: int) -> str:
    """Two tables: the means for each size, and every number."""
    setting, tasks = bench.setting, list(bench.files)
    cells: dict[tuple[str, int, str], list[float]] = {}
    for job, accuracy in bench.done.items():
        if job.seed < seeds:
            cells.setdefault((job.task, bench.size(job.task, job.seed), job.method), []).append(accuracy)
    methods = list(RATES)
    lines = [
        "# Quality of AdapterFusion",
        "",
        f"Written by `make quality-fusion`: accuracy on {setting.test_rows} test rows of each of the demo's tasks, "
        f"MiniLM-L6, {seeds} seed{'' if seeds == 1 else 's'}. In every seed the tasks have {_said(setting.rows)} "
        f"training rows, and they change places from seed to seed. At least {setting.steps} steps of {BATCH} rows and "
        f"{setting.epochs} epochs; the best epoch by {setting.validation_rows} validation rows a task. In *MT-A* it is "
        "the best for all tasks together.",
        "",
        "*ST-A* is an adapter trained on the task alone, *MT-A* the tasks' adapters trained together with the base "
        "(`surgeon train --train-base`). *F. w/* fuses the adapters of all three tasks for one of them, over the base "
        "they were trained on, which is frozen then.",
        "",
        "Mean over the tasks:",
        "",
        *_table(("rows",), [((size,), _by_size(cells, size, tasks)) for size in setting.rows], methods),
        "",
        "Every task:",
        "",
        *_table(
            ("task", "rows"),
            [((t, s), {m: cells.get((t, s, m), []) for m in methods}) for t in tasks for s in setting.rows],
            methods,
        ),
    ]
    return "\n".join(lines) + "\n"


def _said(rows: Iterable[int]) -> str:
    *most, last = map(str, rows)
    return f"{', '.join(most)} and {last}"


def _by_size(cells: Mapping[tuple[str, int, str], list[float]], size: int, tasks: list[str]) -> dict[str, list[float]]:
    """Numbers of the tasks that all methods have."""
    whole = [task for task in tasks if all((task, size, method) in cells for method in RATES)]
    return {method: [statistics.mean(cells[task, size, method]) for task in whole] for method in RATES}


def _table(
    heads: tuple[str, ...], rows: Iterable[tuple[tuple[object, ...], Mapping[str, list[float]]]], methods: list[str]
) -> list[str]:
    lines = [f"| {' | '.join((*heads, *methods))} |", "|" + " --- |" * len(heads) + " ---: |" * len(methods)]
    for keys, found in rows:
        numbers = [f"{statistics.mean(found[m]):.3f}" if found[m] else "" for m in methods]
        lines.append(f"| {' | '.join((*map(str, keys), *numbers))} |")
    return lines


def main() -> None:
    """Run what is missing, and write the page after every method."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    numbers: Callable[[str], tuple[int, ...]] = lambda text: tuple(int(part) for part in text.split(","))  # noqa: E731
    parser.add_argument("--rows", type=numbers, default=(30, 100, 300), help="training rows of the three tasks")
    parser.add_argument("--seeds", type=int, default=3, help="three let every task have every size once")
    parser.add_argument("--steps", type=int, default=60, help="the fewest steps of a run")
    parser.add_argument("--epochs", type=int, default=4, help="the fewest epochs of a run")
    parser.add_argument("--validation-rows", type=int, default=60)
    parser.add_argument("--test-rows", type=int, default=600)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--page", type=Path, default=PAGE, help="where the page is written")
    given = parser.parse_args()
    if len(given.rows) != 3:
        parser.error("--rows takes three numbers, one for each task")
    torch.set_num_threads(given.threads)
    bench = Bench(Setting(given.rows, given.steps, given.epochs, given.validation_rows, given.test_rows))

    def write() -> None:
        given.page.write_text(page(bench, given.seeds), encoding="utf-8")

    for seed in range(given.seeds):
        bench.seed(seed, write)
    console.print(page(bench, given.seeds))


if __name__ == "__main__":
    main()
