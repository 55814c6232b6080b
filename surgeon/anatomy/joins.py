"""Fifth step of anatomy: residual joins, their chains, and what each sublayer does.

A join is an add whose one term, the skip, lies above the other terms, the branches, with weights on the way. Where
a stage changes the size of its stream the skip is projected too, beside the attention or the convolutions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import permutations

from torch.fx import Node

from surgeon.anatomy.cores import Core
from surgeon.anatomy.facts import CASTS, CONVOLUTIONS, NONLINEARITIES, PRODUCTS, Facts
from surgeon.anatomy.kinds import MIXERS, kind_of, pointwise
from surgeon.anatomy.reading import Reading
from surgeon.anatomy.shapes import rank, shapes_match, width

Leaves = tuple[Node, Node, list[tuple[Node, Node]]]
"""Of a tree of adds the skip, the stream that it is, and the branches, each with the add that consumes it."""


@dataclass(frozen=True, eq=False)
class Sublayer:
    """One branch of a join: the value it adds, the add that consumes it, and its own nodes."""

    value: Node
    add: Node
    own: int
    kind: str
    """`attention`, `mixer`, `moe` or `ffn`; cross-attention is told later, when chains are known."""
    cores: tuple[Core, ...]


@dataclass(frozen=True, eq=False)
class JoinOp:
    """A residual add with its skip and one branch or, in a parallel block, several."""

    root: Node
    skip: Node
    stream: Node
    """The skip without casts and dropout: where the branches start."""
    sublayers: tuple[Sublayer, ...]
    interval: int

    @property
    def adds(self) -> bool:
        """Whether there is an add: not where an attention's answer is the stream from there on."""
        return self.root is not self.sublayers[0].value


def joins(reading: Reading) -> list[JoinOp]:
    """All residual joins in graph order, with their sublayers told apart."""
    facts = reading.facts
    active = {n for n, w in reading.weighted.items() if not w.static}
    moving = facts.bits(active) | facts.bits(n for n in facts.nodes if facts.op[n] in MIXERS)
    found = [j for node in _outermost_adds(facts) if (j := _join(reading, node, moving)) is not None]
    found = _without_long_skips(facts, found, moving)
    roots = facts.bits(join.root for join in found)
    found = [
        j
        for j in found
        if facts.strip(j.skip, reading.norms) is j.stream or not j.interval & roots & ~facts.bit(j.root)
    ]
    return [_told_apart(reading, join, found) for join in found]


def blends(reading: Reading, join: JoinOp) -> bool:
    """Whether a branch ends by taking the stream away: x + r (f - x) goes from stream to sublayer, and adds nothing."""
    facts = reading.facts
    weighted = facts.bits(reading.weighted)
    return any(
        facts.op[node] == "sub"
        and len(facts.flow(node)) == 2
        and facts.strip(facts.flow(node)[1], reading.norms) is join.stream
        and not facts.interval(node, sublayer.value) & weighted
        for sublayer in join.sublayers
        for node in facts.members(sublayer.own)
    )


def previous(reading: Reading, join: JoinOp, roots: dict[Node, JoinOp]) -> JoinOp | None:
    """The join whose result, normed or not, and of the same width, this one's skip is."""
    before = roots.get(trunk(reading, join.skip, roots))
    return before if before and width(before.root) == width(join.root) else None


def trunk(reading: Reading, node: Node, roots: dict[Node, JoinOp]) -> Node:
    """Walk back from a stream over casts and norms to the join it comes from, or as far as that goes."""
    node = reading.facts.strip(node, [*reading.norms, *roots])
    while node in reading.norms and node not in roots:
        node = reading.facts.strip(reading.norms[node].input, [*reading.norms, *roots])
    return node


def _outermost_adds(facts: Facts) -> list[Node]:
    adds = [n for n in facts.nodes if len(_add_terms(facts, n)) == 2]
    consumed = {_inner_add(facts, term) for n in adds for term in _add_terms(facts, n)}
    return [n for n in adds if n not in consumed]


