"""The comparison of AdapterFusion's paper, on the demo's three real tasks with few rows; run by `make quality-fusion`.

    head          the classifier alone
    ST-A          an adapter trained on the task alone
    F. w/ ST-A    the frozen adapters of all tasks, fused for the task; the task's own is the ST-A one of the same rows
    full          every parameter of the base

The other tasks' adapters have all their rows: what a small task can use is what larger ones learned. Every run is
written to benchmarks/out as soon as it is done, so a comparison that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from safetensors.torch import save_file

from demo.data import prepare
from surgeon import compile, read_spec
from surgeon.compiler import Compiled
from surgeon.train import Row, TrainOptions, evaluate, labels_of, load_tokenizer, read_rows, train_task

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "quality-fusion.md"
SPEC = HERE.parent / "specs" / "demo.yaml"
OUT = HERE / "out" / "quality-fusion"
LENGTH = 64
ADAPTER = {"adapter": {"placement": "pfeiffer", "activation": "relu", "bottleneck": 48}}
RATES = {"head": 1e-2, "ST-A": 1e-3, "F. w/ ST-A": 1e-3, "full": 1e-4}

console = Console()


class Job(NamedTuple):
    """One training run."""

    method: str
    task: str
    rows: int
    seed: int
    epochs: int
    source_rows: int = 0


class Bench:
    """The data, and what was done already."""

    def __init__(self, epochs: int, source_rows: int) -> None:
        self.epochs, self.source_rows = epochs, source_rows
        self.files = prepare(HERE.parent / "demo" / "out" / "data")
        self.spec = read_spec(SPEC)
        self.results = OUT / "results.jsonl"
        OUT.mkdir(parents=True, exist_ok=True)
        lines = self.results.read_text(encoding="utf-8").splitlines() if self.results.is_file() else []
        self.done = {Job(*entry["job"]): entry["accuracy"] for entry in map(json.loads, lines)}

    def run(self, method: str, task: str, rows: int, seed: int) -> None:
        """Train and test once, unless that was done."""
        job = self.job(method, task, rows, seed)
        if job in self.done:
            return
        if method == "F. w/ ST-A":
            adapters = [self.adapter(other, rows if other == task else self.source_rows, seed) for other in self.files]
            compiled, accuracy = self._train(job, [{"fusion": {"of": [str(path) for path in adapters]}}])
        else:
            surgery: dict[str, list[dict[str, Any]]] = {"head": [], "ST-A": [ADAPTER], "full": [{"full": {}}]}
            compiled, accuracy = self._train(job, surgery[method])
        if method == "ST-A":
            _save(compiled, task, self._path(job))
        with self.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"job": list(job), "accuracy": accuracy}) + "\n")
        self.done[job] = accuracy
        console.print(f"{method:12} {task:8} {rows or 'all':>5} rows, seed {seed}: {accuracy:.3f}")

    def job(self, method: str, task: str, rows: int, seed: int) -> Job:
        """The run of these; the other tasks' rows matter to a fusion alone."""
        return Job(method, task, rows, seed, self.epochs, self.source_rows if method == "F. w/ ST-A" else 0)

    def adapter(self, task: str, rows: int, seed: int) -> Path:
        """The file of a trained ST-A adapter; `rows` 0 is all rows."""
        job = self.job("ST-A", task, rows, seed)
        if not self._path(job).is_file():
            self.done.pop(job, None)
            self.run("ST-A", task, rows, seed)
        return self._path(job)

    def _path(self, job: Job) -> Path:
        return OUT / f"{job.task}-{job.rows}-{job.seed}-{job.epochs}.safetensors"

    def _train(self, job: Job, surgery: list[dict[str, Any]]) -> tuple[Compiled, float]:
        whole = self.spec.model_dump(mode="json", exclude_none=True)
        spec = whole | {"surgery": surgery, "tasks": {job.task: whole["tasks"][job.task]}, "seed": job.seed}
        compiled = compile(spec)
        model = compiled.model(job.task)
        tokenizer = load_tokenizer(str(compiled.base.tokenizer_path), compiled.base.max_length)
        rows = {
            split: read_rows(path, labels_of(model), "text", "label") for split, path in self.files[job.task].items()
        }
        chosen: list[Row] = rows["train"][: job.rows or None]
        options = TrainOptions(
            epochs=job.epochs,
            learning_rate=RATES[job.method],
            max_length=LENGTH,
            seed=job.seed,
            batch_size=16,
            threads=torch.get_num_threads(),
        )
        train_task(model, tokenizer, chosen, rows["validation"], options)
        return compiled, evaluate(model, tokenizer, rows["test"], max_length=LENGTH).accuracy


def _save(compiled: Compiled, task: str, path: Path) -> None:
    """The trained tensors as a build keeps them."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in compiled.model(task).state_dict().items()}
    save_file(tensors, path, metadata={"base": compiled.base.fingerprint})


def page(bench: Bench, tasks: list[str], sizes: list[int], seeds: list[int]) -> str:
    """The table: mean and spread over the seeds."""
    lines = [
        "# Quality of AdapterFusion",
        "",
        "Written by `make quality-fusion`: accuracy on the test rows of the demo's three tasks (600 each), MiniLM-L6, "
        f"{bench.epochs} epochs, the best by 300 validation rows; mean ± standard deviation over "
        f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}.",
        "",
        "*F. w/ ST-A* fuses the adapters of all three tasks: the task's own, trained on the same rows, and those of "
        f"the other two, trained on {bench.source_rows or 'all'} of theirs. *MT-A*, adapters trained together with the "
        "base, does not exist here: the base is frozen, so adapters trained together are adapters trained alone.",
        "",
        "| task | rows | " + " | ".join(RATES) + " |",
        "| --- | ---: |" + " ---: |" * len(RATES),
    ]
    for task in tasks:
        for rows in sizes:
            cells = [_cell(bench.done, [bench.job(m, task, rows, s) for s in seeds]) for m in RATES]
            lines.append(f"| {task} | {rows or 'all'} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(done: Mapping[Job, float], jobs: list[Job]) -> str:
    found = [done[job] for job in jobs if job in done]
    if len(found) < len(jobs):
        return ""
    spread = f" ± {statistics.stdev(found):.3f}" if len(found) > 1 else ""
    return f"{statistics.mean(found):.3f}{spread}"


def main() -> None:
    """Run what is missing, and write the page after every run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    numbers: Callable[[str], list[int]] = lambda text: [int(part) for part in text.split(",")]  # noqa: E731
    parser.add_argument("--rows", type=numbers, default=[50, 200, 800], help="training rows, as 50,200; 0 is all")
    parser.add_argument(
        "--source-rows", type=int, default=0, help="training rows of the other tasks' adapters; 0 is all"
    )
    parser.add_argument("--tasks", type=lambda text: text.split(","), help="some of the tasks only, as movie,kind")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--page", type=Path, default=PAGE, help="where the page is written")
    given = parser.parse_args()
    bench, seeds = Bench(given.epochs, given.source_rows), list(range(given.seeds))
    tasks = given.tasks or list(bench.files)
    for seed in seeds:
        for rows in given.rows:
            for task in tasks:
                for method in RATES:
                    bench.run(method, task, rows, seed)
                    given.page.write_text(page(bench, tasks, given.rows, seeds), encoding="utf-8")
    console.print(page(bench, tasks, given.rows, seeds))


if __name__ == "__main__":
    main()
