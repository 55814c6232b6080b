"""The command that trains a task of a build."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from surgeon.cli.building import Build, Task
from surgeon.cli.screen import Json, Steps, emit, note, say, steps, table

if TYPE_CHECKING:
    from surgeon.train import Progress


def train(
    build: Build,
    task: Task,
    data: Annotated[Path, typer.Option("--data", help="Rows to train on: .csv, .tsv or .jsonl.")],
    *,
    validation: Annotated[Path | None, typer.Option("--validation", help="Rows to choose the best epoch by.")] = None,
    hold_out: Annotated[
        float | None, typer.Option("--hold-out", help="Validate with this share of the rows instead, as 0.1.")
    ] = None,
    text_column: Annotated[str, typer.Option("--text-column", help="Column of the text.")] = "text",
    label_column: Annotated[str, typer.Option("--label-column", help="Column of the label.")] = "label",
    epochs: Annotated[int | None, typer.Option("--epochs", help="Passes over the rows. [3]")] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", "--lr", help="Highest learning rate. [0.001]")
    ] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Rows at a time. [32]")] = None,
    max_length: Annotated[
        int | None, typer.Option("--max-length", help="Tokens of a text that are kept. [128]")
    ] = None,
    weight_decay: Annotated[float | None, typer.Option("--weight-decay", help="Decoupled weight decay. [0]")] = None,
    warmup: Annotated[float | None, typer.Option("--warmup", help="Share of the steps to warm up in. [0.06]")] = None,
    schedule: Annotated[str | None, typer.Option("--schedule", help="linear, cosine or constant. [linear]")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of the order of rows and of dropout. [0]")] = None,
    patience: Annotated[
        int | None, typer.Option("--patience", help="Stop after so many epochs without a better accuracy.")
    ] = None,
    grad_clip: Annotated[float | None, typer.Option("--grad-clip", help="Largest norm of the gradient. [1]")] = None,
    gradient_accumulation: Annotated[
        int | None, typer.Option("--gradient-accumulation", help="Batches to a step. [1]")
    ] = None,
    checkpoint_steps: Annotated[
        int | None, typer.Option("--checkpoint-steps", help="Steps between checkpoints; there is one after each epoch.")
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", help="CPU threads.")] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start over: forget an interrupted run, and the weights packed before.")
    ] = False,
    json: Json = False,
) -> None:
    """Train a task of a build on rows of text and label, and pack the best epoch's weights into the build.

    The base stays frozen and the other tasks as they are. A run that was stopped goes on when the same command is run
    again; one that finished is trained further.

    Example: `surgeon train build --task sentiment --data train.csv --validation validation.csv --epochs 5`
    """
    from surgeon.errors import SpecError
    from surgeon.train.builds import read_options, train_build

    if validation is not None and hold_out is not None:
        raise SpecError("--validation and --hold-out exclude each other", where="surgeon train")
    if hold_out is not None and not 0 < hold_out < 1:
        raise SpecError(f"--hold-out must be a share between 0 and 1, got {hold_out}", where="surgeon train")
    given = {
        "epochs": epochs,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "max_length": max_length,
        "weight_decay": weight_decay,
        "warmup": warmup,
        "schedule": schedule,
        "seed": seed,
        "patience": patience,
        "grad_clip": grad_clip,
        "gradient_accumulation": gradient_accumulation,
        "checkpoint_steps": checkpoint_steps,
        "threads": threads,
    }
    options = read_options({name: value for name, value in given.items() if value is not None})
    with steps(silent=json) as report:
        result = train_build(
            build,
            task,
            data,
            validation=validation or hold_out,
            columns=(text_column, label_column),
            fresh=fresh,
            options=options,
            progress=_bar(report) if report else None,
            report=report,
        )
    if json:
        emit({"build": str(build), "task": task, **asdict(result)})
        return
    if result.resumed_from:
        note(f"went on from step {result.resumed_from}")
    table(
        ("#epoch", "#loss", "#validation loss", "#accuracy"),
        [(e.epoch, e.loss, e.validation_loss, e.accuracy) for e in result.history],
    )
    accuracy = "" if result.best_accuracy is None else f", accuracy {result.best_accuracy:.3f}"
    say(f"\npacked '{task}' into {build}: epoch {result.best_epoch}{accuracy}")


def _bar(shown: Steps) -> Callable[[Progress], None]:
    """Show epoch, loss and accuracy beside the bar."""

    def progress(now: Progress) -> None:
        accuracy = "" if now.accuracy is None else f"  accuracy {now.accuracy:.3f}"
        shown.advance(f"epoch {now.epoch}/{now.epochs}  loss {now.loss:.3f}{accuracy}", now.step, now.steps)

    return progress
