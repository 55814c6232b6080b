"""What a sublayer does, told by its own nodes: attention, another mixer of positions, experts or a feed-forward."""

from __future__ import annotations

from torch.fx import Node

from surgeon.anatomy.cores import Core
from surgeon.anatomy.facts import CONVOLUTIONS, PRODUCTS, Facts
from surgeon.anatomy.layouts import features_axis
from surgeon.anatomy.reading import Reading
from surgeon.anatomy.shapes import rank, shape
from surgeon.anatomy.weighted import WeightedOp

MIXERS = frozenset({"fft_fftn", "fft_fft", "fft_fft2", "fft_rfft", "cumsum", "scan"}) | {
    f"{adaptive}avg_pool{n}d" for adaptive in ("", "adaptive_") for n in (1, 2)
}


def kind_of(reading: Reading, root: Node, own: int, cores: tuple[Core, ...]) -> str:
    """`attention`, `mixer`, `moe` or `ffn`: what a branch with these nodes and attention products is, at a join."""
    facts = reading.facts
    nodes = list(facts.members(own))
    if cores:
        return "attention"
    if any(facts.op[n] == "topk" or (n in reading.weighted and reading.weighted[n].expert) for n in nodes):
        return "moe"
    mixing = MIXERS | PRODUCTS | CONVOLUTIONS
    plain = {n for n, w in reading.weighted.items() if facts.op[n] not in CONVOLUTIONS or pointwise(w)}
    plain |= {n for n in nodes if n in reading.weighted and _smooths(reading, n, own)}
    mixes = any(facts.op[n] in mixing and n not in plain for n in nodes) or _pools(reading, root, nodes)
    return "mixer" if mixes else "ffn"


def _pools(reading: Reading, root: Node, own: list[Node]) -> bool:
    """Whether features that a branch projects are summed over positions: all of them, or along one of their axes."""
    facts = reading.facts
    sums = [n for n in own if facts.op[n] in {"sum", "mean"} and (along := _along(facts, n)) and 0 not in along]
    sums = [n for n in sums if _fits(facts, n, root)]
    if not sums:
        return False
    inside = set(own)
    outside = {i for n in own for i in facts.flow(n) if i not in inside}
    projected = {n for n in own if n in reading.weighted}
    for node in sums:
        source = facts.inputs[node][0]
        last = facts.nearest_above(source, projected, outside)
        axes = {features_axis(facts, reading.weighted[n], source) for n in last}
        if axes and None not in axes and axes.isdisjoint(_along(facts, node)):
            return True
    return False


def _along(facts: Facts, node: Node) -> set[int]:
    """The axes that a `sum` or a `mean` takes away; none where it takes all."""
    axes = node.args[1] if len(node.args) > 1 else None
    n = rank(facts.inputs[node][0])
    return {a % n for a in (axes if isinstance(axes, (list, tuple)) else ()) if isinstance(a, int) and n > 2}


def _fits(facts: Facts, node: Node, root: Node) -> bool:
    """Whether a sum may be one over positions: all between the batch and the features, or an axis of the stream's."""
    source, sizes = shape(facts.inputs[node][0]), shape(node)
    whole = len(sizes) > 1 and sizes[0] == shape(root)[0] and all(size == 1 for size in sizes[1:-1])
    return whole or (len(source) == rank(root) and all(source[a] == shape(root)[a] for a in _along(facts, node)))


def pointwise(weighted: WeightedOp) -> bool:
    """Whether a product works on every position alone."""
    value = weighted.weight.meta["val"]
    return all(int(size) == 1 for size in value.shape[2:])


def _smooths(reading: Reading, node: Node, own: int) -> bool:
    """Whether it is a depthwise convolution behind the last projection of a sublayer."""
    facts = reading.facts
    full = facts.bits(n for n, w in reading.weighted.items() if not w.depthwise) & own
    at = facts.position[node]
    return reading.weighted[node].depthwise and bool(facts.above[at] & full) and not facts.below[at] & full
