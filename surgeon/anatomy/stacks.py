"""Sixth step of anatomy: stacks and layers.

A stack is a chain of joins, each one's skip being the last one's result.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise

from torch.fx import Node

from surgeon.anatomy.cores import Core
from surgeon.anatomy.facts import LAYOUTS, Facts
from surgeon.anatomy.joins import JoinOp, Sublayer, previous
from surgeon.anatomy.reading import Reading


@dataclass(eq=False)
class Stack:
    """A chain of joins with its name and the layer of each join."""

    joins: list[JoinOp]
    name: str = ""
    layers: list[int | None] = field(default_factory=list)
    """None for a join in front of the first layer, of a stem."""

    @property
    def depth(self) -> int:
        """Number of layers."""
        return max((layer for layer in self.layers if layer is not None), default=-1) + 1


@dataclass(frozen=True, eq=False)
class Place:
    """Where a sublayer stands."""

    stack: Stack
    join: JoinOp
    sublayer: Sublayer
    layer: int | None
    kind: str
    """The sublayer's kind, with `cross_attention` told from `attention`."""


def stacks(reading: Reading, joins: list[JoinOp]) -> list[Stack]:
    """Chains of joins with layers numbered by call order; names come with `places`."""
    roots = {join.root: join for join in joins}
    chains: list[Stack] = []
    home: dict[JoinOp, Stack] = {}
    for join in joins:
        before = previous(reading, join, roots)
        if before is None or before not in home:
            chains.append(Stack([]))
        chain = chains[-1] if before is None or before not in home else home[before]
        chain.joins.append(join)
        home[join] = chain
    return chains


def places(reading: Reading, chains: list[Stack]) -> tuple[list[Place], list[str]]:
    """Every sublayer with its stack, layer and kind, in graph order; and notes on what was ambiguous."""
    notes = []
    all_of = [(chain, s) for chain in chains for j in chain.joins for s in j.sublayers]
    sources = {s: _sources(reading, s, chain, chains) for chain, s in all_of}
    kinds = {s: "cross_attention" if sources[s] and chain not in sources[s] else s.kind for chain, s in all_of}
    reads = {chain for chain, s in all_of if sources[s] - {chain, None}}
    nested = _nested(reading.facts, chains)
    free = [chain for chain in chains if chain not in nested]
    for chain in free:
        chain.layers, note = _layers(reading, chain, kinds)
        notes += note
    _name(reading.facts, free, reads)
    for chain, (outer, join) in nested.items():
        chain.name, chain.layers = outer.name, [outer.layers[outer.joins.index(join)]] * len(chain.joins)
    found = [
        Place(chain, join, sublayer, layer, kinds[sublayer])
        for chain in chains
        for join, layer in zip(chain.joins, chain.layers, strict=True)
        for sublayer in join.sublayers
    ]
    return sorted(found, key=lambda p: reading.facts.position[p.join.root]), notes


def _nested(facts: Facts, chains: list[Stack]) -> dict[Stack, tuple[Stack, JoinOp]]:
    """Chains that run inside one sublayer, between a bottleneck's ends: they belong to the layer of its join."""
    found: dict[Stack, tuple[Stack, JoinOp]] = {}
    for chain in chains:
        roots = facts.bits(j.root for j in chain.joins)
        around = [(outer, j) for outer in chains if outer is not chain for j in outer.joins if roots & ~j.interval == 0]
        if around:
            found[chain] = min(around, key=lambda pair: pair[1].interval.bit_count())
    # One inside a nested one belongs to the outermost.
    return {chain: next(o for o in _outwards(found, chain) if o[0] not in found) for chain in found}


def _outwards(found: dict[Stack, tuple[Stack, JoinOp]], chain: Stack) -> Iterator[tuple[Stack, JoinOp]]:
    while chain in found:
        yield found[chain]
        chain = found[chain][0]


def stack_above(reading: Reading, node: Node, chains: list[Stack]) -> Stack | None:
    """The stack of the last join above a value."""
    above = reading.facts.above[reading.facts.position[node]]
    return _latest(reading.facts, above, chains)


