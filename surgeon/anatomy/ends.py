"""Eighth step of anatomy: what lies before the first join and behind the last: embeddings and heads."""

from __future__ import annotations

from torch.fx import Node

from surgeon.anatomy.facts import LAYOUTS, NONLINEARITIES, Facts
from surgeon.anatomy.joins import JoinOp
from surgeon.anatomy.probe import integers
from surgeon.anatomy.reading import Reading
from surgeon.anatomy.shapes import rank, shape, width
from surgeon.anatomy.stacks import Stack, stack_below
from surgeon.anatomy.weighted import WeightedOp

FILLS = (1, 5, 7)
"""What a table is indexed by is told by what becomes of inputs that are these everywhere: 1 is a mask that is open."""
SAME_IDS = LAYOUTS | {"clamp", "masked_fill", "slice", "where"}


def embeddings(reading: Reading, chains: list[Stack]) -> dict[Node, str]:
    """Every table lookup of a parameter with its role, in graph order."""
    facts = reading.facts
    found = [n for n in facts.nodes if facts.op[n] == "embedding" and facts.weight(_table(n)) is not None]
    roles = {node: _embedding_role(facts, node) for node in found}
    # Of the tables of one stack that inputs index directly, the largest holds the words.
    direct = {node: stack_below(reading, node, chains) for node in found if roles[node] == "embedding.token"}
    for node, stack in direct.items():
        if any(_rows(other) > _rows(node) for other, home in direct.items() if home is stack):
            roles[node] = "embedding.type"
    return roles


def _table(node: Node) -> Node:
    table = node.args[0]
    assert isinstance(table, Node)
    return table


def index(node: Node) -> Node:
    """The ids that an embedding looks up."""
    ids = node.args[1]
    assert isinstance(ids, Node)
    return ids


def _rows(node: Node) -> int:
    return int(_table(node).meta["val"].shape[0])


def _embedding_role(facts: Facts, node: Node) -> str:
    ids = index(node)
    while facts.op[ids] in SAME_IDS and len(facts.inputs[ids]) == 1:
        ids = facts.inputs[ids][0]
    if ids.op == "placeholder":
        return "embedding.token"
    computed = {fill: v for fill in FILLS if (v := integers(facts, index(node), fill)) is not None}
    own = [v == fill for fill, v in computed.items() if fill > 1]
    if len(own) > 1 and own[0].shape == own[1].shape and (own[0] & own[1]).float().mean() > 0.5:
        return "embedding.token"  # but for what begins a decoder's text
    values = [*computed.values()]
    rows = [v.reshape(-1, v.shape[-1]) for v in values if v.ndim and v.shape[-1] > 1]
    if any(bool((r.diff(dim=-1) == 1).all()) for r in rows):
        return "embedding.position" if rank(index(node)) <= 2 and _rowwise(facts, index(node)) else "embedding.relative"
    if rows and all(bool((r == r.flatten()[0]).all()) for r in rows):
        return "embedding.type"
    if rows:
        return "embedding.relative"
    return _role_without_numbers(facts, node)


def _role_without_numbers(facts: Facts, node: Node) -> str:
    """Where buffers hold no numbers: positions are counted, or a buffer as long as the table has rows."""
    above = facts.sources(index(node))
    buffers = [n for n in above if n.op == "get_attr" and width(n) == _rows(node)]
    counted = any(facts.op[n] in {"arange", "cumsum"} for n in above)
    return "embedding.position" if counted or buffers else "embedding.type"


def _rowwise(facts: Facts, ids: Node) -> bool:
    """One position a token, against one a pair of tokens."""
    sizes = shape(ids)
    return len(sizes) < 2 or sizes[-1] != sizes[-2]


def heads(reading: Reading, joins: list[JoinOp], inside: int) -> dict[WeightedOp, str]:
    """Weighted ops outside the sublayers: behind the last join those of the head, others as they are."""
    facts = reading.facts
    roots = facts.bits(j.root for j in joins)
    roles: dict[WeightedOp, str] = {}
    for node, op in reading.weighted.items():
        if op.static or inside & facts.bit(node):
            continue
        above, below = facts.above[facts.position[node]], facts.below[facts.position[node]]
        if not above & roots or below & roots:
            roles[op] = "other"
        else:
            last = not any(below & facts.bit(n) for n in reading.weighted)
            roles[op] = "head.out" if last and not _pools(facts, op) else "head.dense"
    return roles


def _pools(facts: Facts, op: WeightedOp) -> bool:
    """A square dense with a non-linearity that ends in the outputs: a pooler without classifier."""
    users = [u for u in facts.users[op.output] if u in facts.activations]
    return op.in_features == op.out_features and any(facts.op[u] in NONLINEARITIES for u in users)
