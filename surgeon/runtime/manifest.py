"""What a build says of itself: manifest.json, checked before any other file of the build is opened.

The exporter seals the document here and the runtime reads it here, so both sides agree by construction.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from surgeon.errors import BuildError, shorten
from surgeon.runtime.checkpoint import Checkpoint, parse_checkpoint
from surgeon.runtime.fields import REBUILD, Fields

FORMAT = 1
MANIFEST = "manifest.json"
MODEL = "model.onnx"
MIXED = "mixed.onnx"
"""The graph whose rows have a task each, over the weights of the other."""
ENCODER, DECODER = "encoder.onnx", "decoder.onnx"
"""The graphs of an encoder-decoder that writes texts, over the weights of the whole model."""
NO_TASK = "base.onnx_adapter"
"""What the deltas of a row without a task are."""
TOKENIZER = "tokenizer.json"
TEMPLATE = "chat_template.jinja"
FEWER = ("int8", "int4")
APPROXIMATE = ("base-rounded", *FEWER)
"""Weights of a graph that computes another base than PyTorch does."""
OUTSIDE = ("link", "reference")
"""Weights that lie in the checkpoint's own files."""
CHANGED = "has other content (its hash differs)"


@dataclass(frozen=True)
class Base:
    """The frozen model that the deltas belong to."""

    source: str
    architecture: str
    head: str
    fingerprint: str
    parameters: int
    max_length: int | None
    labels: tuple[str, ...] | None = None
    """Names of the classes of its own head, where it has such."""


@dataclass(frozen=True)
class Port:
    """An input or output of the graph; `fill` is the value of an input that the caller leaves out."""

    name: str
    dtype: str
    axes: tuple[str | int, ...]
    fill: int | float | None = None


@dataclass(frozen=True)
class Delta:
    """One tensor of a task; `free` maps an axis to the symbol of the size that a task file may choose.

    No task may make an axis smaller than `least` says. A task may leave an `optional` one to the base; a call may leave
    out `droppable` ones of lower layers. One that acts `once` is for the beginning of a text and not for tokens that go
    on from a cache.
    """

    name: str
    shape: tuple[int, ...]
    free: Mapping[int, str]
    dtype: str
    technique: str
    site: str
    part: str
    role: str
    stack: str
    layer: int | None
    optional: bool
    droppable: bool
    padding: float
    least: Mapping[int, int]
    once: bool

    @cached_property
    def axes(self) -> tuple[str | int, ...]:
        """The shape as ONNX declares it: a symbol where the size is free."""
        return tuple(self.free.get(axis, size) for axis, size in enumerate(self.shape))


@dataclass(frozen=True)
class File:
    """A file of the build; `bytes` is None where the manifest records only its hash."""

    sha256: str
    bytes: int | None = None


@dataclass(frozen=True)
class Task:
    """A task that the build ships, with its two files: what ONNX Runtime loads, and the source of it."""

    name: str
    labels: tuple[str, ...] | None
    adapter: str
    weights: str
    adapter_sha256: str
    weights_sha256: str


@dataclass(frozen=True)
class Cached:
    """A tensor of the cache: what goes in of earlier tokens, and the output that brings it out, longer."""

    past: Port
    present: str
    start: str | None = None
    """The delta that a text's cache begins with; None where it begins empty."""

    def shape(self, **sizes: int) -> list[int]:
        """Its shape where the axes have these sizes."""
        return [axis if isinstance(axis, int) else sizes[axis] for axis in self.past.axes]


@dataclass(frozen=True)
class Rules:
    """What the base asks of every text: a token forced to be the first, or the last where a text is cut; tokens that
    are never written; tokens at `least` before an end; and no sequence of `ngram` tokens twice (0: as many as come).
    """

    first: int | None
    last: int | None
    banned: tuple[int, ...]
    least: int
    ngram: int


@dataclass(frozen=True)
class Source:
    """How an encoder-decoder writes: what its encoder gives to the decoder, and the token that a text starts with.

    The bridge is the mask over the source's columns, then keys and values, layer after layer.
    """

    bridge: tuple[Port, ...]
    start: int
    rules: Rules