def _add_terms(facts: Facts, node: Node) -> list[Node]:
    if facts.op[node] != "add" or node.kwargs:
        return []
    terms = [a for a in node.args[:2] if isinstance(a, Node) and a in facts.activations]
    same = rank(node) >= 2 and isinstance(width(node), int) and all(shapes_match(t, node) for t in terms)
    return terms if same and node in facts.activations else []


def _below(facts: Facts, term: Node) -> Node:
    """Look through dropout, casts and scaling with one reader each."""
    node = term
    while facts.only_user(node) is not None:
        op, flow = facts.op[node], facts.flow(node)
        if op not in {"dropout", *CASTS} and not (op in {"mul", "div"} and len(facts.inputs[node]) == 1):
            break
        node = flow[0]
    return node


def _inner_add(facts: Facts, term: Node) -> Node | None:
    """The add that gives this term and nothing else, or None."""
    inner = _below(facts, term)
    return inner if len(_add_terms(facts, inner)) == 2 and facts.only_user(inner) is not None else None


def _tree(facts: Facts, add: Node) -> list[tuple[Node, Node]]:
    """The leaves of a tree of adds, each with the add that consumes it."""
    leaves = []
    for term in _add_terms(facts, add):
        inner = _inner_add(facts, term)
        leaves += _tree(facts, inner) if inner else [(term, add)]
    return leaves


def _join(reading: Reading, root: Node, moving: int) -> JoinOp | None:
    facts = reading.facts
    leaves = _tree(facts, root)
    best: Leaves | None = None
    for skip, _ in leaves:
        stream = facts.strip(skip, reading.norms)
        ends = {u: facts.written(add, u) for u, add in leaves}
        branches = [(u, add) for u, add in leaves if u is not skip and facts.interval(stream, ends[u]) & moving]
        branches = [(u, add) for u, add in branches if facts.is_above(stream, ends[u])]
        branches = [(u, add) for u, add in branches if _ends_projected(reading, ends[u], stream)]
        if branches and (best is None or len(branches) > len(best[2])):
            best = (skip, stream, branches)
    best = best or _widened(reading, root, leaves)
    if best is None:
        return None
    skip, stream, branches = best
    sublayers = tuple(Sublayer(u, add, facts.interval(stream, facts.written(add, u)), "", ()) for u, add in branches)
    interval = 0
    for sublayer in sublayers:
        interval |= sublayer.own
    return JoinOp(root, skip, stream, sublayers, interval)


def _widened(reading: Reading, root: Node, leaves: list[tuple[Node, Node]]) -> Leaves | None:
    """Skip, stream and branch where the skip is one projection of what the branch reads, to another size.

    The branch attends, or convolves with a nonlinearity; of two ways the skip is the pointwise one. The former stream
    ends there: one that comes back later goes around a bottleneck.
    """
    facts = reading.facts
    found: list[tuple[bool, Leaves]] = []
    for (skip, _), (value, add) in permutations(leaves, 2):
        end = facts.written(add, value)
        shared = facts.above[facts.position[skip]] & facts.above[facts.position[end]]
        fork = facts.nodes[shared.bit_length() - 1] if shared else skip
        if shapes_match(skip, fork):
            continue
        way, beside = (list(facts.members(facts.interval(fork, to))) for to in (end, skip))
        mixes = any(n in reading.cores or facts.op[n] in CONVOLUTIONS for n in way) and skip not in way
        bends = any(n in reading.cores or facts.op[n] in NONLINEARITIES for n in way)
        straight = not any(facts.op[n] in NONLINEARITIES or n in reading.cores for n in beside)
        once = [reading.weighted[n] for n in beside if n in reading.weighted]
        stream = trunk(reading, fork, {})
        before = facts.members(facts.interval(stream, fork) | facts.bit(stream))
        ends = not any(facts.is_above(root, user) for node in before for user in facts.users[node])
        if mixes and bends and straight and len(once) == 1 and ends and _ends_projected(reading, end, fork):
            found.append((pointwise(once[0]), (skip, stream, [(value, add)])))
    return max(found, key=lambda f: f[0])[1] if found else None