def stack_below(reading: Reading, node: Node, chains: list[Stack]) -> Stack | None:
    """The stack of the first join below a value."""
    facts = reading.facts
    below = facts.below[facts.position[node]]
    found = [(facts.position[j.root], chain) for chain in chains for j in chain.joins if below & facts.bit(j.root)]
    return min(found, key=lambda f: f[0])[1] if found else None


def _latest(facts: Facts, nodes: int, chains: list[Stack]) -> Stack | None:
    found = [(facts.position[j.root], chain) for chain in chains for j in chain.joins if nodes & facts.bit(j.root)]
    return max(found, key=lambda f: f[0])[1] if found else None


def _sources(reading: Reading, sublayer: Sublayer, chain: Stack, chains: list[Stack]) -> set[Stack | None]:
    """The stacks that an attention's keys come from: its own, where they are projected in it; None for no stack."""
    facts = reading.facts
    operands = [facts.written(core.scores, core.key) for core in sublayer.cores]
    keys = [op for operand in operands for op in facts.nearest_above(operand, reading.weighted)]
    return {chain if sublayer.own & facts.bit(op) else stack_above(reading, op, chains) for op in keys}


def _layers(reading: Reading, chain: Stack, kinds: dict[Sublayer, str]) -> tuple[list[int | None], list[str]]:
    """Cut a chain by the modules' own numbers where these are sound, else at each mixing after a feed-forward.

    Mixers of no number in front of numbered layers are a stem's, as convolutions that give a sound its positions.
    """
    inside = [_module_indices(join.root) for join in chain.joins]
    indices = [found[0] if found else None for found in inside]
    front = next((at for at, index in enumerate(indices) if index is not None), 0)
    if front and all(kinds[s] == "mixer" for join in chain.joins[:front] for s in join.sublayers):
        layers, notes = _layers(reading, Stack(chain.joins[front:]), kinds)
        return [None] * front + layers, notes
    by_structure = _by_structure(chain, kinds)
    fed = [any(kinds[s] in {"ffn", "moe"} for s in join.sublayers) for join in chain.joins]
    mixes = [any(kinds[s] in {"attention", "mixer"} for s in join.sublayers) for join in chain.joins]
    numbers = [i for i in indices if i is not None]
    sound = len(numbers) == len(indices) and numbers == sorted(numbers) and not _weights_recur(reading, chain, numbers)
    if not sound or (len(set(numbers)) == 1 and max(by_structure) > 0):
        return [*by_structure], []
    if _of_stages(inside, fed):
        front = next((at for at, join in enumerate(chain.joins) if join.adds and not fed[at]), 0)
        front = front if front and numbers[front - 1] != numbers[front] else 0  # what ends the stage before
        return [*[None] * front, *_by_structure(Stack(chain.joins[front:]), kinds)], []
    if len(set(numbers)) == 1 and _mix_again(inside, mixes):
        numbers = [own[1] for own in inside]
    order = sorted(set(numbers))
    by_module = [order.index(i) for i in numbers]
    note = f"layers: {len(order)} by module, {max(by_structure) + 1} by structure; taken by module"
    return [*by_module], [note] if by_module != by_structure else []


def _by_structure(chain: Stack, kinds: dict[Sublayer, str]) -> list[int]:
    """A layer begins at a mixing that follows a feed-forward; where there are none, at every mixing."""
    layer, layers = 0, []
    fed = feedless = not any(kinds[s] in {"ffn", "moe"} for join in chain.joins for s in join.sublayers)
    for at, join in enumerate(chain.joins):
        mixes = any(kinds[s] in {"attention", "mixer"} for s in join.sublayers)
        if mixes and fed and at:
            layer, fed = layer + 1, feedless
        fed = fed or any(kinds[s] in {"ffn", "moe"} for s in join.sublayers)
        layers.append(layer)
    return layers


