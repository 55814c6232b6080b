"""manifest.json, checked before any other file of a build is opened.

The exporter seals the document here and the runtime reads it here, so both sides agree by construction.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from surgeon.errors import BuildError
from surgeon.runtime.checkpoint import parse_checkpoint
from surgeon.runtime.fields import REBUILD, Fields
from surgeon.runtime.manifest import (
    FORMAT,
    MANIFEST,
    MODEL,
    Base,
    Cached,
    Delta,
    File,
    Generation,
    Manifest,
    Port,
    Rules,
    Source,
    Task,
)


def canonical_hash(doc: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's canonical JSON, its own `sha256` left out."""
    rest = {key: value for key, value in doc.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def seal(doc: Mapping[str, Any]) -> dict[str, Any]:
    """The document with the hash of itself added."""
    return {**doc, "sha256": canonical_hash(doc)}


def read_manifest(build: str | Path) -> Manifest:
    """Read and check a build's manifest. Raises BuildError for what is missing, edited, cut or of a newer format."""
    path = Path(build) / MANIFEST
    try:
        doc = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BuildError(
            "this is not a build: it has no manifest.json",
            where=str(build),
            try_="point to the directory that `surgeon compile SPEC -o BUILD` wrote",
        ) from error
    except OSError as error:
        raise BuildError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except (ValueError, RecursionError) as error:
        raise BuildError(f"is cut or not JSON: {error}", where=str(path), try_=REBUILD) from error
    return parse_manifest(doc, str(path))


def parse_manifest(doc: object, where: str) -> Manifest:
    """Check and type a manifest's document."""
    top = Fields(doc, "", where)
    version = top.get("format", int)
    if version > FORMAT:
        raise BuildError(
            f"the build has format {version}, this Surgeon reads format {FORMAT}",
            where=where,
            there_is=f"written by Surgeon {top.get('surgeon', str)}",
            try_="run it with that version or a newer one",
        )
    if version != FORMAT:
        raise BuildError(f"there is no build format {version}", where=where, try_=REBUILD)
    sha256 = top.get("sha256", str)
    if sha256 != canonical_hash(top.doc):
        raise BuildError("was edited after the build: its hash does not hold", where=where, try_=REBUILD)
    base = top.fields("base")
    return Manifest(
        sha256=sha256,
        surgeon=top.get("surgeon", str),
        base=Base(
            source=base.get("source", str),
            architecture=base.get("architecture", str),
            head=base.get("head", str),
            fingerprint=base.fingerprint("fingerprint"),
            parameters=base.get("parameters", int),
            max_length=base.optional("max_length", int),
            labels=_labels(base),
        ),
        opset=top.get("opset", int),
        ir_version=top.get("ir_version", int),
        modes=tuple(top.get("modes", list)),
        weights=top.optional("weights", str) or "float32",
        external=_external(top),
        checkpoint=None if top.doc.get("checkpoint") is None else parse_checkpoint(top.fields("checkpoint")),
        inputs=tuple(_port(item) for item in top.items("inputs")),
        outputs=tuple(_port(item) for item in top.items("outputs")),
        deltas=tuple(_delta(item) for item in top.items("deltas")),
        positions=MappingProxyType({symbol: str(axis) for symbol, axis in top.get("positions", dict).items()}),
        counted=MappingProxyType({str(name): str(of) for name, of in (top.optional("counted", dict) or {}).items()}),
        mixed=tuple(_port(item) for item in top.items("mixed")) if top.doc.get("mixed") is not None else (),
        generation=None if top.doc.get("generation") is None else _generation(top.fields("generation")),
        tasks=MappingProxyType({name: _task(name, item) for name, item in top.named("tasks").items()}),
        files=MappingProxyType({top.inside(name): _file(item) for name, item in top.named("files").items()}),
        tools=MappingProxyType({name: str(tool) for name, tool in top.get("tools", dict).items()}),
    )


def _port(item: Fields) -> Port:
    axes = item.get("axes", list)
    if not all(isinstance(axis, str | int) for axis in axes):
        raise item.fault("axes", "a list of names and sizes")
    fill = item.doc.get("fill")
    if not (fill is None or isinstance(fill, int | float)):
        raise item.fault("fill", "a number or null")
    return Port(item.get("name", str), item.get("dtype", str), tuple(axes), fill)


def _delta(item: Fields) -> Delta:
    shape, free = item.get("shape", list), item.get("free", dict)
    if not all(isinstance(size, int) and size >= 0 for size in shape):
        raise item.fault("shape", "a list of sizes")
    if not all(axis.isdecimal() and int(axis) < len(shape) and isinstance(free[axis], str) for axis in free):
        raise item.fault("free", "a map from axis to symbol")
    least = item.optional("least", dict) or {}
    if not all(axis in free and isinstance(size, int) for axis, size in least.items()):
        raise item.fault("least", "a map from free axis to size")
    return Delta(
        name=item.get("name", str),
        shape=tuple(shape),
        free=MappingProxyType({int(axis): symbol for axis, symbol in free.items()}),
        dtype=item.get("dtype", str),
        technique=item.get("technique", str),
        site=item.get("site", str),
        part=item.get("part", str),
        role=item.get("role", str),
        stack=item.get("stack", str),
        layer=item.optional("layer", int),
        optional=item.get("optional", bool),
        droppable=item.get("droppable", bool),
        padding=item.optional("padding", float) or 0.0,
        least=MappingProxyType({int(axis): size for axis, size in least.items()}),
        once=item.optional("once", bool) or False,
    )


def _generation(item: Fields) -> Generation:
    ends = item.get("end", list)
    if not all(isinstance(token, int) for token in ends):
        raise item.fault("end", "a list of token ids")
    cache = tuple(
        Cached(_port(t.fields("past")), t.get("present", str), t.optional("start", str)) for t in item.items("cache")
    )
    tokens = item.get("tokens", dict)
    named = MappingProxyType({name: str(token) for name, token in tokens.items()})
    shared, source = item.optional("shared", bool) or False, None if item.doc.get("bridge") is None else _source(item)
    return Generation(cache, frozenset(ends), named, shared=shared, source=source)


def _source(item: Fields) -> Source:
    rules = item.fields("rules")
    banned = rules.get("banned", list)
    if not all(isinstance(token, int) for token in banned):
        raise rules.fault("banned", "a list of token ids")
    return Source(
        bridge=tuple(_port(port) for port in item.items("bridge")),
        start=item.get("start", int),
        rules=Rules(
            first=rules.optional("first", int),
            last=rules.optional("last", int),
            banned=tuple(banned),
            least=rules.get("least", int),
            ngram=rules.get("ngram", int),
        ),
    )


def _external(top: Fields) -> tuple[str, ...]:
    """The files named; of a build that names none, those beside the model."""
    files = top.named("files")
    named = top.optional("external", list)
    if named is None:
        return tuple(name for name in files if name.startswith(f"{MODEL}."))
    if not all(name in files for name in named):
        raise top.fault("external", "a list of files of the build")
    return tuple(named)


def _task(name: str, item: Fields) -> Task:
    hashes = item.fields("sha256")
    return Task(
        name=name,
        labels=_labels(item),
        adapter=item.inside(item.get("adapter", str)),
        weights=item.inside(item.get("weights", str)),
        adapter_sha256=hashes.get("adapter", str),
        weights_sha256=hashes.get("weights", str),
    )


def _labels(item: Fields) -> tuple[str, ...] | None:
    labels = item.optional("labels", list)
    if labels is not None and not all(isinstance(label, str) for label in labels):
        raise item.fault("labels", "a list of names or null")
    return None if labels is None else tuple(labels)


def _file(item: Fields) -> File:
    return File(item.get("sha256", str), item.get("bytes", int))
