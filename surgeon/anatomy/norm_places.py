"""Ninth step of anatomy: the place of every normalisation relative to its sublayer."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from surgeon.anatomy.joins import JoinOp
from surgeon.anatomy.norms import NormOp
from surgeon.anatomy.reading import Reading
from surgeon.anatomy.roles import downs
from surgeon.anatomy.stacks import Place, Stack, stack_above, stack_below


@dataclass(frozen=True, eq=False)
class NormPlace:
    """A norm's place, with its sublayer or, outside of sublayers, its stack."""

    place: str
    stack: Stack | None
    layer: int | None
    join: JoinOp | None
    """The join whose result a `post` norm takes."""


def norm_places(reading: Reading, found: list[Place], chains: list[Stack]) -> dict[NormOp, NormPlace]:
    """The place of every norm, in graph order."""
    inner: dict[NormOp, NormPlace] = {}
    for norm in reading.norms.values():
        place = next((p for p in found if p.sublayer.own & reading.facts.bit(norm.output)), None)
        if place is not None:
            inner[norm] = NormPlace(_inside(reading, norm, place), place.stack, place.layer, None)
    outer = {n: _outside(reading, n, found, chains, inner) for n in reading.norms.values() if n not in inner}
    return {norm: inner.get(norm) or outer[norm] for norm in reading.norms.values()}


def _inside(reading: Reading, norm: NormOp, place: Place) -> str:
    facts, own = reading.facts, place.sublayer.own
    node = norm.output
    inside = [n for n in reading.weighted if own & facts.bit(n)]
    projected = [n for n in inside if facts.is_above(n, node)]
    cores = place.sublayer.cores
    if not projected and not any(facts.is_above(core.mixed, node) for core in cores):
        return "pre"
    for core in cores:
        written = facts.written(core.scores, core.key)
        sides = [s for s in (core.query, written, core.value) if s is node or facts.is_above(node, s)]
        if sides:
            between = [n for n in inside if facts.is_above(node, n) and any(facts.is_above(n, s) for s in sides)]
            return "lowrank" if between else ("v" if sides == [core.value] else "qk")
    return "branch-end" if any(facts.is_above(w.node, node) for w in downs(reading, place)) else "inner"


def _outside(
    reading: Reading, norm: NormOp, found: list[Place], chains: list[Stack], inner: dict[NormOp, NormPlace]
) -> NormPlace:
    facts = reading.facts
    if norm.input not in facts.activations:
        return NormPlace("embedding", _first_stack(reading, norm.output, chains), None, None)
    source = facts.strip(norm.input, [*reading.norms, *(j.root for c in chains for j in c.joins)])
    for chain in chains:
        for at, join in enumerate(chain.joins):
            if join.root is source and (at + 1 < len(chain.joins) or not _normed(reading, join, inner)):
                return NormPlace("post", chain, chain.layers[at], join)
    above = stack_above(reading, norm.output, chains)
    if above is None:
        return NormPlace("embedding", stack_below(reading, norm.output, chains), None, None)
    return NormPlace("final" if source in {j.root for j in above.joins} else "head", above, None, None)


def _normed(reading: Reading, join: JoinOp, inner: dict[NormOp, NormPlace]) -> bool:
    """Whether a join's sublayers have norms of their own at their start or end."""
    return any(
        place.place in {"pre", "branch-end"} and s.own & reading.facts.bit(norm.output)
        for norm, place in inner.items()
        for s in join.sublayers
    )


def _first_stack(reading: Reading, node: Node, chains: list[Stack]) -> Stack | None:
    """The stack of the first activation that a fixed value meets."""
    facts = reading.facts
    todo, seen = [node], {node}
    while todo:
        node = todo.pop(0)
        if node in facts.activations:
            return stack_below(reading, node, chains)
        fresh = [u for u in facts.users[node] if u not in seen]
        seen.update(fresh)
        todo.extend(fresh)
    return None
