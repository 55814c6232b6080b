"""Training of one task from end to end: the deltas of a task's model in, the best epoch's deltas out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from surgeon.errors import SpecError
from surgeon.train.batches import encode, pad_id
from surgeon.train.checkpoint import clear_checkpoints, newest_checkpoint, write_checkpoint
from surgeon.train.evaluation import check_rows
from surgeon.train.identity import identify
from surgeon.train.options import TrainOptions
from surgeon.train.rows import Row
from surgeon.train.run import DivergedError, Progress, Run, StepCallback, TrainResult, copy_weights, cuda_devices

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from surgeon.model import TaskModel

ProgressCallback = Callable[[Progress], None]


def train_task(
    model: TaskModel,
    tokenizer: PreTrainedTokenizerBase,
    train_rows: Sequence[Row],
    validation_rows: Sequence[Row] | None,
    options: TrainOptions,
    *,
    checkpoint_dir: Path | None = None,
    progress: ProgressCallback | None = None,
    callbacks: Sequence[StepCallback] = (),
) -> TrainResult:
    """Train the deltas of `model` in place; go on from the newest checkpoint in `checkpoint_dir` if there is one.

    `callbacks` get `(model, step, steps)` after each step, while its gradients are there. A run that does not finish
    leaves the model as it was, and its last checkpoint; one that does leaves a checkpoint that says so, which
    `clear_checkpoints` removes. Raises DivergedError where a loss is not finite: then no checkpoint is left.
    """
    check_rows(model, [*train_rows, *(validation_rows or ())])
    if options.patience is not None and not validation_rows:
        raise SpecError("`patience` waits for a better accuracy, and there are no rows to validate with")
    with _threads(options.threads), torch.random.fork_rng(cuda_devices(model)):
        torch.manual_seed(options.seed)
        run = Run(model, options, len(train_rows), identify(model, train_rows, validation_rows, options))
        found = newest_checkpoint(checkpoint_dir) if checkpoint_dir is not None else None
        pad = pad_id(model, tokenizer)
        examples = encode(model, tokenizer, train_rows, options.max_length)
        held = encode(model, tokenizer, validation_rows, options.max_length) if validation_rows else []
        with _unchanged_on_failure(model):
            if found is not None:
                run.restore(found, checkpoint_dir)
            try:
                for now in run.steps(examples, held, pad, callbacks):
                    if checkpoint_dir is not None and run.checkpoint_due():
                        write_checkpoint(checkpoint_dir, run.checkpoint())
                    if progress is not None:
                        progress(now)
            except DivergedError:
                if checkpoint_dir is not None:
                    clear_checkpoints(checkpoint_dir)
                raise
            return run.finish(found)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
