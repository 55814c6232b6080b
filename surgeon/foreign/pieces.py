"""What a foreign checkpoint holds, in terms of the base it belongs to: the common words of all readers."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor

from surgeon.passes.distances import Distances
from surgeon.spec import HeadName


@dataclass(frozen=True, kw_only=True)
class Product:
    """A low-rank product beside the module at `path`: y + scale · (x·a)·b, a [in, r], b [r, out].

    AdaLoRA has `values` [r] between the factors; DoRA a `magnitude` [out]; a `bias` [out] is added to x·a·b. With
    `table` the module looks rows up: y + scale · a[ids]·b, a [rows, r].
    """

    path: str
    a: Tensor
    b: Tensor
    scale: float
    values: Tensor | None = None
    magnitude: Tensor | None = None
    bias: Tensor | None = None
    table: bool = False


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """A vector that multiplies what the module at `path` gives, or with `inward` what it takes."""

    path: str
    vector: Tensor
    inward: bool


@dataclass(frozen=True, kw_only=True)
class Shared:
    """VeRA beside the module at `path`: y + behind · ((between · (x·a))·b), of which all modules share `matrices`.

    Those are a [in, r] and b [r, out] of the largest modules. Without them they are what PEFT draws from `key`.
    """

    path: str
    between: Tensor
    behind: Tensor
    key: int
    matrices: tuple[Tensor, Tensor] | None


@dataclass(frozen=True, kw_only=True)
class Whole:
    """A parameter of the base, `name`, that has another value: of a head, a norm, a bias."""

    name: str
    tensor: Tensor


@dataclass(frozen=True, kw_only=True)
class Same:
    """A parameter of the base that the file repeats; it tells whether the base is the right one."""

    name: str
    tensor: Tensor


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """Keys and values in front of the real ones, `[n, kv heads · head dim]` a layer.

    Without `stack` the base has one stack only. `shift` says that the text's positions move up by n, `distances` what
    a bias by distance is at the prefix where the base has one.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    shift: bool
    distances: Distances
    stack: str | None = None
    cross: bool = False


@dataclass(frozen=True, kw_only=True)
class Bottleneck:
    """An adapter in the module at `path`, or one of AdapterHub's own beside it: scale · (act(z·down + b)·up + b).

    `weights` are down [d, m], its bias [m], up [m, d], its bias [d].
    """

    path: str
    weights: tuple[Tensor, Tensor, Tensor, Tensor]
    placement: str
    activation: str
    scale: float


@dataclass(frozen=True, kw_only=True)
class Fused:
    """AdapterFusion of the adapters at one place: Σ sₙ · zₙ·value, s = softmax((u·query)·(zₙ·key)), as `fusion` has it.

    `query` and `key` are a matrix [d, d] and a bias [d] each, `value` a matrix, which multiply from the right.
    """

    path: str
    adapters: tuple[Bottleneck, ...]
    query: tuple[Tensor, Tensor]
    key: tuple[Tensor, Tensor]
    value: Tensor


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """A head of two layers with tanh between them, on the first token: weight and bias of each, [out, in] and [out]."""

    dense: tuple[Tensor, Tensor]
    out: tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Rows `[n, d]` in front of the text's embeddings."""

    rows: Tensor


Piece = Product | Scaling | Shared | Whole | Same | Prefix | Prompt | Bottleneck | Fused | Classifier


@dataclass(frozen=True, kw_only=True)
class Targets:
    """Which modules a checkpoint says it has changed, so that what is missing can be told.

    `found` are the paths that have tensors; `wanted` gives, from the paths of all modules of a base, those that the
    configuration selects; `biases` says which biases of the base were trained.
    """

    found: frozenset[str]
    biases: str = "none"

    def wanted(self, paths: Collection[str]) -> frozenset[str]:
        """Paths that the configuration selects."""
        return self.found & frozenset(paths)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A foreign folder, read whole: every tensor of it is in one of the pieces."""

    where: str
    method: str
    pieces: tuple[Piece, ...]
    base: str | None = None
    revision: str | None = None
    fingerprint: str | None = None
    architecture: str | None = None
    head: HeadName | None = None
    targets: Targets | None = None
    labels: tuple[str, ...] | None = None

    @property
    def whole(self) -> frozenset[str]:
        """Names of the base's parameters that the checkpoint brings itself."""
        return frozenset(piece.name for piece in self.pieces if isinstance(piece, Whole))
