"""Training a task of a build: from a data file to packed weights, and on from where a killed run was."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
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
from surgeon.train.kinds import Kind, kind, kind_of, takes_labels
from surgeon.train.loop import ProgressCallback, train_task
from surgeon.train.options import TrainOptions
from surgeon.train.processes import processes
from surgeon.train.rows import hold_out, known_labels
from surgeon.train.run import TrainResult

CHECKPOINTS = ".training"


def train_build(
    build: str | Path,
    task: str,
    data: str | Path,
    *,
    validation: str | Path | float | None = None,
    columns: Mapping[str, str] = MappingProxyType({}),
    fresh: bool = False,
    options: TrainOptions | None = None,
    progress: ProgressCallback | None = None,
    report: Callable[[str], None] | None = None,
) -> TrainResult:
    """Train `task` on the rows of a file, from the weights packed last, and pack what came out.

    `validation` is a file or a share of the rows; `columns` gives other names for those of the file. A run that was
    stopped goes on when called again with the same data and options; `fresh` forgets it, and the packed weights too,
    but for frozen ones. The build changes only at the end, at once.

    Where `accelerate launch` or `torchrun` has started several processes, all of them call this: each takes a share of
    every batch, and the first writes.
    """
    team = processes()
    build, say = Path(build), (report if team.leads else None) or (lambda _: None)
    folder = build / CHECKPOINTS / task
    sources = (data, validation, columns)
    known = _kind(build, task)
    early = None if known is None else _rows(known, *sources)  # a mistake in the data shows before the base is read
    compiled = load(build, progress=say)
    model = compiled.model(task)
    if team.device is not None:
        model.to(team.device)
    rows, held = early or _rows(kind_of(model), *sources)
    if team.leads and (fresh or _packed_already(folder, model)):
        clear_checkpoints(folder)
    team.wait()
    if fresh:
        sizes = {"labels": model.config.num_labels}
        frozen = {name: t for name, t in model.state_dict().items() if not model.get_parameter(name).requires_grad}
        model.load_state_dict(initial(model.ledger, f"{compiled.spec.seed}/{task}", sizes, model.names) | frozen)
    base = compiled.base.tokenizer_path
    tokenizer = load_tokenizer(build, compiled.base.max_length, base and base.parent)
    say("training")
    result = train_task(
        model,
        tokenizer,
        rows,
        held,
        options or TrainOptions(),
        checkpoint_dir=folder,
        progress=progress if team.leads else None,
        processes=team,
    )
    if team.leads:
        say(f"packing {task}")
        compiled.pack(build, task)
        clear_checkpoints(folder)
        if folder.parent.is_dir() and not any(folder.parent.iterdir()):
            shutil.rmtree(folder.parent)
    team.wait()
    return result


def _packed_already(folder: Path, model: TaskModel) -> bool:
    """Whether the run that left a checkpoint was stopped after its outcome had been packed."""
    found = newest_checkpoint(folder)
    own = model.state_dict()
    best = {} if found is None else found.under("best")
    return bool(best) and best.keys() == own.keys() and all(torch.equal(best[n], t.cpu()) for n, t in own.items())


def _kind(build: Path, task: str) -> Kind[Any] | None:
    """What a task of a build learns from; None where its base has to be asked for the labels that the task keeps.

    Raises SpecError where there is no such task, or none that rows train.
    """
    manifest = read_manifest(build)
    if task not in manifest.tasks:
        raise SpecError(f"there is no task '{task}'", there_is=manifest.tasks, try_=did_you_mean(task, manifest.tasks))
    head, names = manifest.base.head, manifest.tasks[task].labels
    if not takes_labels(head):
        return kind(head, 0)
    return None if names is None else kind(head, known_labels(names))


def _rows(
    of: Kind[Any], data: str | Path, validation: str | Path | float | None, columns: Mapping[str, str]
) -> tuple[list[Any], list[Any] | None]:
    """Rows to train on, and those to validate with."""
    rows = of.read(data, columns)
    if isinstance(validation, float):
        return hold_out(rows, validation)
    return rows, None if validation is None else of.read(validation, columns)


def read_options(given: Mapping[str, Any]) -> TrainOptions:
    """Options from what a user set. Raises SpecError in the words of the command line."""
    try:
        return TrainOptions(**given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0]).replace("_", "-")
        raise SpecError(f"--{name}: {first['msg'][:1].lower()}{first['msg'][1:]}, got {first['input']}") from error
