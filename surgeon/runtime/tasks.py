"""A task ready to run: its tensors checked, loaded from a private copy that nobody else can change."""

from __future__ import annotations

import hashlib
import re
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from onnxruntime import LoraAdapter, OrtValue, RunOptions

from surgeon.errors import BuildError, SpecError
from surgeon.runtime.fit import check_base, check_task, columns
from surgeon.runtime.manifest import Manifest
from surgeon.runtime.ort import ORT_ERRORS
from surgeon.runtime.taskfile import (
    SUFFIX,
    Array,
    parse_adapter,
    private_copy,
    read_checked,
    write_adapter,
)


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
    path: Path
    _loaded: list[LoraAdapter] = field(default_factory=list)
    _reduced: dict[int, RunnableTask] = field(default_factory=dict)
    _values: dict[str, OrtValue] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def without(self, manifest: Manifest, layers: int) -> RunnableTask:
        """The task without what can be dropped in the first `layers` layers; made once, at the first call.

        Raises SpecError where that would leave a stack without all of it.
        """
        check_drop(manifest, layers)
        if layers == 0:
            return self
        with self._lock:
            if layers not in self._reduced:
                self._reduced[layers] = self._reduce(manifest, layers)
            return self._reduced[layers]

    def tensors(self) -> Mapping[str, Array]:
        """What the task consists of, by name. Raises BuildError where its session was closed meanwhile."""
        try:
            return read_checked(self.path)
        except ORT_ERRORS as error:
            raise (error if self.path.exists() else self._closed()) from error

    def _reduce(self, manifest: Manifest, layers: int) -> RunnableTask:
        """A task file without those tensors: to ONNX Runtime a missing one is its default."""
        dropped = {d.name for d in manifest.deltas if d.droppable and d.layer is not None and d.layer < layers}
        left = {name: tensor for name, tensor in self.tensors().items() if name not in dropped}
        path = self.path.with_name(f"{self.path.name.removesuffix(SUFFIX)}.drop-{layers}{SUFFIX}")
        write_adapter(path, left, manifest.base.fingerprint)
        return runnable(self.info, path)

    def values(self) -> Mapping[str, OrtValue]:
        """The task's tensors, to be bound by name where ONNX Runtime ignores adapters; read at the first call."""
        with self._lock:
            if not self._values:
                self._values.update({n: OrtValue.ortvalue_from_numpy(t) for n, t in self.tensors().items()})
            return self._values

    def load(self) -> LoraAdapter:
        """The task as ONNX Runtime's runs take it, which maps its file into memory; loaded once, at the first call."""
        with self._lock:
            if not self._loaded:
                if not self.path.exists():
                    raise self._closed()
                adapter = LoraAdapter()
                adapter.Load(str(self.path))
                self._loaded.append(adapter)
            return self._loaded[0]

    def activate(self, options: RunOptions) -> None:
        """Make a run use this task. ONNX Runtime keeps a bare pointer: hold the task until the run is over."""
        options.add_active_adapter(self.load())

    def _closed(self) -> BuildError:
        return BuildError("the session was closed meanwhile", where=self.info.name)


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
    return runnable(info, copy)


def runnable(info: TaskInfo, path: Path) -> RunnableTask:
    """A task of a checked file, which goes when the task does. It is loaded by the first run that needs it so: where
    texts are written, or rows have a task each, its tensors are read instead, and both would be in memory.
    """
    task = RunnableTask(info, path)
    weakref.finalize(task, path.unlink, missing_ok=True)
    return task


def check_drop(manifest: Manifest, layers: int) -> None:
    """Raise SpecError unless this many of the lowest layers can be dropped: fewer than any stack has."""
    tops: dict[str, int] = {}
    for delta in manifest.deltas:
        if delta.droppable and delta.layer is not None:
            tops[delta.stack] = max(tops.get(delta.stack, 0), delta.layer + 1)
    depth = min(tops.values(), default=1)
    if not isinstance(layers, int) or isinstance(layers, bool) or not 0 <= layers < depth:
        raise SpecError(
            f"drop is a number of layers, and {layers!r} cannot be dropped",
            there_is=f"adapters in {depth} layers, so 0 to {depth - 1}" if tops else "nothing that can be dropped",
        )


def name_of(path: Path) -> str:
    """The task's name in the name of its file: `tasks/legal.1f2e3d4c.onnx_adapter` is `legal`."""
    return re.sub(r"\.[0-9a-f]{8}$", "", path.name.removesuffix(SUFFIX))


def check_name(name: str) -> None:
    """A task's name must also be the name of a file. Raises SpecError."""
    if not re.fullmatch(r"[\w][\w.-]*", name):
        raise SpecError(
            f"'{name}' cannot be the name of a task", try_="letters, digits, '_', '-' and '.', not starting with '.'"
        )
