"""A cache of converted graphs: free dimensions make the ONNX model independent of ranks, lengths and tasks.

Compiling again with another rank or another task finds the same graph over the same base and copies the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import onnx_ir as ir

from surgeon import exporters, mixed
from surgeon.base.checkpoint import Checkpoint
from surgeon.base.gguf import cache_folder
from surgeon.exporters.onnx import OnnxExporter
from surgeon.exporters.places import DATA, outside
from surgeon.exporters.quantise import KEPT
from surgeon.exporters.versions import tool_version, tool_versions
from surgeon.graph_text import graph_text
from surgeon.halves import Halves
from surgeon.program import Program
from surgeon.runtime.files import hash_file
from surgeon.runtime.manifest import DECODER, ENCODER, MIXED, MIXED_DECODER, MIXED_ENCODER, MODEL, OUTSIDE

FILES = (MODEL, DATA, MIXED, ENCODER, DECODER, MIXED_ENCODER, MIXED_DECODER)
KEEP = 4


def export_cached(
    program: Program,
    fingerprint: str,
    folder: Path,
    *,
    opset: int,
    weights: str,
    modes: Sequence[str] = ("switch",),
    checkpoint: Checkpoint | None = None,
    both: Halves | None = None,
) -> dict[str, Any]:
    """Put the ONNX models into `folder`, from the cache where it holds them; returns their facts for the manifest.

    `outside` are, for each model, its tensors that lie in files of the `checkpoint`. `both` are the halves of an
    encoder-decoder that generates, which stand beside the whole.
    """
    entry = cache_folder() / cache_key(program, fingerprint, opset, weights, modes, checkpoint, both)
    facts = _take(entry, folder)
    if facts is None:
        exporter = OnnxExporter(checkpoint)
        model = exporter.export(program, folder, opset=opset, weights=weights)
        facts = {**_facts(model), "outside": {"model.onnx": outside(model)}}
        if "mixed" in modes:
            model = exporter.export_mixed(program, folder, opset=opset, weights=weights)
            facts["mixed"] = _facts(model)["outputs"]
            facts["outside"]["mixed.onnx"] = outside(model)
        if both is not None:
            several = "mixed" in modes
            halves = exporter.export_halves(both, folder, opset=opset, weights=weights, several=several)
            for name, model in halves.items():
                facts["outside"][name] = outside(model)
        _store(entry, folder, [name for name in FILES if (folder / name).exists()], facts)
    return facts


def cache_key(  # noqa: PLR0917 - all that a model depends on
    program: Program,
    fingerprint: str,
    opset: int,
    weights: str = "copy",
    modes: Sequence[str] = ("switch",),
    checkpoint: Checkpoint | None = None,
    both: Halves | None = None,
) -> str:
    """Hash of all that the ONNX models depend on: base and its form, graph, free dimensions, opset and versions."""
    deltas = [
        (d.name, [d.free.get(a, s) for a, s in enumerate(d.shape)], list(d.default.shape), d.droppable)
        for d in program.ledger.deltas.values()
    ]
    tools = {"modelsurgeon": tool_version("modelsurgeon"), "exporters": _own_sources()} | tool_versions()
    constants = {n: hashlib.sha256(t.cpu().numpy().tobytes()).hexdigest() for n, t in program.constants.items()}
    texts = [graph_text(p) for p in ((program,) if both is None else (program, both.encoder, both.decoder))]
    blocks = dict(program.quantised.forms) if weights in KEPT else {}
    files = None
    if checkpoint is not None:
        files = checkpoint.layout if weights in OUTSIDE else sorted(checkpoint.dtypes)
    weights = "outside" if weights in OUTSIDE else weights
    form = [blocks, program.shares_cache, opset, weights, sorted(modes), files]
    parts = [fingerprint, texts, deltas, constants, form, tools]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@cache
def _own_sources() -> str:
    """Hash of the code that makes ONNX models of a program: another one may make others."""
    files = sorted(path for room in (exporters, mixed) for path in Path(str(room.__file__)).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def _facts(model: ir.Model) -> dict[str, Any]:
    outputs = [
        {
            "name": value.name,
            "dtype": str(value.dtype.numpy()) if value.dtype else "float32",
            "axes": [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape or ()],
        }
        for value in model.graph.outputs
    ]
    return {"outputs": outputs, "opset": model.opset_imports[""], "ir_version": model.ir_version}


def _take(entry: Path, folder: Path) -> dict[str, Any] | None:
    """Copy an entry whose files are whole; a damaged one is dropped. Raises OSError if `folder` cannot be written."""
    try:
        known = json.loads((entry / "facts.json").read_text(encoding="utf-8"))
        facts: dict[str, Any] = known["facts"]
        hashes: dict[str, str] = known["sha256"]
        if any(hash_file(entry / name) != sha256 for name, sha256 in hashes.items()):
            raise ValueError(entry)
    except (OSError, ValueError, KeyError):
        shutil.rmtree(entry, ignore_errors=True)
        return None
    try:
        for name in hashes:
            shutil.copyfile(entry / name, folder / name)
        os.utime(entry)
    except FileNotFoundError:  # another process made room meanwhile
        return None
    return facts


def _store(entry: Path, folder: Path, files: Sequence[str], facts: dict[str, Any]) -> None:
    """Keep a copy for later compiles. A cache that cannot be written is no reason to fail."""
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=entry.parent))
        try:
            for name in files:
                _link(folder / name, partial / name)
            hashes = {name: hash_file(partial / name) for name in files}
            (partial / "facts.json").write_text(json.dumps({"facts": facts, "sha256": hashes}), encoding="utf-8")
            partial.replace(entry)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        for old in list(_oldest_first(entry.parent))[:-KEEP]:
            shutil.rmtree(old, ignore_errors=True)
    except OSError:
        return


def _link(source: Path, target: Path) -> None:
    """A second name for a file, or a copy where there can be none; what changes later is found by its hash."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _oldest_first(folder: Path) -> Iterator[Path]:
    entries = [p for p in folder.iterdir() if not p.name.startswith(".") and (p / "facts.json").exists()]
    yield from sorted(entries, key=lambda p: p.stat().st_mtime)