@dataclass(frozen=True)
class Generation:
    """How a build writes texts: its cache, and the tokens that end a text."""

    cache: tuple[Cached, ...]
    ends: frozenset[int]
    tokens: Mapping[str, str]
    """Special tokens that a chat template may name, as `bos_token`."""
    shared: bool = False
    """Whether past and present may be the same memory: each row's new columns are then written behind its own."""
    source: Source | None = None
    """None where a decoder alone goes on with a prompt."""


@dataclass(frozen=True)
class Manifest:
    """A build's manifest whose own hash and format version were right."""

    sha256: str
    surgeon: str
    base: Base
    opset: int
    ir_version: int
    modes: tuple[str, ...]
    weights: str
    external: tuple[str, ...]
    """Files of the build that hold weights of the ONNX models."""
    checkpoint: Checkpoint | None
    """Files outside of the build that do."""
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    deltas: tuple[Delta, ...]
    positions: Mapping[str, str]
    counted: Mapping[str, str]
    mixed: tuple[Port, ...]
    generation: Generation | None
    tasks: Mapping[str, Task]
    files: Mapping[str, File]
    tools: Mapping[str, str]

    @property
    def approximate(self) -> bool:
        """Whether the ONNX model computes another base than the one that is trained on."""
        return self.weights in APPROXIMATE

    @property
    def goes_on(self) -> bool:
        """Whether the model goes on with a text from a cache, and so answers for the last token alone."""
        return self.generation is not None and self.generation.source is None

    def taken(self, sizes: Mapping[str, int], axis: str) -> int:
        """How many positions of an input's axis a task of these sizes takes for tokens of its own."""
        return sum(sizes.get(symbol, 0) for symbol, of in self.positions.items() if of == axis)

    def every_file(self) -> dict[str, File]:
        """All files with a recorded hash, those of the tasks included."""
        listed = dict(self.files)
        for task in self.tasks.values():
            listed[task.adapter] = File(task.adapter_sha256)
            listed[task.weights] = File(task.weights_sha256)
        return listed


def canonical_hash(doc: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's canonical JSON, its own `sha256` left out."""
    rest = {key: value for key, value in doc.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def seal(doc: Mapping[str, Any]) -> dict[str, Any]:
    """The document with the hash of itself added."""
    return {**doc, "sha256": canonical_hash(doc)}


def hash_file(path: Path) -> str:
    """SHA-256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def check_files(build: str | Path, manifest: Manifest, names: Iterable[str] | None = None) -> None:
    """Compare files with the manifest: all, or those named. Raises one BuildError that lists every difference."""
    known = manifest.every_file()
    faults = []
    for name in known if names is None else names:
        fault = _fault(Path(build) / name, known[name])
        if fault:
            faults.append(f"{name} {fault}")
    if faults:
        raise damaged(build, faults)


def damaged(build: str | Path, faults: list[str]) -> BuildError:
    """The error for files that are not those the manifest was written with."""
    return BuildError(
        f"{len(faults)} of the build's files {'is' if len(faults) == 1 else 'are'} not what the manifest says",
        where=str(build),
        there_is=shorten(faults),
        try_=REBUILD,
    )


def read_file(build: str | Path, name: str, file: File, *, verify: bool = True) -> bytes:
    """The bytes of one file, compared with the manifest's record: those that are checked are those that are used."""
    try:
        data = (Path(build) / name).read_bytes()
    except OSError as error:
        raise damaged(build, [f"{name} cannot be read: {error.strerror}"]) from error
    if not verify:
        return data
    if file.bytes is not None and len(data) != file.bytes:
        raise damaged(build, [f"{name} has {len(data)} bytes instead of {file.bytes}"])
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise damaged(build, [f"{name} {CHANGED}"])
    return data


def _fault(path: Path, file: File) -> str | None:
    try:
        size = path.stat().st_size
        if file.bytes is not None and size != file.bytes:
            return f"has {size} bytes instead of {file.bytes}"
        return None if hash_file(path) == file.sha256 else CHANGED
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


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
