"""The two ways in: foreign folders become tasks of a build that there is, or a build that is made for them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

from surgeon.base import Base
from surgeon.build import check_writable
from surgeon.compiler import Compiled, load, passes, study
from surgeon.errors import DeltaError, SpecError, did_you_mean
from surgeon.foreign import adapterhub, adapterhub_fusion, peft
from surgeon.foreign.checking import check
from surgeon.foreign.completing import complete
from surgeon.foreign.pieces import Checkpoint
from surgeon.foreign.placing import Placing
from surgeon.foreign.settling import settle
from surgeon.foreign.union import union
from surgeon.pipeline import run_passes
from surgeon.program import Program
from surgeon.spec import BaseSpec, HeadName, Spec
from surgeon.spec.envelope import TASK_NAME

Progress = Callable[[str], None]
Folders = Mapping[str, str | Path]
"""Task to folder."""


@dataclass(frozen=True)
class Imported:
    """One folder that became a task: by which method it was trained, and how many numbers of it the task has."""

    task: str
    folder: str
    method: str
    parameters: int


def read(folder: str | Path, *, allow_pickle: bool = False) -> Checkpoint:
    """A folder of PEFT or AdapterHub as pieces. Raises DeltaError unless it is one, whole and understood."""
    folder = Path(folder)
    if peft.reads(folder):
        return peft.read(folder, allow_pickle=allow_pickle)
    if adapterhub_fusion.reads(folder):
        return adapterhub_fusion.read(folder, allow_pickle=allow_pickle)
    if adapterhub.reads(folder):
        return adapterhub.read(folder, allow_pickle=allow_pickle)
    inner = sorted(p.parent.name for p in folder.glob(f"*/{peft.CONFIG}")) if folder.is_dir() else []
    raise DeltaError(
        f"holds no checkpoint of PEFT or AdapterHub: it has no {peft.CONFIG} of theirs",
        where=str(folder),
        there_is=f"folders that have one: {', '.join(inner)}" if inner else None,
        try_="the folder of one adapter" if inner else "a folder that `save_pretrained` or `save_adapter` wrote",
    )


def import_tasks(
    folders: Folders,
    build: str | Path,
    *,
    allow_pickle: bool = False,
    ignore_base_name: bool = False,
    progress: Progress | None = None,
) -> list[Imported]:
    """Read foreign folders into tasks of a build; nothing is written unless all of them fit.

    Raises DeltaError where a folder is damaged, belongs to another base or needs what the build lacks.
    """
    report = progress or (lambda _: None)
    report("reading the folders")
    checkpoints = {task: read(folder, allow_pickle=allow_pickle) for task, folder in folders.items()}
    compiled = load(build, writes=False, progress=progress)
    imported = [fill(compiled, t, c, ignore_base_name=ignore_base_name) for t, c in checkpoints.items()]
    for task in checkpoints:
        report(f"packing {task}")
        compiled.pack(build, task)
    return imported


def import_build(
    folders: Folders,
    base: str | BaseSpec,
    out: str | Path,
    *,
    head: str | None = None,
    allow_pickle: bool = False,
    ignore_base_name: bool = False,
    progress: Progress | None = None,
) -> list[Imported]:
    """Make a build of foreign folders over one base: the union of what they need, and each folder as a task.

    What a folder does not use is empty in its task. Raises as `import_tasks`, and SpecError where two folders cannot
    share one graph.
    """
    report = progress or (lambda _: None)
    check_writable(Path(out))
    for task in folders:
        _check_task_name(task)
    report("reading the folders")
    checkpoints = {task: read(folder, allow_pickle=allow_pickle) for task, folder in folders.items()}
    if isinstance(base, str):
        base = BaseSpec(model=base, head=_head(checkpoints, head))
    opened, program = study(base, progress=progress)
    report("operating")
    compiled, imported = assemble(checkpoints, base, (opened, program), ignore_base_name=ignore_base_name)
    compiled.save(out, progress=progress)
    return imported


def assemble(
    checkpoints: Mapping[str, Checkpoint], named: BaseSpec, studied: tuple[Base, Program], *, ignore_base_name: bool
) -> tuple[Compiled, list[Imported]]:
    """Compile the union of what checkpoints need over a base that was studied, and fill its tasks."""
    base, program = studied
    checkpoints = {task: settle(c, base, program.anatomy) for task, c in checkpoints.items()}
    for checkpoint in checkpoints.values():
        check(checkpoint, base, program.fingerprint, named, ignore_base_name=ignore_base_name)
    spec = Spec.model_validate(union(checkpoints, base, program) | {"base": named})
    compiled = Compiled(spec, base, run_passes(program, list(passes(spec))))
    return compiled, [fill(compiled, t, c, ignore_base_name=ignore_base_name) for t, c in checkpoints.items()]


def fill(compiled: Compiled, task: str, checkpoint: Checkpoint, *, ignore_base_name: bool) -> Imported:
    """Put a checkpoint into the task's model."""
    if task not in compiled.tasks:
        raise SpecError(f"there is no task '{task}'", there_is=compiled.tasks, try_=did_you_mean(task, compiled.tasks))
    checkpoint = settle(checkpoint, compiled.base, compiled.program.anatomy)
    fingerprint, named = compiled.program.fingerprint, compiled.spec.base
    check(checkpoint, compiled.base, fingerprint, named, ignore_base_name=ignore_base_name)
    placing = Placing(compiled, checkpoint.where)
    for piece in checkpoint.pieces:
        placing.place(piece)
    full = complete(compiled, task, placing.tensors, checkpoint.where)
    try:
        compiled.model(task).load_state_dict(full)
    except DeltaError as error:
        raise DeltaError(error.what, where=checkpoint.where, there_is=error.there_is, try_=error.try_) from error
    count = sum(tensor.numel() for tensor in placing.tensors.values())
    return Imported(task, checkpoint.where, checkpoint.method, count)


def _head(checkpoints: Mapping[str, Checkpoint], given: str | None) -> HeadName:
    """What the base is loaded for, as the folders say. Raises SpecError where they say nothing or several things."""
    if given is not None:
        known = get_args(HeadName)
        if given not in known:
            raise SpecError(f"there is no head '{given}'", there_is=known, try_=did_you_mean(given, known))
        return cast(HeadName, given)
    heads = {c.head for c in checkpoints.values() if c.head is not None}
    if len(heads) != 1:
        says = {f"{task}: {c.head}" for task, c in checkpoints.items() if c.head}
        raise SpecError(
            "the folders are for heads of several kinds" if heads else "no folder says what the base is loaded for",
            there_is=sorted(says) or None,
            try_="one build each" if heads else "--head sequence-classification, or whichever it was",
        )
    return heads.pop()


def _check_task_name(task: str) -> None:
    if not TASK_NAME.fullmatch(task):
        better = re.sub(r"[^A-Za-z0-9._-]+", "-", task).strip("-.") or "task"
        raise SpecError(f"'{task}' cannot be the name of a task", try_=f"write {better}=FOLDER")
