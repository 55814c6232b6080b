"""Attentions that add to no stream: what they answer is the stream from there on."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

from surgeon.anatomy.cores import Core
from surgeon.anatomy.joins import JoinOp, Sublayer, trunk
from surgeon.anatomy.reading import Reading
from surgeon.anatomy.shapes import shape


def replacing(reading: Reading, joins: Sequence[JoinOp]) -> list[JoinOp]:
    """A join without an add for each attention, outside of all branches, that a later join's skip comes from."""
    facts = reading.facts
    roots = {join.root: join for join in joins}
    inside = 0
    for join in joins:
        inside |= join.interval
    free = [core for core in reading.cores.values() if not inside & facts.bit(core.node)]
    found: dict[Node, JoinOp] = {}
    for join in joins:
        answer = trunk(reading, join.skip, roots)
        own = [c for c in free if answer not in roots and facts.is_above(c.mixed, answer)]
        own = [c for c in own if not facts.interval(c.mixed, answer) & facts.bits(roots)]
        if own and answer not in found and not _pooled(answer):
            replaced = _replaced(reading, answer, own, roots, inside)
            found |= {answer: replaced} if replaced else {}
    return list(found.values())


def _pooled(answer: Node) -> bool:
    """Whether it is of one position: a head's, that weighs a text into one."""
    return all(size == 1 for size in shape(answer)[1:-1])


def _replaced(
    reading: Reading, answer: Node, cores: Sequence[Core], roots: dict[Node, JoinOp], inside: int
) -> JoinOp | None:
    """From the stream that all of queries, keys and values come from; from the queries' where joins lie between."""
    facts = reading.facts
    queries = [core.query for core in cores]
    for operands in ([*queries, *(o for core in cores for o in (core.key, core.value))], queries):
        shared = -1
        for operand in operands:
            shared &= facts.above[facts.position[operand]]
        if not shared:
            continue
        fork = facts.nodes[shared.bit_length() - 1]
        before = [root for root in roots if root is fork or facts.is_above(root, fork)]
        last = max(before, key=facts.position.__getitem__, default=None)
        stream = last if operands is queries else trunk(reading, fork, roots)
        own = facts.interval(stream, answer) if stream else 0
        if stream and not own & facts.bits(roots):
            sublayer = Sublayer(answer, answer, own & ~inside, "attention", tuple(cores))
            return JoinOp(answer, last or stream, stream, (sublayer,), own & ~inside)
    return None
