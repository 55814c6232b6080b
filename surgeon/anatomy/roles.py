"""Seventh step of anatomy: which role each weighted op plays inside its sublayer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch.fx import Node

from surgeon.anatomy.facts import NONLINEARITIES, PRODUCTS, Facts
from surgeon.anatomy.probe import features
from surgeon.anatomy.reading import Reading
from surgeon.anatomy.shapes import shapes_match
from surgeon.anatomy.stacks import Place
from surgeon.anatomy.weighted import WeightedOp

Sides = dict[WeightedOp, dict[str, tuple[Node, Node]]]
"""For each projection the operands of the attention product that it feeds, each with its last write."""


@dataclass(frozen=True, eq=False)
class Part:
    """A weighted op in a role, with the output features that play it (None for all)."""

    op: WeightedOp
    role: str
    features: tuple[int, ...] | None = None


def parts(reading: Reading, place: Place) -> list[Part]:
    """The roles of a sublayer's weighted ops; an op of several roles appears once for each."""
    own = [w for n, w in reading.weighted.items() if place.sublayer.own & reading.facts.bit(n)]
    if place.kind in {"attention", "cross_attention"}:
        found = _attention(reading, place, own)
    elif place.kind == "mixer":
        found = [Part(op, "mixer") for op in own]
    else:
        found = _feed_forward(reading, place, own, place.kind)
    named = {part.op for part in found}
    rest = "moe.router" if place.kind == "moe" else "other"
    return found + [Part(op, rest if _routes(reading, op) else "other") for op in own if op not in named]


def downs(reading: Reading, place: Place) -> list[WeightedOp]:
    """The sublayer's last linears: those nearest above what it adds to the stream."""
    facts, sublayer = reading.facts, place.sublayer
    own = {n: w for n, w in reading.weighted.items() if sublayer.own & facts.bit(n) and not w.depthwise}
    own = {n: w for n, w in own.items() if not _routes(reading, w)}
    return [own[n] for n in facts.nearest_above(facts.written(sublayer.add, sublayer.value), own, [place.join.stream])]


def _routes(reading: Reading, op: WeightedOp) -> bool:
    facts = reading.facts
    choices = facts.named("topk")
    return bool(choices and facts.nearest_below(op.node, choices, reading.weighted.keys() - {op.node}))


def _attention(reading: Reading, place: Place, own: list[WeightedOp]) -> list[Part]:
    facts = reading.facts
    sides: Sides = {}
    for core in place.sublayer.cores:
        for side, operand in (("query", core.query), ("key", core.key), ("value", core.value)):
            written = facts.written(core.mixed if side == "value" else core.scores, operand)
            for node in facts.nearest_above(written, _mixing(reading), [place.join.stream]):
                sides.setdefault(reading.weighted[node], {}).setdefault(side, (operand, written))
    found = []
    for op, roles in sides.items():
        cuts = [other.node for other in sides if other is not op]
        shared = len(roles) > 1 or _feeds_another(reading, op, sides)
        for side, operands in roles.items():
            slice_ = features(facts, op.output, *operands, cuts) if shared else None
            found.append(Part(op, f"{place.kind}.{side}", slice_))
    found += _position_parts(reading, place, sides)
    after = {node for core in place.sublayer.cores for node in facts.nearest_below(core.mixed, _inside(reading, place))}
    return found + [
        Part(reading.weighted[n], f"{place.kind}.output") for n in after if reading.weighted[n] not in sides
    ]


def _mixing(reading: Reading) -> set[Node]:
    return {n for n, w in reading.weighted.items() if not w.depthwise and not w.static}


def _inside(reading: Reading, place: Place) -> set[Node]:
    return {n for n in reading.weighted if place.sublayer.own & reading.facts.bit(n)}


def _feeds_another(reading: Reading, op: WeightedOp, others: Iterable[WeightedOp]) -> bool:
    """Whether part of the op's output goes through another of the projections first (low-rank keys)."""
    return any(other is not op and reading.facts.is_above(op.node, other.node) for other in others)


