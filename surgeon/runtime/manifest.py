"""What a build says of itself, as types; `document` reads and seals them, `files` compares with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from surgeon.runtime.checkpoint import Checkpoint

FORMAT = 1
MANIFEST = "manifest.json"
MODEL = "model.onnx"
MIXED = "mixed.onnx"
"""The graph whose rows have a task each, over the weights of the other."""
ENCODER, DECODER = "encoder.onnx", "decoder.onnx"
"""The graphs of an encoder-decoder that writes texts, over the weights of the whole model."""
MIXED_ENCODER, MIXED_DECODER = f"mixed_{ENCODER}", f"mixed_{DECODER}"
"""The same, of a task a row."""
NO_TASK = "base.onnx_adapter"
"""What the deltas of a row without a task are."""
TOKENIZER = "tokenizer.json"
TEMPLATE = "chat_template.jinja"
FEWER = ("int8", "int4")
APPROXIMATE = ("base-rounded", *FEWER)
"""Weights of a graph that computes another base than PyTorch does."""
OUTSIDE = ("link", "reference")
"""Weights that lie in the checkpoint's own files."""


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

    @property
    def writes_several(self) -> bool:
        """Whether texts of several tasks may go on together."""
        own_graphs = self.goes_on or MIXED_ENCODER in self.files
        return self.generation is not None and "mixed" in self.modes and own_graphs

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
