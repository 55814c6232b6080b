"""Training of one task from end to end: the deltas of a task's model in, the best epoch's deltas out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from surgeon.errors import SpecError
from surgeon.train.batches import encode
from surgeon.train.checkpoint import clear_checkpoints, newest_checkpoint, write_checkpoint
from surgeon.train.evaluation import check_rows
from surgeon.train.identity import identify
from surgeon.train.kinds import kind_of
from surgeon.train.options import TrainOptions
from surgeon.train.processes import ALONE, Processes
from surgeon.train.run import Data, DivergedError, Progress, Run, StepCallback, TrainResult, copy_weights, cuda_devices

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
    kind = kind_of(model)
    check_rows(kind, train_rows)
    kind.check(validation_rows or ())
    if options.patience is not None and not validation_rows:
        raise SpecError("`patience` waits for a better epoch, and there are no rows to validate with")
    length = options.max_length or kind.max_length
    options = options.model_copy(update={"max_length": length})
    with _threads(options.threads), torch.random.fork_rng(cuda_devices(model)):
        torch.manual_seed(options.seed + processes.rank)
        data = Data(
            kind,
            encode(model, tokenizer, train_rows, length),
            encode(model, tokenizer, validation_rows, length) if validation_rows else [],
            kind.padding(model, tokenizer),
            options.packing,
        )
        if options.packing:
            check_packing(model, data)
        identity = identify(model, train_rows, validation_rows, options, processes)
        processes.agree(identity)
        run = Run(model, options, data, identity, processes)
        found = newest_checkpoint(checkpoint_dir) if checkpoint_dir is not None else None
        with _frugal(model, on=options.gradient_checkpointing), _unchanged_on_failure(model):
            if found is not None:
                run.restore(found, checkpoint_dir)
            try:
                for now in run.steps(callbacks):
                    if checkpoint_dir is not None and run.checkpoint_due():
                        checkpoint = run.checkpoint()
                        if processes.leads:
                            write_checkpoint(checkpoint_dir, checkpoint)
                    if progress is not None:
                        progress(now)
            except DivergedError:
                if checkpoint_dir is not None and processes.leads:
                    clear_checkpoints(checkpoint_dir)
                raise
            return run.finish(found)


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
def _frugal(model: TaskModel, *, on: bool) -> Iterator[None]:
    if on:
        model.gradient_checkpointing_enable()
    try:
        yield
    finally:
        if on:
            model.gradient_checkpointing_disable()


@contextmanager
def _unchanged_on_failure(model: TaskModel) -> Iterator[None]:
    before, training = copy_weights(model), model.training
    try:
        yield
    except BaseException:
        model.load_state_dict(before)
        model.zero_grad()
        model.drop()
        model.train(training)
        raise
