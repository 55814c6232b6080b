"""The build directory: written whole or not at all, opened again for more training, extended task by task."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from surgeon.base import load_base
from surgeon.base.loading import quiet
from surgeon.compiler import Compiled, Progress, compile
from surgeon.errors import BuildError, DeltaError
from surgeon.exporters.cache import export_cached
from surgeon.graph_text import graph_text
from surgeon.model import TaskModel
from surgeon.runtime.manifest import FORMAT, MANIFEST, hash_file, read_manifest, seal
from surgeon.runtime.manifest import Task as TaskEntry
from surgeon.runtime.taskfile import write_adapter
from surgeon.spec import BaseSpec, HeadName, read_spec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BASE = "base"
"""Folder of a build made from a model in hand, which no path could find again."""
TOOLS = ("torch", "transformers", "onnx", "onnxscript", "onnx_ir", "onnxruntime")


def check_writable(out: Path) -> None:
    """Raise BuildError unless `out` can become a build: absent or an empty folder, in a folder one may write to."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise BuildError("the output is not a directory", where=str(out))
    if out.is_dir() and any(out.iterdir()):
        raise BuildError(
            "the output directory is not empty", where=str(out), try_="another directory, or empty it first"
        )
    parent = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise BuildError("the output directory cannot be written", where=str(out), there_is=f"{parent} is read-only")


