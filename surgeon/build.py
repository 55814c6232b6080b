"""The build directory: written whole or not at all, and extended task by task."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from surgeon.base import Checkpoint, write_base
from surgeon.base.talking import chat_template
from surgeon.contents import Contents, describe
from surgeon.errors import BuildError, DeltaError, SpecError
from surgeon.exporters.cache import export_cached
from surgeon.exporters.genai import GENAI, genai_config, not_carried
from surgeon.graph_text import graph_text
from surgeon.inputs import vocabulary
from surgeon.model import TaskModel
from surgeon.runtime.document import read_manifest, seal
from surgeon.runtime.files import hash_file
from surgeon.runtime.manifest import MANIFEST, MODEL, NO_TASK, OUTSIDE, TEMPLATE, TOKENIZER
from surgeon.runtime.taskfile import write_adapter

TOKENIZER_CONFIG = "tokenizer_config.json"
BASE = "base"
"""Folder of a build made from a model in hand, or of one whose base was trained: no path could find it again."""


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


def write_build(contents: Contents, out: Path, report: Callable[[str], None]) -> Path:
    """Write everything a build holds. Raises BuildError where it cannot; then nothing of it is left."""
    spec, base = contents.spec, contents.base
    if contents.program.dtype == torch.bfloat16:
        raise SpecError(
            "ONNX Runtime computes next to nothing in bfloat16, and task files cannot hold it",
            where=spec.locate(("base", "dtype")),
            try_="`dtype: float32`: weights that the checkpoint has in bfloat16 stay so in the build, and are exact",
        )
    with _partial(out) as folder:
        program, export = contents.program, spec.export
        checkpoint = base.checkpoint
        if spec.base is None:
            report("writing the base in hand")
            checkpoint = write_base(base, folder / BASE, inside=BASE)
        report("converting to ONNX")
        facts = export_cached(
            program,
            program.fingerprint,
            folder,
            opset=export.opset,
            weights=export.weights,
            modes=export.modes,
            checkpoint=checkpoint,
            both=contents.halves,
        )
        elsewhere = facts.pop("outside")
        outer = _place(checkpoint, elsewhere, export.weights, folder, report)
        if "mixed" in export.modes:
            defaults = {name: t.cpu().contiguous().numpy() for name, t in program.ledger.defaults().items()}
            write_adapter(folder / NO_TASK, defaults, program.fingerprint)
        report("writing the build")
        (folder / "spec.yaml").write_text(spec.to_yaml(), encoding="utf-8")
        (folder / "graph.txt").write_text(graph_text(contents.program), encoding="utf-8")
        if base.tokenizer_path is not None:
            shutil.copyfile(base.tokenizer_path, folder / TOKENIZER)
        if contents.generation is not None:
            _write_generation(contents, contents.generation, folder, report)
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        named = {str(p.relative_to(folder)): {"sha256": hash_file(p), "bytes": p.stat().st_size} for p in files}
        inner = {tensor["file"] for tensors in elsewhere.values() for tensor in tensors.values()} & named.keys()
        document = describe(contents, facts) | {
            "files": named,
            "external": sorted({name for name in named if name.startswith(f"{MODEL}.")} | inner),
            "checkpoint": outer,
            "tasks": {},
        }
        for task, model in contents.models.items():
            report(f"packing {task}")
            document["tasks"][task] = _write_task(folder, task, model, contents.program.fingerprint)
        _write_manifest(folder, document)
    return out


def _place(
    checkpoint: Checkpoint | None,
    elsewhere: Mapping[str, Mapping[str, Any]],
    weights: str,
    folder: Path,
    report: Callable[[str], None],
) -> dict[str, Any] | None:
    """Put the checkpoint's files that the models read into the build; or return where they stay, for the manifest.

    `elsewhere` are, for each model, its tensors that lie in them. Raises BuildError where a file cannot be linked.
    """
    if checkpoint is None or weights not in OUTSIDE:
        return None
    tensors = list(elsewhere[MODEL].values())
    report(f"{len(tensors)} of the model's tensors are the checkpoint's")
    if checkpoint.inside:
        return None
    used = [name for name in checkpoint.files if any(tensor["file"] == name for tensor in tensors)]
    if weights == "reference":
        report("hashing the checkpoint")
        paths = {name: checkpoint.folder / name for name in used}
        files = {name: {"sha256": hash_file(path), "bytes": path.stat().st_size} for name, path in paths.items()}
        return {"folder": str(checkpoint.folder), "files": files, "tensors": elsewhere}
    for name in used:
        try:
            os.link((checkpoint.folder / name).resolve(), folder / name)
        except OSError as error:
            raise BuildError(
                f"{name} of the checkpoint cannot be linked into the build: {error.strerror}",
                where=str(checkpoint.folder),
                try_="an output on the same file system as the checkpoint, or `weights: reference` or `copy` in the "
                "spec's `export`",
            ) from error
    return None


def _write_generation(
    contents: Contents, generation: Mapping[str, Any], folder: Path, report: Callable[[str], None]
) -> None:
    """What only a build that writes texts has: a chat template, and what onnxruntime-genai reads."""
    base, program = contents.base, contents.program
    template = chat_template(base)[0]
    if template is not None:
        (folder / TEMPLATE).write_text(template, encoding="utf-8")
    if contents.halves is not None:
        return
    if (reason := not_carried(program, generation["end"])) is not None:
        report(f"no {GENAI}: {reason}")
        return
    config = genai_config(program, generation["end"], vocabulary(base.model))
    (folder / GENAI).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    if base.tokenizer_path is not None and (said := base.tokenizer_path.with_name(TOKENIZER_CONFIG)).exists():
        shutil.copyfile(said, folder / TOKENIZER_CONFIG)


def pack_tasks(build: Path, models: Mapping[str, TaskModel], fingerprint: str) -> None:
    """Put the weights of `models` into an existing build: new files first, then the manifest, by rename.

    Raises DeltaError for a build over another base.
    """
    manifest = read_manifest(build)
    if manifest.base.fingerprint != fingerprint:
        raise DeltaError(
            "the weights were trained on another base than the build's",
            where=str(build),
            there_is=f"their base: {fingerprint[:16]}; the build's: {manifest.base.fingerprint[:16]}",
            try_="save what was compiled as a build of its own",
        )
    document = json.loads((build / MANIFEST).read_text(encoding="utf-8"))
    before = set((build / "tasks").glob("*"))
    try:
        for task, model in models.items():
            document["tasks"][task] = _write_task(build, task, model, fingerprint)
        _write_manifest(build, document)
    except BaseException as error:
        for path in set((build / "tasks").glob("*")) - before:
            path.unlink(missing_ok=True)
        if isinstance(error, OSError | SafetensorError):
            raise BuildError(f"the task could not be written: {_reason(error)}", where=str(build)) from error
        raise
    for task in models.keys() & manifest.tasks.keys():
        old, entry = manifest.tasks[task], document["tasks"][task]
        for name in {old.adapter, old.weights} - {entry["adapter"], entry["weights"]}:
            (build / name).unlink(missing_ok=True)


def _write_task(folder: Path, task: str, model: TaskModel, fingerprint: str) -> dict[str, Any]:
    """The task's two files under names that hold their hash; returns its manifest entry."""
    tasks = folder / "tasks"
    tasks.mkdir(exist_ok=True)
    for schedule in model.schedules:
        schedule.check(model)
    trained = {n: t.detach().cpu().contiguous() for n, t in model.state_dict().items()}
    deployed = {n: t.detach().cpu().contiguous() for n, t in model.ledger.shrink(model.deployed()).items()}
    metadata = {"base": fingerprint}  # one key: safetensors writes several in another order every time
    entry: dict[str, Any] = {"labels": model.label_names, "sha256": {}}
    writers: dict[str, tuple[str, Callable[[Path], None]]] = {
        "weights": (".safetensors", lambda path: save_file(trained, path, metadata=metadata)),
        "adapter": (
            ".onnx_adapter",
            lambda path: write_adapter(path, {n: t.numpy() for n, t in deployed.items()}, fingerprint),
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


def _write_manifest(folder: Path, document: Mapping[str, Any]) -> None:
    partial = folder / f".{MANIFEST}"
    try:
        partial.write_text(json.dumps(seal(document), indent=1, sort_keys=True) + "\n", encoding="utf-8")
        partial.replace(folder / MANIFEST)
    finally:
        partial.unlink(missing_ok=True)
