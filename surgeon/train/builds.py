"""Training tasks of a build: from data files to packed weights, and on from where a killed run was."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError

from surgeon.build import check_writable
from surgeon.compiler import load
from surgeon.errors import SpecError, did_you_mean
from surgeon.ledger import initial
from surgeon.model import TaskModel
from surgeon.runtime.document import read_manifest
from surgeon.train.batches import load_tokenizer
from surgeon.train.checkpoint import clear_checkpoints, newest_checkpoint
from surgeon.train.joint import Joint
from surgeon.train.kinds import Kind, kind, kind_of, takes_labels
from surgeon.train.loop import ProgressCallback, train_tasks
from surgeon.train.options import TrainOptions
from surgeon.train.outcome import TrainResult
from surgeon.train.processes import processes
from surgeon.train.rows import TaskRows, hold_out, known_labels

CHECKPOINTS = ".training"
LONGEST_NAME = 200


class Files(NamedTuple):
    """The data of one task: a file to train on, and one to validate with, or the share of the rows to hold out."""

    data: str | Path
    validation: str | Path | float | None = None


def train_build(
    build: str | Path,
    files: Mapping[str, Files],
    *,
    columns: Mapping[str, str] = MappingProxyType({}),
    fresh: bool = False,
    train_base: str | Path | None = None,
    device: str | None = None,
    options: TrainOptions | None = None,
    progress: ProgressCallback | None = None,
    report: Callable[[str], None] | None = None,
) -> TrainResult:
    """Train the tasks that `files` names, from the weights packed last, and pack what came out.

    `columns` gives other names for those of the files. A run that was stopped goes on when called again with the same
    data and options; `fresh` forgets it, and the packed weights too, but for frozen ones. The build changes only at
    the end, at once. `device` is torch's word for where; unset it is a GPU where there is one. With `train_base` the
    base's own weights are trained too: then the build stays as it was, and one of these tasks over the new base is
    written there, the base itself in its folder `base`.

    Where `accelerate launch` or `torchrun` has started several processes, all of them call this: each takes a share of
    every batch, and the first writes.
    """
    team = processes()
    place = team.device or _device(device)
    build, say = Path(build), (report if team.leads else None) or (lambda _: None)
    tasks = sorted(files)
    folder = build / CHECKPOINTS / _folder_name(tasks)
    if train_base is not None:
        check_writable(Path(train_base))
    known = {task: _kind(build, task) for task in tasks}
    # A mistake in the data shows before the base is read.
    early = {task: _rows(of, files[task], columns) for task, of in known.items() if of is not None}
    compiled = load(build, writes=False, progress=say)
    models = {task: compiled.model(task) for task in tasks}
    for model in models.values():
        model.to(place)
    rows = {task: early.get(task) or _rows(kind_of(model), files[task], columns) for task, model in models.items()}
    if team.leads and (fresh or (train_base is None and _packed_already(folder, models))):
        clear_checkpoints(folder)
    team.wait()
    if fresh:
        for task, model in models.items():
            _start_over(model, f"{compiled.spec.seed}/{task}")
    base = compiled.base.tokenizer_path
    tokenizer = load_tokenizer(build, compiled.base.max_length, base and base.parent)
    say("training")
    result = train_tasks(
        compiled,
        rows,
        tokenizer,
        options or TrainOptions(),
        train_base=train_base is not None,
        checkpoint_dir=folder,
        progress=progress if team.leads else None,
        processes=team,
    )
    if team.leads:
        if train_base is None:
            say(f"packing {', '.join(tasks)}")
            compiled.pack(build, *tasks)
        else:
            compiled.save(train_base, progress=say)
        clear_checkpoints(folder)
        if folder.parent.is_dir() and not any(folder.parent.iterdir()):
            shutil.rmtree(folder.parent)
    team.wait()
    return result


def _device(wanted: str | None) -> torch.device:
    """Where to train. Raises SpecError for a device that is not there."""
    try:
        device = torch.device(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch's words for an unknown device, and for one it cannot use
        raise SpecError(
            f"cannot train on '{wanted}': {str(error).strip().splitlines()[0]}", where="surgeon train", try_="cpu"
        ) from error
    return device


def _folder_name(tasks: Sequence[str]) -> str:
    """A name for the checkpoints of a run; no task has a `+` in its own."""
    name = "+".join(tasks)
    return name if len(name) <= LONGEST_NAME else f"+{hashlib.sha256(name.encode()).hexdigest()}"


def _start_over(model: TaskModel, seed: str) -> None:
    """Draw what is trained anew."""
    sizes = {"labels": model.config.num_labels}
    frozen = {name: t for name, t in model.state_dict().items() if not model.get_parameter(name).requires_grad}
    model.load_state_dict(initial(model.ledger, seed, sizes, model.names) | frozen)


def _packed_already(folder: Path, models: Mapping[str, TaskModel]) -> bool:
    """Whether the run that left a checkpoint was stopped after its outcome had been packed."""
    found = newest_checkpoint(folder)
    best = {} if found is None else found.under("best")
    own = {} if found is None else Joint(models).tensors()
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


def _rows(of: Kind[Any], files: Files, columns: Mapping[str, str]) -> TaskRows:
    """Rows to train on, and those to validate with."""
    rows, validation = of.read(files.data, columns), files.validation
    if isinstance(validation, float):
        return TaskRows(*hold_out(rows, validation))
    return TaskRows(rows, None if validation is None else of.read(validation, columns))


def read_options(given: Mapping[str, Any]) -> TrainOptions:
    """Options from what a user set. Raises SpecError in the words of the command line."""
    try:
        return TrainOptions(**given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0]).replace("_", "-")
        raise SpecError(f"--{name}: {first['msg'][:1].lower()}{first['msg'][1:]}, got {first['input']}") from error
