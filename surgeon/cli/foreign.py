"""Commands that exchange weights with other libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from surgeon.cli.building import Build, Task
from surgeon.cli.screen import Json, emit, say, steps, table
from surgeon.errors import SpecError


def import_(  # noqa: PLR0917
    folders: Annotated[
        list[str],
        typer.Argument(metavar="FOLDER...", help="Folders of PEFT or AdapterHub; NAME=FOLDER names the task."),
    ],
    build: Annotated[Path | None, typer.Option("--build", help="Read into the tasks of this build.")] = None,
    task: Annotated[
        str | None, typer.Option("--task", "-t", help="The task of a single folder; else it is the folder's name.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", help="Make a build over it: a folder, `package:NAME/folder`, a hub id."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The build to make: absent or empty.")] = None,
    head: Annotated[
        str | None, typer.Option("--head", help="What the base is loaded for, where the folders do not say.")
    ] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read .bin and .pt too, by torch's loader of weights only.")
    ] = False,
    ignore_base_name: Annotated[
        bool, typer.Option("--ignore-base-name", help="Take folders that name another base than this one.")
    ] = False,
    json: Json = False,
) -> None:
    """Read weights that PEFT or AdapterHub has saved: into the tasks of a build, or into a build made for them.

    With `--base` the spec is written from the folders themselves: one graph holds the union of what they need, and each
    folder becomes a task of it. Every tensor must find its place, or nothing is written.

    Examples: `surgeon import adapters/* --base path/to/a/model -o build`,
    `surgeon import checkpoint --build build --task sentiment`
    """
    from surgeon.foreign import import_build, import_tasks

    named = _tasks(folders, task)
    into = build or out
    if (build is None) == (base is None) or into is None or (base is None) != (out is None):
        raise SpecError(
            "say where to: either --build BUILD, or --base BASE and -o BUILD",
            where="surgeon import",
            try_="`surgeon import --help`",
        )
    flags = {"allow_pickle": allow_pickle, "ignore_base_name": ignore_base_name}
    with steps(silent=json) as progress:
        if base is None:
            imported = import_tasks(named, into, **flags, progress=progress)
        else:
            imported = import_build(named, base, into, head=head, **flags, progress=progress)
    if json:
        emit({"build": str(into), "tasks": [vars(one) for one in imported]})
        return
    table(
        ("task", "method", "#parameters", "folder"),
        [(one.task, one.method, one.parameters, one.folder) for one in imported],
    )


def export(  # noqa: PLR0917
    build: Build,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="The folder to write: absent or empty; of `triton` the model repository."),
    ],
    task: Annotated[str | None, typer.Option("--task", "-t", help="The task; `triton` has all of them.")] = None,
    to: Annotated[str, typer.Option("--to", help="peft, or triton.")] = "peft",
    name: Annotated[str, typer.Option("--name", help="For `triton`: what the model is called there.")] = "surgeon",
    threads: Annotated[int, typer.Option("--threads", help="For `triton`: ONNX Runtime's threads.")] = 1,
    json: Json = False,
) -> None:
    """Write a task of a build as a folder that PEFT loads, or the build as a model of Triton's Python backend.

    Examples: `surgeon export build --task sentiment --to peft -o sentiment`,
    `surgeon export build --to triton -o models`
    """
    if (task is None) != (to == "triton"):
        raise SpecError(
            f"--to {to} {'takes no --task: it has all of them' if task else 'needs --task'}", where="surgeon export"
        )
    with steps(silent=json) as progress:
        if task is None:
            from surgeon.server.triton import write_entry

            folder = write_entry(build, out, name, threads=threads)
        else:
            from surgeon.foreign import export_task

            folder = export_task(build, task, out, to=to, progress=progress)
    if json:
        emit({"build": str(build), "task": task, "to": to, "folder": str(folder)})
    else:
        say(str(folder))


def merge(
    build: Build,
    task: Task,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write: absent or empty.")],
    to: Annotated[
        str, typer.Option("--to", help="`transformers`: a checkpoint. `onnx`: a build of it, without tasks.")
    ] = "transformers",
    json: Json = False,
) -> None:
    """Put a task into its base for good: a plain model with other numbers, and nothing beside them.

    It works for what a base can hold: LoRA, DoRA, IA3, biases, norms, heads. Adapters and virtual tokens are refused.

    Example: `surgeon merge build --task sentiment -o sentiment-model`
    """
    from surgeon.merging import merge_task

    with steps(silent=json) as progress:
        folder = merge_task(build, task, out, to=to, progress=progress)
    if json:
        emit({"build": str(build), "task": task, "to": to, "folder": str(folder)})
    else:
        say(str(folder))


def _tasks(folders: list[str], task: str | None) -> dict[str, str]:
    """Task to folder. Raises SpecError where two folders are one task."""
    if task is not None and len(folders) > 1:
        raise SpecError("--task names the task of one folder", where="surgeon import", try_="NAME=FOLDER for each")
    named: dict[str, str] = {}
    for text in folders:
        name, given, folder = text.partition("=")
        if not given:
            name, folder = Path(text).resolve().name, text
        name = task or name
        if name in named:
            raise SpecError(
                f"two folders are one task '{name}'",
                where="surgeon import",
                there_is=[named[name], folder],
                try_="NAME=FOLDER for each",
            )
        named[name] = folder
    return named
