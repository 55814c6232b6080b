"""Attentions that add to no stream: what they answer is the stream from there on."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

from surgeon.anatomy.cores import Core
from surgeon.anatomy.joins import JoinOp, Sublayer, trunk
from surgeon.anatomy.reading import Reading


def replacing(reading: Reading, joins: Sequence[JoinOp]) -> list[JoinOp]:
    """A join without an add for each attention, outside of all branches, that a later join's skip comes from."""
    facts = reading.facts
    roots = {join.root: join for join in joins}
    inside = 0
    for join in joins:
        inside |= join.interval
    free = [core for core in reading.cores.values() if not inside & facts.bit(core.node) and _attends(reading, core)]
    found: dict[Node, JoinOp] = {}
    for join in joins:
        answer = trunk(reading, join.skip, roots)
        own = [c for c in free if answer not in roots and facts.is_above(c.mixed, answer)]
        own = [c for c in own if not facts.interval(c.mixed, answer) & facts.bits(roots)]
        if own and answer not in found:
            found[answer] = _replaced(reading, answer, own, roots)
    return list(found.values())


def _attends(reading: Reading, core: Core) -> bool:
    """Whether it goes from a stream to itself: not by queries of its own, as where a text is pooled."""
    return bool(_shared(reading, [core]))


def _shared(reading: Reading, cores: Sequence[Core]) -> int:
    above = reading.facts.above
    shared = -1
    for core in cores:
        for operand in (core.query, core.key, core.value):
            shared &= above[reading.facts.position[operand]]
    return shared


def _replaced(reading: Reading, answer: Node, cores: Sequence[Core], roots: dict[Node, JoinOp]) -> JoinOp:
    facts = reading.facts
    shared = _shared(reading, cores)
    stream = trunk(reading, facts.nodes[shared.bit_length() - 1], roots)
    before = [root for root in roots if facts.is_above(root, stream) or root is stream]
    own = facts.interval(stream, answer)
    return JoinOp(
        root=answer,
        skip=max(before, key=facts.position.__getitem__, default=stream),
        stream=stream,
        sublayers=(Sublayer(answer, answer, own, "attention", tuple(cores)),),
        interval=own,
    )