def _position_parts(reading: Reading, place: Place, sides: Sides) -> list[Part]:
    """Projections of relative positions: a weight's call on a table of positions, not on data.

    One that meets a query projects keys, and the other way round.
    """
    facts = reading.facts
    found = []
    for op in (w for w in reading.weighted.values() if w.static):
        product = _first_product(facts, op.output)
        if product is None or not place.sublayer.own & facts.bit(product):
            continue
        other = [i for i in facts.flow(product) if i in facts.activations]
        met = {
            side
            for i in other
            for n in facts.nearest_above(i, _mixing(reading))
            for side in sides.get(reading.weighted[n], {})
        }
        side = "key" if "query" in met else "query"
        found.append(Part(op, f"{place.kind}.{side}.position"))
    return found


def _first_product(facts: Facts, node: Node) -> Node | None:
    todo, seen = [node], {node}
    while todo:
        node = todo.pop(0)
        for user in facts.users[node]:
            if facts.op[user] in PRODUCTS and user in facts.activations:
                return user
            if user not in seen and user in facts.fixed:
                seen.add(user)
                todo.append(user)
    return None


def _feed_forward(reading: Reading, place: Place, own: list[WeightedOp], family: str) -> list[Part]:
    found: list[Part] = []
    for down in downs(reading, place):
        if down.out_features != place.join.root.meta["val"].shape[-1]:
            continue
        prefix = "moe" if down.expert else "ffn"
        found.append(Part(down, f"{prefix}.down"))
        found += _unit(reading, place, down, prefix)
    return found


def _unit(reading: Reading, place: Place, down: WeightedOp, prefix: str) -> list[Part]:
    """What feeds a down projection: up alone, up and gate, or one op holding both."""
    facts = reading.facts
    inside = _inside(reading, place) - {down.node}
    for product in _products_above(facts, down.input, inside):
        gate, up = facts.flow(product)
        gates, ups = (facts.nearest_above(factor, inside, [place.join.stream]) for factor in (gate, up))
        if not gates or not ups:
            continue
        if set(gates).isdisjoint(ups):
            if _nonlinear(facts, up, ups) and not _nonlinear(facts, gate, gates):
                gates, ups = ups, gates
            return [Part(reading.weighted[n], f"{prefix}.{r}") for r, ns in (("gate", gates), ("up", ups)) for n in ns]
        if gates == ups and len(gates) == 1:
            fused = reading.weighted[gates[0]]
            if _nonlinear(facts, up, ups) and not _nonlinear(facts, gate, gates):
                gate, up = up, gate
            slices = features(facts, fused.output, gate), features(facts, fused.output, up)
            if set(slices[0]).isdisjoint(slices[1]):
                return [Part(fused, f"{prefix}.gate", slices[0]), Part(fused, f"{prefix}.up", slices[1])]
    return [
        Part(reading.weighted[n], f"{prefix}.up") for n in facts.nearest_above(down.input, inside, [place.join.stream])
    ]


def _products_above(facts: Facts, node: Node, stops: set[Node]) -> list[Node]:
    """Elementwise products of two activations of equal shape, nearest first, up to the next weighted op."""
    found, todo, seen = [], [node], {node}
    while todo:
        node = todo.pop(todo.index(max(todo, key=facts.position.__getitem__)))
        if node in stops:
            continue
        flow = facts.flow(node)
        if facts.op[node] == "mul" and len(flow) == 2 and shapes_match(*flow):
            found.append(node)
        todo.extend(i for i in flow if i not in seen)
        seen.update(flow)
    return found


def _nonlinear(facts: Facts, factor: Node, sources: list[Node]) -> bool:
    way = 0
    for source in sources:
        way |= facts.interval(source, factor)
    return any(facts.op[node] in NONLINEARITIES for node in facts.members(way))
