"""Training from end to end: the deltas of a task, or of several, in; the best epoch's out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from surgeon.errors import CompositionError, SpecError
from surgeon.train.batches import encode
from surgeon.train.checkpoint import clear_checkpoints, newest_checkpoint, write_checkpoint
from surgeon.train.evaluation import check_rows
from surgeon.train.identity import identify
from surgeon.train.joint import Joint
from surgeon.train.kinds import kind_of
from surgeon.train.options import TrainOptions
from surgeon.train.outcome import DivergedError, Progress, TrainResult
from surgeon.train.processes import ALONE, Processes
from surgeon.train.rows import TaskRows
from surgeon.train.run import Data, Run, StepCallback

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from surgeon.compiler import Compiled
    from surgeon.model import TaskModel

ProgressCallback = Callable[[Progress], None]


def train_task(
    model: TaskModel,
    tokenizer: PreTrainedTokenizerBase,
    train_rows: Sequence[Any],
    validation_rows: Sequence[Any] | None,
    options: TrainOptions,
    *,
    checkpoint_dir: Path | None = None,
    progress: ProgressCallback | None = None,
    callbacks: Sequence[StepCallback] = (),
    processes: Processes = ALONE,
) -> TrainResult:
    """Train the deltas of `model` in place; go on from the newest checkpoint in `checkpoint_dir` if there is one.

    The rows are of the kind that the task's head learns from: `Row`, `Words`, `Question`, `Completion` or `Chat`.

    `callbacks` get `(model, step, steps)` after each step, while its gradients are there. A run that does not finish
    leaves the model as it was, and its last checkpoint; one that does leaves a checkpoint that says so, which
    `clear_checkpoints` removes. Raises DivergedError where a loss is not finite: then no checkpoint is left.
    """
    rows = {"task": TaskRows(train_rows, validation_rows)}
    with _run(Joint({"task": model}), rows, tokenizer, options, processes) as run:
        return _train(run, checkpoint_dir, progress, callbacks)


def train_tasks(
    compiled: Compiled,
    rows: Mapping[str, TaskRows],
    tokenizer: PreTrainedTokenizerBase,
    options: TrainOptions,
    *,
    train_base: bool = False,
    checkpoint_dir: Path | None = None,
    progress: ProgressCallback | None = None,
    callbacks: Sequence[StepCallback] = (),
    processes: Processes = ALONE,
) -> TrainResult:
    """Train several tasks in one run, as `train_task` does one; batches of each are drawn as `options.sampling` says.

    The best epoch is the one of the best mean over the tasks. With `train_base` the base's own weights are trained
    too, in place (Multi-Task Adapters); `compiled` is then one of these tasks over that new base, `model` gives new
    modules, and `save` writes both. Raises CompositionError where the base holds weights in another form (NF4).
    """
    if not rows:
        raise SpecError("there are no tasks to train", there_is=compiled.tasks)
    if train_base and compiled.program.stored:
        forms = sorted({entry.form for entry in compiled.program.stored.values()})
        raise CompositionError(
            f"the base holds weights in {', '.join(forms)}, which cannot be trained",
            try_="train the base with a spec that leaves its weights as they are",
        )
    joint = Joint({task: compiled.model(task) for task in rows}, train_base=train_base)
    with _run(joint, rows, tokenizer, options, processes) as run:
        result = _train(run, checkpoint_dir, progress, callbacks)
    if train_base:
        compiled.renew(rows)
    return result


@contextmanager
def _run(
    joint: Joint,
    rows: Mapping[str, TaskRows],
    tokenizer: PreTrainedTokenizerBase,
    options: TrainOptions,
    processes: Processes,
) -> Iterator[Run]:
    """A run before its first step; where it fails, the models are as they were."""
    _check(joint, rows, options)
    kinds = {task: kind_of(model) for task, model in joint.models.items()}
    length = options.max_length or next(iter(kinds.values())).max_length
    options = options.model_copy(update={"max_length": length})
    with _threads(options.threads), torch.random.fork_rng(joint.cuda):
        torch.manual_seed(options.seed + processes.rank)
        data = {
            task: Data(
                kinds[task],
                encode(model, tokenizer, rows[task].training, length),
                encode(model, tokenizer, rows[task].validation or (), length) if rows[task].validation else [],
                kinds[task].padding(model, tokenizer),
                options.packing,
            )
            for task, model in joint.models.items()
        }
        if options.packing:
            for task, model in joint.models.items():
                check_packing(model, data[task])
        identity = identify(joint, rows, options, processes)
        processes.agree(identity)
        run = Run(joint, options, data, identity, processes)
        with _frugal(joint, on=options.gradient_checkpointing), joint.training():
            yield run


def _train(
    run: Run, folder: Path | None, progress: ProgressCallback | None, callbacks: Sequence[StepCallback]
) -> TrainResult:
    """All steps that are left; `folder` is that of the checkpoints."""
    found = newest_checkpoint(folder) if folder is not None else None
    leads = run.processes.leads
    if found is not None:
        run.restore(found, folder)
    try:
        for now in run.steps(callbacks):
            if folder is not None and run.checkpoint_due():
                checkpoint = run.checkpoint()
                if leads:
                    write_checkpoint(folder, checkpoint)
            if progress is not None:
                progress(now)
    except DivergedError:
        if folder is not None and leads:
            clear_checkpoints(folder)
        raise
    return run.finish(found)


def _check(joint: Joint, rows: Mapping[str, TaskRows], options: TrainOptions) -> None:
    """Raise DataError or SpecError for rows that do not fit their task, or the options."""
    for task, model in joint.models.items():
        kind = kind_of(model)
        check_rows(kind, rows[task].training)
        kind.check(rows[task].validation or ())
    without = sorted(task for task, one in rows.items() if not one.validation)
    if without and len(without) < len(rows):
        raise SpecError(
            f"there are no rows to validate {', '.join(without)} with, and the best epoch is one for all tasks",
            try_="rows to validate every task with, or none",
        )
    if options.patience is not None and without:
        raise SpecError("`patience` waits for a better epoch, and there are no rows to validate with")


def check_packing(model: TaskModel, data: Data) -> None:
    """Raise SpecError where texts that share a row do not get the loss they get alone."""
    few = sorted(data.examples, key=lambda e: len(e.input_ids))[:4]
    device, mode = next(model.parameters()).device, model.training
    length = sum(len(e.input_ids) for e in few)
    model.eval()
    with torch.no_grad():
        alone = float(model(**data.kind.batch(few, data.pad, device)).loss)
        together = float(model(**data.kind.packed(few, data.pad, device, length)).loss)
    model.train(mode)
    exact = next(model.parameters()).dtype == torch.float32
    if not math.isclose(alone, together, rel_tol=2e-5 if exact else 1e-2, abs_tol=1e-5):
        raise SpecError(
            "rows cannot be packed: with this base and surgery a text that shares its row is read otherwise than alone",
            there_is=f"loss alone: {alone:.6g}; packed: {together:.6g}",
            try_="without packing",
        )


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _frugal(joint: Joint, *, on: bool) -> Iterator[None]:
    models = joint.models.values() if on else ()
    for model in models:
        model.gradient_checkpointing_enable()
    try:
        yield
    finally:
        for model in models:
            model.gradient_checkpointing_disable()
