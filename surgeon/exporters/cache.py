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
from pathlib import Path
from typing import Any

import onnx_ir as ir

from surgeon.base.gguf import cache_folder
from surgeon.exporters.onnx import OnnxExporter
from surgeon.exporters.quantise import KEPT
from surgeon.exporters.versions import tool_version, tool_versions
from surgeon.graph_text import graph_text
from surgeon.program import Program
from surgeon.runtime.manifest import hash_file

FILES = {"switch": ("model.onnx", "model.onnx.data"), "mixed": ("mixed.onnx",)}
KEEP = 4


def export_cached(
    program: Program, fingerprint: str, folder: Path, *, opset: int, weights: str, modes: Sequence[str] = ("switch",)
) -> dict[str, Any]:
    """Put the ONNX models into `folder`, from the cache where it holds them; returns their facts for the manifest."""
    entry = cache_folder() / cache_key(program, fingerprint, opset, weights, modes)
    files = [name for mode in modes for name in FILES[mode]]
    facts = _take(entry, folder, files)
    if facts is None:
        exporter = OnnxExporter()
        facts = _facts(exporter.export(program, folder, opset=opset, weights=weights))
        if "mixed" in modes:
            facts["mixed"] = _facts(exporter.export_mixed(program, folder, opset=opset, weights=weights))["outputs"]
        _store(entry, folder, files, facts)
    return facts


def cache_key(
    program: Program, fingerprint: str, opset: int, weights: str = "float32", modes: Sequence[str] = ("switch",)
) -> str:
    """Hash of all that the ONNX models depend on: base and its form, graph, free dimensions, opset and versions."""
    deltas = [
        (d.name, [d.free.get(a, s) for a, s in enumerate(d.shape)], list(d.default.shape))
        for d in program.ledger.deltas.values()
    ]
    tools = {"modelsurgeon": tool_version("modelsurgeon")} | tool_versions()
    constants = {n: hashlib.sha256(t.cpu().numpy().tobytes()).hexdigest() for n, t in program.constants.items()}
    blocks = dict(program.quantised.forms) if weights in KEPT else {}
    parts = [fingerprint, blocks, program.shares_cache, graph_text(program), deltas, constants, opset, weights, sorted(modes), tools]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


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


def _take(entry: Path, folder: Path, files: Sequence[str]) -> dict[str, Any] | None:
    """Copy an entry whose files are whole; a damaged one is dropped. Raises OSError where `folder` cannot be written."""
    try:
        known = json.loads((entry / "facts.json").read_text(encoding="utf-8"))
        facts: dict[str, Any] = known["facts"]
        if any(hash_file(entry / name) != known["sha256"][name] for name in files):
            raise ValueError(entry)
    except (OSError, ValueError, KeyError):
        shutil.rmtree(entry, ignore_errors=True)
        return None
    try:
        for name in files:
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
