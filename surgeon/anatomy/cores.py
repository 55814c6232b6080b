"""Fourth step of anatomy: attention products, softmax(q kᵀ + mask) v, as one op or spelled out."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from surgeon.anatomy.facts import CASTS, LAYOUTS, PRODUCTS, RESHAPES, Facts
from surgeon.anatomy.shapes import rank, shape, swaps_last
from surgeon.anatomy.weighted import WeightedOp

# `gather` is left out on purpose: behind it lie the position terms of disentangled attention, not its q kᵀ.
POINTWISE = (
    LAYOUTS
    | {"add", "sub", "mul", "div", "tanh", "where", "masked_fill", "dropout", "slice", "clamp", "cat", "softmax"}
    | {"getitem", "max", "maximum"}
)
REPETITIONS = RESHAPES | CASTS | {"expand", "unsqueeze", "slice", "repeat_interleave", "repeat", "expand_as"}


@dataclass(frozen=True, eq=False)
class Core:
    """An attention product and its operands."""

    node: Node
    scores: Node
    mixed: Node
    query: Node
    key: Node
    value: Node
    masks: tuple[Node, ...]
    causal: bool
    heads: int
    kv_heads: int


def cores(facts: Facts, weighted: dict[Node, WeightedOp]) -> dict[Node, Core]:
    """All attention products by node, in graph order."""
    found: dict[Node, Core] = {}
    for node in facts.nodes:
        op = facts.op[node]
        if op == "scaled_dot_product_attention":
            found[node] = _fused(facts, node)
        elif op in {"softmax", "_softmax"} and rank(node) >= 3 and (core := _spelled_out(facts, node, weighted)):
            found[node] = core
    return found


def _fused(facts: Facts, node: Node) -> Core:
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    query, key, value = (given[name] for name in ("query", "key", "value"))
    assert isinstance(query, Node)
    assert isinstance(key, Node)
    assert isinstance(value, Node)
    mask = given.get("attn_mask")
    return Core(
        node=node,
        scores=node,
        mixed=node,
        query=query,
        key=key,
        value=value,
        masks=(mask,) if isinstance(mask, Node) else (),
        causal=bool(given.get("is_causal", False)),
        heads=_heads(facts, query),
        kv_heads=_kv_heads(facts, value),
    )


def _spelled_out(facts: Facts, softmax: Node, weighted: dict[Node, WeightedOp]) -> Core | None:
    mixed = _mixed(facts, softmax, weighted)
    if mixed is None:
        return None
    value = next(a for a in mixed.args[-2:] if isinstance(a, Node) and not _reaches(facts, softmax, a))
    scores = _scores(facts, softmax, weighted, value)
    if scores is None:
        return None
    operands = [a for a in scores.args if isinstance(a, Node)]
    query, transposed_key = operands[1:3] if facts.op[scores] == "baddbmm" else operands[:2]
    return Core(
        node=softmax,
        scores=scores,
        mixed=mixed,
        query=query,
        key=_untransposed(facts, transposed_key),
        value=value,
        masks=tuple(_other_terms(facts, scores, softmax)),
        causal=False,
        heads=_heads(facts, query),
        kv_heads=_kv_heads(facts, value),
    )


def _reaches(facts: Facts, node: Node, other: Node) -> bool:
    return node is other or facts.is_above(node, other)


def _scores(facts: Facts, softmax: Node, weighted: dict[Node, WeightedOp], value: Node) -> Node | None:
    """The product of two activations behind the softmax; of several the first whose keys are of the values' stream."""
    todo, seen, found = facts.flow(softmax), set(facts.flow(softmax)), []
    while todo:
        node = todo.pop()
        if facts.op[node] in PRODUCTS:
            if node not in weighted and len(_factors(facts, node)) == 2:
                found.append(node)
        elif facts.op[node] in POINTWISE:
            todo.extend(i for i in facts.flow(node) if i not in seen)
            seen.update(facts.flow(node))
    if len(found) > 1:
        stream = _projected(facts, value, weighted)
        found = [n for n in found if _projected(facts, _factors(facts, n)[1], weighted) == stream] or found
    return min(found, key=facts.position.__getitem__, default=None)


def _projected(facts: Facts, operand: Node, weighted: dict[Node, WeightedOp]) -> set[Node]:
    """What the projections read that an operand of an attention product comes from."""
    return {facts.strip(weighted[n].input) for n in facts.nearest_above(operand, weighted)}


def _factors(facts: Facts, product: Node) -> list[Node]:
    operands = [a for a in product.args if isinstance(a, Node)]
    return [a for a in operands[-2:] if a in facts.activations]


def _mixed(facts: Facts, softmax: Node, weighted: dict[Node, WeightedOp]) -> Node | None:
    """The first product that the probabilities meet."""
    todo, seen = [softmax], {softmax}
    while todo:
        node = todo.pop(0)
        for user in facts.users[node]:
            if facts.op[user] in PRODUCTS and user not in weighted and len(set(_factors(facts, user))) == 2:
                return user
            if facts.op[user] in POINTWISE and user not in seen:
                seen.add(user)
                todo.append(user)
    return None


def _other_terms(facts: Facts, scores: Node, softmax: Node) -> list[Node]:
    """What else meets the scores on their way to the softmax: masks and position biases."""
    way = facts.interval(scores, softmax) | facts.bit(scores)
    return [i for n in facts.members(way) if n is not scores for i in facts.inputs[n] if not way & facts.bit(i)]


def _untransposed(facts: Facts, node: Node) -> Node:
    """The key under the last transpose of the product's right operand, or the operand where there is none."""
    below = node
    while facts.op[below] in CASTS | {"mul", "div"} and len(facts.flow(below)) == 1:
        below = facts.flow(below)[0]
    return facts.flow(below)[0] if facts.op[below] in {"transpose", "permute"} and swaps_last(below) else node


def _heads(facts: Facts, query: Node) -> int:
    """Heads of `[B, heads, S, d]`, also where they were folded into the batch since, or were there from the start."""
    node = query
    while rank(node) < 4 and facts.flow(node):
        below, node = node, facts.flow(node)[0]
        wide, one = shape(node)[-1], shape(below)[-1]
        if rank(node) == rank(below) == 3 and facts.op[below] in RESHAPES and wide != one:
            return wide // one if isinstance(wide, int) and isinstance(one, int) and wide % one == 0 else 1
    size = shape(node)[1] if rank(node) >= 4 else 1
    return size if isinstance(size, int) else 1


def _kv_heads(facts: Facts, value: Node) -> int:
    """Heads before their repetition for grouped queries."""
    node, found = value, shape(value)[1] if rank(value) == 4 else None
    while facts.op[node] in REPETITIONS and facts.flow(node):
        node = facts.flow(node)[0]
        if rank(node) == 4 and isinstance(shape(node)[1], int):
            found = shape(node)[1]
    return found if isinstance(found, int) else _heads(facts, value)