def _without_widened_stages(reading: Reading, found: list[JoinOp]) -> list[JoinOp]:
    """Drop joins of a projected skip whose branch has joins of its own: a stage beside another way is no sublayer."""
    facts = reading.facts
    roots = facts.bits(join.root for join in found)
    return [j for j in found if facts.strip(j.skip, reading.norms) is j.stream or not j.interval & roots]


def _ends_projected(reading: Reading, value: Node, stream: Node) -> bool:
    """Whether a weighted op (or a transform over positions) comes last, before any product of activations.

    Looked for up to the stream: what is only smoothed by a depthwise convolution before it is added is no sublayer.
    """
    facts = reading.facts
    todo, seen = [value], {value, stream}
    while todo:
        node = todo.pop(todo.index(max(todo, key=facts.position.__getitem__)))
        op = facts.op[node]
        weighted = reading.weighted.get(node)
        if (weighted and not weighted.depthwise) or (op in MIXERS and op != "cumsum"):
            return True
        if node in reading.cores or op == "cumsum" or (op in PRODUCTS and weighted is None):
            return False
        fresh = [i for i in facts.flow(node) if i not in seen]
        seen.update(fresh)
        todo.extend(fresh)
    return False


def _without_long_skips(facts: Facts, found: list[JoinOp], moving: int) -> list[JoinOp]:
    """Drop joins that bring an early state back: all their weights belong to other joins.

    These lie on the way, or the state goes into the midst of the last: a router that remembers the layer's before.
    """
    kept = []
    for join in found:
        rest = join.interval
        for other in found:
            on_the_way = join.interval & facts.bit(other.root)
            into_it = other.interval & facts.bit(join.root) and join.interval & facts.bit(other.stream)
            if other is not join and (on_the_way or into_it):
                rest &= ~other.interval
        if rest & moving:
            kept.append(join)
    return kept


def _told_apart(reading: Reading, join: JoinOp, every: list[JoinOp]) -> JoinOp:
    facts = reading.facts
    within = [other for other in every if other is not join and join.interval & facts.bit(other.root)]
    nested = 0
    for other in within:
        nested |= other.interval
    sublayers = []
    for sublayer in join.sublayers:
        own = sublayer.own & ~nested
        cores = tuple(core for node, core in reading.cores.items() if own & facts.bit(node))
        kind = kind_of(reading, join.root, own, cores)
        if kind == "ffn" and _mix(reading, [other for other in within if sublayer.own & facts.bit(other.root)]):
            kind = "mixer"
        sublayers.append(replace(sublayer, own=own, cores=cores, kind=kind))
    return replace(join, sublayers=tuple(_merged(reading, sublayers, join.root)))


def _merged(reading: Reading, sublayers: list[Sublayer], root: Node) -> list[Sublayer]:
    """What is summed before it joins the stream and is one sublayer.

    Such are feed-forwards, routed and shared experts; and a value with what is made of that very value.
    """
    facts = reading.facts
    by_add: dict[Node, list[Sublayer]] = {}
    for sublayer in sublayers:
        by_add.setdefault(sublayer.add, []).append(sublayer)
    merged: list[Sublayer] = []
    for add, group in by_add.items():
        follows = any(a.own & facts.bit(b.value) for a in group for b in group if a is not b)
        if add is root or len(group) < 2 or not (follows or all(s.kind in {"ffn", "moe"} for s in group)):
            merged += group
            continue
        value, consumer = add, facts.users[add][0]
        while facts.op[consumer] != "add":
            value, consumer = consumer, facts.users[consumer][0]
        own = group[0].own | group[1].own | facts.bit(add)
        cores = tuple(dict.fromkeys(core for s in group for core in s.cores))
        merged.append(Sublayer(value, consumer, own, kind_of(reading, root, own, cores), cores))
    return merged


def _mix(reading: Reading, within: list[JoinOp]) -> bool:
    """Whether there are joins inside a branch, and all of them mix without attention."""
    attends = reading.facts.bits(reading.cores)
    return bool(within) and all(
        not join.interval & attends and kind_of(reading, join.root, join.interval, ()) == "mixer" for join in within
    )
