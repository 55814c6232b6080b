"""A task ready to run: its tensors checked, loaded from a private copy that nobody else can change."""

from __future__ import annotations

import hashlib
import re
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from onnxruntime import LoraAdapter, RunOptions

from surgeon.errors import BuildError, SpecError
from surgeon.runtime.fit import check_base, check_task, columns
from surgeon.runtime.manifest import Manifest
from surgeon.runtime.taskfile import SUFFIX, parse_adapter, private_copy


@dataclass(frozen=True)
class TaskInfo:
    """What a session tells about a task.

    `labels` are the names of its classes if it has any; `columns` the width of its own head, None if it keeps the
    base's; `sizes` what it chose for each free dimension; `parameters` how many numbers it consists of.
    """

    name: str
    labels: tuple[str, ...] | None
    columns: int | None
    sizes: Mapping[str, int]
    parameters: int


@dataclass(frozen=True, eq=False)
class RunnableTask:
    """A loaded task. A run holds on to it, so that removing or replacing it meanwhile disturbs no run."""

    info: TaskInfo
    adapter: LoraAdapter

    def activate(self, options: RunOptions) -> None:
        """Make a run use this task. ONNX Runtime keeps a bare pointer: hold the task until the run is over."""
        options.add_active_adapter(self.adapter)


def load_task(
    manifest: Manifest,
    path: Path,
    directory: Path,
    *,
    name: str,
    labels: Sequence[str] | None,
    sha256: str | None = None,
) -> RunnableTask:
    """Copy a task file into the private `directory`, check all of it, and load the copy. Raises DeltaError."""
    check_name(name)
    copy, data = private_copy(path, directory)
    try:
        if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
            raise BuildError(f"the file of task '{name}' is not the one the manifest names", where=str(path))
        file = parse_adapter(copy, data, str(path))
        check_base(manifest, file.model_version, str(path))
        sizes = check_task(manifest, file.tensors, str(path), labels)
        adapter = LoraAdapter()
        adapter.Load(str(copy))
    except BaseException:
        copy.unlink(missing_ok=True)
        raise
    info = TaskInfo(
        name=name,
        labels=None if labels is None else tuple(labels),
        columns=columns(manifest, file.tensors),
        sizes=MappingProxyType(sizes),
        parameters=sum(array.size for array in file.tensors.values()),
    )
    task = RunnableTask(info, adapter)
    weakref.finalize(task, copy.unlink, missing_ok=True)
    return task


def name_of(path: Path) -> str:
    """The task's name in the name of its file: `tasks/legal.1f2e3d4c.onnx_adapter` is `legal`."""
    return re.sub(r"\.[0-9a-f]{8}$", "", path.name.removesuffix(SUFFIX))


def check_name(name: str) -> None:
    """A task's name must also be the name of a file. Raises SpecError."""
    if not re.fullmatch(r"[\w][\w.-]*", name):
        raise SpecError(
            f"'{name}' cannot be the name of a task", try_="letters, digits, '_', '-' and '.', not starting with '.'"
        )
