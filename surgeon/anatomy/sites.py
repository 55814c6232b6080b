"""What anatomy finds: the places of a Transformer where a pass may act."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.fx import Node


@dataclass(frozen=True, kw_only=True)
class Site:
    """A place with a role. `layer` counts within its stack and is None outside the layers."""

    role: str
    stack: str
    layer: int | None
    path: str
    """Module path in the checkpoint, e.g. `bert.encoder.layer.0.attention.self.query`."""

    @property
    def label(self) -> str:
        """How people write it: `encoder/attention.query@0`."""
        at = "" if self.layer is None else f"@{self.layer}"
        return f"{self.stack}/{self.role}{at}"


@dataclass(frozen=True)
class Experts:
    """How the rows of a projection find the expert whose weight they are multiplied with."""

    count: int
    routing: Node
    """The number of each row's expert `[rows]`; of rows `sorted` by expert, where those of each end `[count]`."""
    sorted: bool


@dataclass(frozen=True, kw_only=True)
class Projection(Site):
    """A weight multiplied with activations: `output = input @ W + bias`.

    `input` and `output` are batch-first values of equal rank `[B, S, features]` (or `[B, features]` below
    a pooling); the nodes between them hold the weighted op itself, `node`, and reshapes around it.
    A role may own only some output features of a fused projection: `features` are their indices.
    """

    node: Node
    input: Node
    output: Node
    weight: str
    """Parameter name in the checkpoint."""
    weight_node: Node
    bias: str | None
    bias_node: Node | None
    in_first: bool
    """True where the stored weight is `[in, out]` (Conv1D), False for `[out, in]`."""
    in_features: int
    out_features: int
    """Features of this role: `len(features)` for a slice."""
    features: tuple[int, ...] | None = None
    experts: Experts | None = None
    """Where the weight holds one for each of several experts, `[experts, …]`: `input` and `output` are then rows
    `[rows, features]`, of which each goes to one of them."""


@dataclass(frozen=True, kw_only=True)
class Norm(Site):
    """A layer or RMS normalisation over the last axis."""

    input: Node
    output: Node
    weight: str | None
    weight_node: Node | None
    bias: str | None
    bias_node: Node | None
    place: str
    """`pre`, `post`, `branch-end`, `qk`, `v`, `lowrank`, `inner`, `embedding` or `final`."""


@dataclass(frozen=True, kw_only=True)
class Join(Site):
    """A residual add: `add = skip + branch`, the branch being a sublayer's result `[B, S, width]`.

    Where convolutions work it is `[B, width, H, W]`: `axis` is that of the features, and `entry_axis` the entry's.
    """

    add: Node
    skip: Node
    branch: Node
    entry: Node
    """The direct input of the sublayer: the stream for post-norm, the norm's output for pre-norm."""
    width: int
    axis: int = -1
    entry_axis: int = -1
    post_norm: Norm | None = None
    """The norm applied to this join's result, where the next sublayer's skip is that norm's output."""


@dataclass(frozen=True, kw_only=True)
class Attention(Site):
    """An attention product: softmax(q kᵀ + mask) v, as one SDPA node or spelled out.

    `query`, `key`, `value` are the operands at the product (behind RoPE, norms and head repetition):
    `[B, heads, S, head_dim]`, or with heads folded into the batch `[B * heads, S, head_dim]`.
    """

    core: Node
    """The SDPA node, or the softmax node of a spelled-out attention."""
    scores: Node
    """The node computing q kᵀ (the SDPA node itself where there is one)."""
    mixed: Node
    """The node computing probabilities @ v (the SDPA node itself where there is one)."""
    query: Node
    key: Node
    value: Node
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    cross: bool
    """The keys come from another stack."""


@dataclass(frozen=True, kw_only=True)
class Embedding(Site):
    """A table looked up by ids: `output = table[index]`."""

    node: Node
    index: Node
    weight: str
    weight_node: Node
    rows: int
    width: int


@dataclass(frozen=True)
class Anatomy:
    """All sites of a traced model, in graph order."""

    projections: tuple[Projection, ...] = ()
    norms: tuple[Norm, ...] = ()
    joins: tuple[Join, ...] = ()
    attentions: tuple[Attention, ...] = ()
    embeddings: tuple[Embedding, ...] = ()
    layers: dict[str, int] = field(default_factory=dict)
    """Number of layers of each stack."""
    notes: tuple[str, ...] = ()
    """What was seen and not understood, for people to read."""

    def sites(self) -> tuple[Site, ...]:
        """Every site of every kind."""
        return (*self.projections, *self.norms, *self.joins, *self.attentions, *self.embeddings)


def anchor(site: Site) -> Node:
    """The node that gives a site its place in graph order."""
    match site:
        case Projection() | Embedding():
            return site.node
        case Norm():
            return site.output
        case Join():
            return site.add
        case Attention():
            return site.core
        case _:
            raise TypeError(type(site).__name__)


def graph_order(anatomy: Anatomy) -> tuple[Site, ...]:
    """Every site of every kind, in the order of the graph."""
    sites = anatomy.sites()
    order = {node: i for i, node in enumerate(anchor(sites[0]).graph.nodes)} if sites else {}
    return tuple(sorted(sites, key=lambda site: order[anchor(site)]))
