"""The boxes of a picture, and the text in them: what a site or a delta is called and how large it is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from surgeon.anatomy.sites import Attention, Embedding, Join, Projection, Site
from surgeon.ledger import Delta


@dataclass(frozen=True)
class Line:
    """A line of text in a box; `technique` owns what it names."""

    text: str
    technique: str | None = None


@dataclass
class Box:
    """A node to draw: its lines, and the technique that inserted it. A round one holds one sign."""

    lines: list[Line]
    technique: str | None = None
    round: bool = False
    end: bool = False

    def bare(self) -> Box:
        """As it was before surgery: without the deltas that it reads."""
        return replace(self, lines=[line for line in self.lines if line.technique is None])


def site_box(sites: Sequence[Site], deltas: Iterable[Delta]) -> Box:
    """A place of the base under its role, with the deltas that it reads now."""
    first = sites[0]
    if isinstance(first, Join):
        return Box([Line("+")], round=True)
    names = first.role
    if len(sites) > 1:
        names = f"{first.role}, " + ", ".join(site.role.rpartition(".")[2] for site in sites[1:])
    return Box([Line(names), *filter(None, [_size(sites)]), *pills(deltas)])


def _size(sites: Sequence[Site]) -> Line | None:
    match sites[0]:
        case Projection() as first:
            weight = first.weight_node.meta["val"].shape
            wide = int(weight[1] if first.in_first else weight[0])
            return Line(f"{first.in_features} → {wide}")
        case Attention() as first:
            grouped = f", {first.kv_heads} for keys" if first.kv_heads != first.heads else ""
            return Line(f"{first.heads} heads of {first.head_dim}{grouped}")
        case Embedding() as first:
            return Line(f"{first.rows} × {first.width}")
        case _:
            return None


def pills(deltas: Iterable[Delta]) -> list[Line]:
    """A line for each delta that a box reads."""
    return [Line(f"{delta.part} ({shape(delta)})", delta.technique) for delta in deltas]


def shape(delta: Delta) -> str:
    """`384 × rank`: a word where a task may choose the size."""
    words = {axis: symbol.rpartition(f"{delta.technique}.")[2].split(".")[0] for axis, symbol in delta.free.items()}
    return " × ".join(words.get(axis, str(size)) for axis, size in enumerate(delta.shape))