def _of_stages(numbers: Sequence[tuple[int, ...]], fed: Sequence[bool]) -> bool:
    """Whether a module's number is a stage's: what is in it is numbered again, and feeds forward after a mixing twice.

    `numbers` are the modules' around every join, and `fed` whether it is a feed-forward's.
    """
    for _, group in groupby(zip(numbers, fed, strict=True), lambda join: join[0][0]):
        joins = list(group)
        layers = sum(now and not before for (_, before), (_, now) in pairwise(joins))
        if layers > 1 and all(len(inside) > 1 for inside, _ in joins):
            return True
    return False


def _mix_again(numbers: Sequence[tuple[int, ...]], mixes: Sequence[bool]) -> bool:
    """Whether modules of one number hold numbered ones, several of which mix: a stage's layers."""
    mixing = {inside[1] for inside, mixing in zip(numbers, mixes, strict=True) if mixing and len(inside) > 1}
    return len(mixing) > 1 and all(len(inside) > 1 for inside in numbers)


def _module_indices(node: Node) -> tuple[int, ...]:
    """The numbers in the path of the module that computes a value, from the outermost."""
    stack = node.meta.get("nn_module_stack") or {}
    path = list(stack.values())[-1][0] if stack else ""
    return tuple(int(number) for number in re.findall(r"(?:^|\.)(\d+)(?=\.|$)", path))


def _weights_recur(reading: Reading, chain: Stack, numbers: list[int]) -> bool:
    """Whether one module number covers two calls of one weight: layers that share their weights."""
    seen: set[tuple[int, str]] = set()
    for join, number in zip(chain.joins, numbers, strict=True):
        nodes = {n for s in join.sublayers for n in reading.facts.members(s.own)}
        for key in {(number, str(w.weight.target)) for n, w in reading.weighted.items() if n in nodes}:
            if key in seen:
                return True
            seen.add(key)
    return False


def _name(facts: Facts, chains: list[Stack], reads: set[Stack]) -> None:
    """The stack that attends to another, also beside itself, is the decoder, the one that it `reads` the encoder.

    A lone one goes by its mask.
    """
    if not chains:
        return
    deep = [c for c in chains if c in reads]
    main = max(chains, key=lambda c: len(c.joins))
    if deep:
        names = {deep[0]: "decoder"}
        rest = [c for c in chains if c is not deep[0]]
        if rest:
            names[max(rest, key=lambda c: len(c.joins))] = "encoder"
    else:
        names = {main: "decoder" if is_causal(facts, main) else "encoder"}
    for number, chain in enumerate(chains):
        chain.name = names.get(chain, f"stack{number}")


def is_causal(facts: Facts, chain: Stack) -> bool:
    """Whether some attention of the stack masks by a triangle."""
    return any(_masks_triangle(facts, c) for j in chain.joins for s in j.sublayers for c in s.cores)


def _masks_triangle(facts: Facts, core: Core) -> bool:
    """`is_causal`, or a mask computed by tril or triu, by comparing two ranges, or read from a triangular buffer."""
    if core.causal:
        return True
    todo, seen = list(core.masks), set(core.masks)
    while todo:
        node = todo.pop()
        if _is_triangle(facts, node):
            return True
        fresh = [i for i in facts.inputs[node] if i not in seen and i not in facts.activations]
        seen.update(fresh)
        todo.extend(fresh)
    return False


def _is_triangle(facts: Facts, node: Node) -> bool:
    op = facts.op[node]
    if op in {"tril", "triu"}:
        return True
    if op in {"le", "lt", "ge", "gt"}:
        return len(facts.inputs[node]) == 2 and all(_is_range(facts, i) for i in facts.inputs[node])
    if node.op == "get_attr" and not facts.parameters[node]:
        tensor = facts.tensor(node)
        square = tensor.ndim >= 2 and tensor.shape[-1] == tensor.shape[-2] > 1 and not tensor.is_meta
        return square and bool((tensor.tril() == tensor).all()) and not bool((tensor.triu() == tensor).all())
    return False


def _is_range(facts: Facts, node: Node) -> bool:
    while facts.op[node] in LAYOUTS | {"add", "slice"} and len(facts.inputs[node]) == 1:
        node = facts.inputs[node][0]
    return facts.op[node] == "arange"
