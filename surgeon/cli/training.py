"""The command that trains tasks of a build."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from surgeon.cli.building import Build
from surgeon.cli.screen import Json, Steps, emit, note, say, steps, table

if TYPE_CHECKING:
    from surgeon.train import Progress
    from surgeon.train.builds import Files


def train(
    build: Build,
    task: Annotated[
        list[str], typer.Option("--task", "-t", help="The task, as the spec names it; several are trained together.")
    ],
    data: Annotated[list[Path], typer.Option("--data", help="Rows to train on, for each task: .csv, .tsv or .jsonl.")],
    *,
    validation: Annotated[
        list[Path] | None, typer.Option("--validation", help="Rows to choose the best epoch by, for each task.")
    ] = None,
    hold_out: Annotated[
        float | None, typer.Option("--hold-out", help="Validate with this share of the rows instead, as 0.1.")
    ] = None,
    text_column: Annotated[str | None, typer.Option("--text-column", help="Column of the text. [text]")] = None,
    label_column: Annotated[str | None, typer.Option("--label-column", help="Column of the label. [label]")] = None,
    column: Annotated[
        list[str] | None, typer.Option("--column", help="Another name of any column, as `prompt=question`.")
    ] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", help="Passes over the rows. [3]")] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", "--lr", help="Highest learning rate. [0.001]")
    ] = None,
    train_base: Annotated[
        Path | None,
        typer.Option(
            "--train-base", help="Train the base's own weights too; a build over the new base is written here."
        ),
    ] = None,
    base_learning_rate: Annotated[
        float | None, typer.Option("--base-learning-rate", help="That of the base's own weights. [0.0001]")
    ] = None,
    sampling: Annotated[
        float | None,
        typer.Option("--sampling", help="Several tasks: 1 draws them by their size, 0 all alike, or between. [1]"),
    ] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Rows at a time. [32]")] = None,
    max_length: Annotated[
        int | None,
        typer.Option("--max-length", help="Tokens of a row that are kept. [128, 384 of a question, 1024 of a prompt]"),
    ] = None,
    weight_decay: Annotated[float | None, typer.Option("--weight-decay", help="Decoupled weight decay. [0]")] = None,
    warmup: Annotated[float | None, typer.Option("--warmup", help="Share of the steps to warm up in. [0.06]")] = None,
    schedule: Annotated[str | None, typer.Option("--schedule", help="linear, cosine or constant. [linear]")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of the order of rows and of dropout. [0]")] = None,
    patience: Annotated[
        int | None, typer.Option("--patience", help="Stop after so many epochs without a better one.")
    ] = None,
    best_by: Annotated[
        str | None,
        typer.Option("--best-by", help="What tells the best epoch: accuracy or loss. [loss for texts, else accuracy]"),
    ] = None,
    grad_clip: Annotated[float | None, typer.Option("--grad-clip", help="Largest norm of the gradient. [1]")] = None,
    gradient_accumulation: Annotated[
        int | None, typer.Option("--gradient-accumulation", help="Batches to a step. [1]")
    ] = None,
    packing: Annotated[
        bool | None, typer.Option("--packing", help="Put several short texts in a row, each read as if alone.")
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option("--gradient-checkpointing", help="Compute activations again: less memory, another forward."),
    ] = None,
    checkpoint_steps: Annotated[
        int | None, typer.Option("--checkpoint-steps", help="Steps between checkpoints; there is one after each epoch.")
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", help="CPU threads.")] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="cpu, cuda, cuda:1, … [a GPU where there is one]")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start over: forget an interrupted run, and the weights packed before.")
    ] = False,
    json: Json = False,
) -> None:
    """Train tasks of a build on the rows of files, and pack the best epoch's weights into the build.

    The base's head says what a row is: `text` and `label`; `tokens` and `labels`; `question`, `context` and `answer`;
    `prompt` and `completion`, or `messages`, for models that write text, of which only the answers are learned.

    The base stays frozen and the other tasks as they are. A run that was stopped goes on when the same command is run
    again; one that finished is trained further. Several tasks are trained together by `--task` and `--data` once for
    each, in the same order; the best epoch is the one of their best mean.

    `--train-base OUT` trains the base's weights with them (Multi-Task Adapters): the build stays as it is, and `OUT` is
    one of the trained tasks over the new base, which `OUT/base` holds for other specs.

    Example: `surgeon train build --task sentiment --data train.csv --validation validation.csv --epochs 5`
    """
    from surgeon.errors import SpecError
    from surgeon.train.builds import read_options, train_build
    from surgeon.train.processes import processes

    files = _files(task, data, validation, hold_out)
    if validation is not None and hold_out is not None:
        raise SpecError("--validation and --hold-out exclude each other", where="surgeon train")
    if hold_out is not None and not 0 < hold_out < 1:
        raise SpecError(f"--hold-out must be a share between 0 and 1, got {hold_out}", where="surgeon train")
    if base_learning_rate is not None and train_base is None:
        raise SpecError(
            "--base-learning-rate is for --train-base OUT; else the base stays frozen", where="surgeon train"
        )
    given = {
        "epochs": epochs,
        "learning_rate": learning_rate,
        "base_learning_rate": base_learning_rate,
        "sampling": sampling,
        "batch_size": batch_size,
        "max_length": max_length,
        "weight_decay": weight_decay,
        "warmup": warmup,
        "schedule": schedule,
        "seed": seed,
        "patience": patience,
        "best_by": best_by,
        "grad_clip": grad_clip,
        "gradient_accumulation": gradient_accumulation,
        "packing": packing,
        "gradient_checkpointing": gradient_checkpointing,
        "checkpoint_steps": checkpoint_steps,
        "threads": threads,
    }
    options = read_options({name: value for name, value in given.items() if value is not None})
    with steps(silent=json) as report:
        result = train_build(
            build,
            files,
            columns=_columns(column or [], text=text_column, label=label_column),
            fresh=fresh,
            train_base=train_base,
            device=device,
            options=options,
            progress=_bar(report) if report else None,
            report=report,
        )
    if not processes().leads:
        return
    if json:
        emit({"build": str(train_base or build), "tasks": task, **asdict(result)})
        return
    if result.resumed_from:
        note(f"went on from step {result.resumed_from}")
    if result.cut:
        note(f"rows cut to what is kept of them (--max-length): {result.cut}")
    several = task if len(task) > 1 and result.best_accuracy is not None else []
    whole = any(e.exact_match is not None for e in result.history)
    table(
        (
            *("#epoch", "#loss", "#validation loss", "#accuracy"),
            *(["#exact match"] if whole else []),
            *(f"#{name}" for name in several),
        ),
        [
            (
                *(e.epoch, e.loss, e.validation_loss, e.accuracy),
                *([e.exact_match] if whole else []),
                *(e.accuracies[name] for name in several),
            )
            for e in result.history
        ],
    )
    accuracy = "" if result.best_accuracy is None else f", accuracy {result.best_accuracy:.3f}"
    loss = "" if result.best_loss is None else f", validation loss {result.best_loss:.3f}"
    packed = ", ".join(f"'{name}'" for name in task)
    say(f"\npacked {packed} into {train_base or build}: epoch {result.best_epoch}{accuracy}{loss}")
    if train_base is not None:
        say(f"the new base is {train_base / 'base'}")


def _files(
    tasks: list[str], data: list[Path], validation: list[Path] | None, hold_out: float | None
) -> dict[str, Files]:
    """The files of each task. Raises SpecError unless every task is named once and has its own."""
    from surgeon.errors import SpecError
    from surgeon.train.builds import Files

    if twice := sorted({name for name in tasks if tasks.count(name) > 1}):
        raise SpecError(f"--task names {', '.join(twice)} twice", where="surgeon train")
    for option, paths in (("--data", data), ("--validation", validation)):
        if paths and len(paths) != len(tasks):
            raise SpecError(
                f"{option} is given {len(paths)} times, and there are {len(tasks)} tasks",
                where="surgeon train",
                there_is=tasks,
                try_=f"{option} once for each task, in the order of --task",
            )
    held: Sequence[Path | float | None] = validation or [hold_out] * len(tasks)
    return {name: Files(path, share) for name, path, share in zip(tasks, data, held, strict=True)}


def _columns(given: list[str], **others: str | None) -> dict[str, str]:
    """Other names of columns. Raises SpecError for what is not of the form `name=column`."""
    from surgeon.errors import SpecError

    pairs = [pair.partition("=") for pair in given]
    if wrong := [pair[0] for pair in pairs if not all(pair)]:
        raise SpecError(f"--column: '{wrong[0]}' is not of the form `prompt=question`", where="surgeon train")
    return {name: column for name, column in others.items() if column} | {name: column for name, _, column in pairs}


def _bar(shown: Steps) -> Callable[[Progress], None]:
    """Show epoch, loss and accuracy beside the bar."""

    def progress(now: Progress) -> None:
        accuracy = "" if now.accuracy is None else f"  accuracy {now.accuracy:.3f}"
        shown.advance(f"epoch {now.epoch}/{now.epochs}  loss {now.loss:.3f}{accuracy}", now.step, now.steps)

    return progress
