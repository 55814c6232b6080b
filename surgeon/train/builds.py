"""Training a task of a build: from a data file to packed weights, and on from where a killed run was."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from surgeon.compiler import load
from surgeon.errors import SpecError, did_you_mean
from surgeon.ledger import initial
from surgeon.model import TaskModel
from surgeon.runtime.manifest import read_manifest
from surgeon.train.batches import load_tokenizer
from surgeon.train.checkpoint import clear_checkpoints, newest_checkpoint
from surgeon.train.loop import ProgressCallback, train_task
from surgeon.train.options import TrainOptions
from surgeon.train.rows import Labels, Row, hold_out, known_labels, labels_of, read_rows
from surgeon.train.run import TrainResult

CHECKPOINTS = ".training"


def train_build(
    build: str | Path,
    task: str,
    data: str | Path,
    *,
    validation: str | Path | float | None = None,
    columns: tuple[str, str] = ("text", "label"),
    fresh: bool = False,
    options: TrainOptions | None = None,
    progress: ProgressCallback | None = None,
    report: Callable[[str], None] | None = None,
) -> TrainResult:
    """Train `task` on the rows of a file, from the weights packed last, and pack what came out.

    `validation` is a file or a share of the rows. A run that was stopped goes on when called again with the same data
    and options; `fresh` forgets it, and the packed weights too, but for frozen ones. The build changes only at the end,
    at once.
    """
    build, say = Path(build), report or (lambda _: None)
    folder = build / CHECKPOINTS / task
    sources = (data, validation, columns)
    labels = _labels(build, task)
    early = None if labels is None else _rows(labels, *sources)  # a mistake in the data shows before the base is read
    compiled = load(build, progress=say)
    model = compiled.model(task)
    rows, held = early or _rows(labels_of(model), *sources)
    if fresh or _packed_already(folder, model):
        clear_checkpoints(folder)
    if fresh:
        sizes = {"labels": model.config.num_labels}
        frozen = {name: t for name, t in model.state_dict().items() if not model.get_parameter(name).requires_grad}
        model.load_state_dict(initial(model.ledger, f"{compiled.spec.seed}/{task}", sizes, model.names) | frozen)
    tokenizer = load_tokenizer(build, compiled.base.max_length)
    say("training")
    settings = options or TrainOptions()
    result = train_task(model, tokenizer, rows, held, settings, checkpoint_dir=folder, progress=progress)
    say(f"packing {task}")
    compiled.pack(build, task)
    clear_checkpoints(folder)
    if folder.parent.is_dir() and not any(folder.parent.iterdir()):
        shutil.rmtree(folder.parent)
    return result


def _packed_already(folder: Path, model: TaskModel) -> bool:
    """Whether the run that left a checkpoint was stopped after its outcome had been packed."""
    found = newest_checkpoint(folder)
    own = model.state_dict()
    best = {} if found is None else found.under("best")
    return bool(best) and best.keys() == own.keys() and all(torch.equal(best[n], t.cpu()) for n, t in own.items())


def _labels(build: Path, task: str) -> Labels | None:
    """The labels of a task of a build, None where it keeps the base's. Raises SpecError where there is no such task."""
    tasks = read_manifest(build).tasks
    if task not in tasks:
        raise SpecError(f"there is no task '{task}'", there_is=tasks, try_=did_you_mean(task, tasks))
    names = tasks[task].labels
    return None if names is None else known_labels(names)


def _rows(
    labels: Labels, data: str | Path, validation: str | Path | float | None, columns: tuple[str, str]
) -> tuple[list[Row], list[Row] | None]:
    """Rows to train on, and those to validate with."""
    rows = read_rows(data, labels, *columns)
    if isinstance(validation, float):
        return hold_out(rows, validation)
    return rows, None if validation is None else read_rows(validation, labels, *columns)


def read_options(given: Mapping[str, Any]) -> TrainOptions:
    """Options from what a user set. Raises SpecError in the words of the command line."""
    try:
        return TrainOptions(**given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0]).replace("_", "-")
        raise SpecError(f"--{name}: {first['msg'][:1].lower()}{first['msg'][1:]}, got {first['input']}") from error
