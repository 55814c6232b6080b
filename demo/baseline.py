"""What the demo compares with: the same head trained on the frozen base, and the base compiled without surgery."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from rich.progress import Progress as Bars

from surgeon import compile, read_spec
from surgeon.train import Progress, TrainOptions, evaluate, labels_of, load_tokenizer, read_rows, train_task

OPTIONS = TrainOptions(epochs=3, learning_rate=1e-2, max_length=64, threads=2)
"""Ten times LoRA's learning rate: a head alone learns best there."""


def head_only(spec: Path, task: str, files: Mapping[str, Path]) -> float:
    """Test accuracy of a head alone, trained on the same rows for as many epochs."""
    whole = read_spec(spec)
    compiled = compile(whole.model_copy(update={"surgery": (), "tasks": {task: whole.tasks[task]}}))
    model = compiled.model(task)
    assert compiled.base.tokenizer_path is not None
    tokenizer = load_tokenizer(compiled.base.tokenizer_path, compiled.base.max_length)
    rows = {split: read_rows(path, labels_of(model)) for split, path in files.items()}
    with Bars(transient=True) as bars:
        bar = bars.add_task(f"head only, {task}")

        def show(now: Progress) -> None:
            bars.update(bar, completed=now.step, total=now.steps)

        train_task(model, tokenizer, rows["train"], rows["validation"], OPTIONS, progress=show)
    return evaluate(model, tokenizer, rows["test"], max_length=OPTIONS.max_length).accuracy


def export_plain(spec: Path, out: Path) -> None:
    """The same base as a build without surgery."""
    shutil.rmtree(out, ignore_errors=True)
    compile(read_spec(spec).model_copy(update={"surgery": (), "tasks": {}}), out=out)