@contextmanager
def _partial(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name when all went well and is removed when not."""
    check_writable(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    except OSError as error:
        raise BuildError(f"the output directory cannot be written: {error.strerror}", where=str(out)) from error
    try:
        yield folder
        folder.chmod(0o755)
        folder.replace(out)
    except (OSError, SafetensorError) as error:
        raise BuildError(f"the build could not be written: {_reason(error)}", where=str(out)) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_build(compiled: Compiled, out: Path, report: Progress) -> Path:
    """Write everything a build holds. Raises BuildError where it cannot; then nothing of it is left."""
    with _partial(out) as folder:
        report("converting to ONNX")
        facts = export_cached(compiled, folder)
        report("writing the build")
        (folder / "spec.yaml").write_text(compiled.spec.to_yaml(), encoding="utf-8")
        (folder / "graph.txt").write_text(graph_text(compiled.program), encoding="utf-8")
        if compiled.base.tokenizer_path is not None:
            shutil.copyfile(compiled.base.tokenizer_path, folder / "tokenizer.json")
        if compiled.spec.base is None:
            report("writing the base in hand")
            with quiet():
                compiled.base.model.save_pretrained(folder / BASE)
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        document = _document(compiled, facts) | {
            "files": {str(p.relative_to(folder)): {"sha256": hash_file(p), "bytes": p.stat().st_size} for p in files},
            "tasks": {},
        }
        for task in compiled.tasks:
            report(f"packing {task}")
            document["tasks"][task] = _write_task(folder, compiled, task)
        _write_manifest(folder, document)
    return out


def pack(compiled: Compiled, build: Path, task: str) -> None:
    """Put the present weights of `task` into an existing build: new files first, then the manifest, by rename."""
    manifest = read_manifest(build)
    document = json.loads((build / MANIFEST).read_text(encoding="utf-8"))
    before = set((build / "tasks").glob("*"))
    try:
        document["tasks"][task] = _write_task(build, compiled, task)
        _write_manifest(build, document)
    except BaseException as error:
        for path in set((build / "tasks").glob("*")) - before:
            path.unlink(missing_ok=True)
        if isinstance(error, OSError | SafetensorError):
            raise BuildError(f"the task could not be written: {_reason(error)}", where=str(build)) from error
        raise
    old = manifest.tasks.get(task)
    fresh = {document["tasks"][task][kind] for kind in ("adapter", "weights")}
    for name in {old.adapter, old.weights} - fresh if old else ():
        (build / name).unlink(missing_ok=True)


def pack_weights(build: str | Path, task: str, weights: str | Path, *, progress: Progress | None = None) -> TaskEntry:
    """Put weights that were trained elsewhere into a build; returns the task's entry in the manifest.

    Raises DeltaError for tensors that do not fit or another base; the build is then as it was.
    """
    build, weights = Path(build), Path(weights)
    tensors = read_weights(weights, read_manifest(build).base.fingerprint)
    compiled = load(build, progress=progress)
    try:
        compiled.model(task).load_state_dict(tensors)
    except DeltaError as error:
        raise DeltaError(error.what, where=str(weights), there_is=error.there_is, try_=error.try_) from error
    if progress:
        progress(f"packing {task}")
    pack(compiled, build, task)
    return read_manifest(build).tasks[task]


def load(build: str | Path, base: PreTrainedModel | None = None, *, progress: Progress | None = None) -> Compiled:
    """Open a build for more training: its spec on its base, every task with the weights packed last.

    Raises BuildError for a damaged build, DeltaError where the base is not the one it was built from.
    """
    build = Path(build)
    manifest = read_manifest(build)
    spec = read_spec(build / "spec.yaml")
    if base is None and spec.base is None:
        base = load_base(BaseSpec(model=str(build / BASE), head=cast(HeadName, manifest.base.head)), seed=spec.seed)
    compiled = compile(spec, base, progress=progress)
    if compiled.base.fingerprint != manifest.base.fingerprint:
        raise DeltaError(
            "the base is not the one this build was made from",
            where=str(build),
            there_is=f"the build's: {manifest.base.fingerprint[:16]}; this one's: {compiled.base.fingerprint[:16]}",
            try_="the same checkpoint and revision, or compile the spec again for this base",
        )
    for name, task in manifest.tasks.items():
        path = build / task.weights
        if hash_file(path) != task.weights_sha256:
            raise BuildError("has other content than the manifest says", where=str(path))
        compiled.model(name).load_state_dict(read_weights(path, manifest.base.fingerprint))
    return compiled


def read_weights(path: Path, fingerprint: str) -> dict[str, Tensor]:
    """Trained tensors from a safetensors file. Raises DeltaError for another base or a damaged file."""
    if path.suffix != ".safetensors":
        raise DeltaError(
            "weights are read from .safetensors files only",
            where=str(path),
            try_="pickle files can run code when opened: convert it once where you trust it",
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise DeltaError(f"the weights cannot be read: {error}", where=str(path)) from error
    theirs = metadata.get("base")
    if theirs is not None and theirs != fingerprint:
        raise DeltaError(
            "the weights were trained on another base",
            where=str(path),
            there_is=f"their base: {theirs[:16]}; this base: {fingerprint[:16]}",
            try_="deltas only fit the base they were trained on: compile with that base, or train again",
        )
    return tensors


def _write_task(folder: Path, compiled: Compiled, task: str) -> dict[str, Any]:
    """The task's two files under names that hold their hash; returns its manifest entry."""
    model = compiled.model(task)
    tasks = folder / "tasks"
    tasks.mkdir(exist_ok=True)
    trained = {n: t.detach().cpu().contiguous() for n, t in model.state_dict().items()}
    deployed = {n: t.detach().cpu().contiguous() for n, t in model.deployed().items()}
    metadata = {"base": compiled.base.fingerprint, "task": task, "format": "pt"}
    entry: dict[str, Any] = {"labels": label_names(model, compiled, task), "sha256": {}}
    writers: dict[str, tuple[str, Callable[[Path], None]]] = {
        "weights": (".safetensors", lambda path: save_file(trained, path, metadata=metadata)),
        "adapter": (
            ".onnx_adapter",
            lambda path: write_adapter(path, {n: t.numpy() for n, t in deployed.items()}, compiled.base.fingerprint),
        ),
    }
    for kind, (suffix, write) in writers.items():
        partial = tasks / f".{task}{suffix}"
        try:
            write(partial)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        digest = hash_file(partial)
        final = tasks / f"{task}.{digest[:8]}{suffix}"
        partial.chmod(0o644)
        partial.replace(final)
        entry[kind] = f"tasks/{final.name}"
        entry["sha256"][kind] = digest
    return entry


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


def label_names(model: TaskModel, compiled: Compiled, task: str) -> list[str] | None:
    """The task's labels by name, or None where it keeps the base's head."""
    labels = compiled.spec.tasks[task].labels
    return None if labels is None else [model.config.id2label[i] for i in range(len(model.config.id2label))]


def _document(compiled: Compiled, facts: Mapping[str, Any]) -> dict[str, Any]:
    base, program = compiled.base, compiled.program
    return {
        "format": FORMAT,
        "surgeon": tool_version("modelsurgeon"),
        "base": {
            "source": base.source,
            "architecture": type(base.model).__name__,
            "head": base.head,
            "fingerprint": base.fingerprint,
            "parameters": sum(p.numel() for p in base.model.parameters()),
            "max_length": base.max_length,
        },
        "modes": list(compiled.spec.export.modes),
        "inputs": [{"name": i.name, "dtype": "int64", "axes": list(i.axes), "fill": i.fill} for i in program.inputs],
        "deltas": [
            {
                "name": d.name,
                "shape": list(d.shape),
                "free": {str(axis): symbol for axis, symbol in d.free.items()},
                "dtype": str(d.dtype).removeprefix("torch."),
                "technique": d.technique,
                "site": d.site,
                "part": d.part,
                "role": d.role,
            }
            for d in program.ledger.deltas.values()
        ],
        "tools": {name: tool_version(name) for name in TOOLS},
        **facts,
    }


def tool_version(name: str) -> str:
    """Version of an installed distribution."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def _write_manifest(folder: Path, document: Mapping[str, Any]) -> None:
    partial = folder / f".{MANIFEST}"
    try:
        partial.write_text(json.dumps(seal(document), indent=1, sort_keys=True) + "\n", encoding="utf-8")
        partial.replace(folder / MANIFEST)
    finally:
        partial.unlink(missing_ok=True)
