"""Training a task of a build: from a data file to packed weights, and on from where a killed run was."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from surgeon.build import load, pack
from surgeon.errors import SpecError
from surgeon.ledger import initial
from surgeon.train.batches import load_tokenizer
from surgeon.train.checkpoint import clear_checkpoints
from surgeon.train.loop import ProgressCallback, train_task
from surgeon.train.options import TrainOptions
from surgeon.train.rows import hold_out, labels_of, read_rows
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
    and options; `fresh` forgets it, and the packed weights too. The build changes only at the end, at once.
    """
    build = Path(build)
    folder = build / CHECKPOINTS / task
    compiled = load(build, progress=report)
    model = compiled.model(task)
    rows = read_rows(data, labels_of(model), *columns)
    held = None
    if isinstance(validation, float):
        rows, held = hold_out(rows, validation)
    elif validation is not None:
        held = read_rows(validation, labels_of(model), *columns)
    if fresh:
        clear_checkpoints(folder)
        sizes = {"labels": model.config.num_labels}
        model.load_state_dict(initial(model.ledger, f"{compiled.spec.seed}/{task}", sizes))
    tokenizer = load_tokenizer(build, compiled.base.max_length)
    result = train_task(
        model, tokenizer, rows, held, options or TrainOptions(), checkpoint_dir=folder, progress=progress
    )
    pack(compiled, build, task)
    clear_checkpoints(folder)
    if folder.parent.is_dir() and not any(folder.parent.iterdir()):
        shutil.rmtree(folder.parent)
    return result


def read_options(given: Mapping[str, Any]) -> TrainOptions:
    """Options from what a user set. Raises SpecError in the words of the command line."""
    try:
        return TrainOptions(**given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0]).replace("_", "-")
        raise SpecError(f"--{name}: {first['msg'][:1].lower()}{first['msg'][1:]}, got {first['input']}") from error
