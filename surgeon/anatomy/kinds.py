"""What a sublayer does, told by its own nodes: attention, another mixer of positions, experts or a feed-forward."""

from __future__ import annotations

from torch.fx import Node

from surgeon.anatomy.cores import Core
from surgeon.anatomy.facts import CONVOLUTIONS, PRODUCTS
from surgeon.anatomy.layouts import features_axis
from surgeon.anatomy.reading import Reading
from surgeon.anatomy.shapes import rank, shape
from surgeon.anatomy.weighted import WeightedOp

MIXERS = frozenset({"fft_fftn", "fft_fft", "fft_fft2", "fft_rfft", "avg_pool2d", "avg_pool1d", "cumsum", "scan"})


def kind_of(reading: Reading, root: Node, own: int, cores: tuple[Core, ...]) -> str:
    """`attention`, `mixer`, `moe` or `ffn`: what a branch with these nodes and attention products is, at a join."""
    facts = reading.facts
    nodes = list(facts.members(own))
    if cores:
        return "attention"
    if any(facts.op[n] == "topk" or (n in reading.weighted and reading.weighted[n].expert) for n in nodes):
        return "moe"
    mixing = MIXERS | PRODUCTS | CONVOLUTIONS
    plain = {n for n, w in reading.weighted.items() if facts.op[n] not in CONVOLUTIONS or _pointwise(w)}
    plain |= {n for n in nodes if n in reading.weighted and _smooths(reading, n, own)}
    mixes = any((facts.op[n] in mixing and n not in plain) or _pools(reading, n, root) for n in nodes)
    return "mixer" if mixes else "ffn"


def _pools(reading: Reading, node: Node, root: Node) -> bool:
    """Whether a value sums the same features of the positions of a row: of all, or along one of their axes."""
    facts = reading.facts
    if facts.op[node] not in {"sum", "mean"} or rank(facts.inputs[node][0]) < 3:
        return False
    source, sizes = facts.inputs[node][0], shape(node)
    if len(sizes) > 1 and sizes[0] == shape(root)[0] and all(size == 1 for size in sizes[1:-1]):
        return True
    last = facts.nearest_above(source, reading.weighted)
    axes = {features_axis(facts, reading.weighted[n], source) for n in last}
    summed = node.args[1] if len(node.args) > 1 else None
    along = {int(a) % rank(source) for a in (summed if isinstance(summed, (list, tuple)) else ()) if isinstance(a, int)}
    fits = rank(source) == rank(root) and all(shape(source)[a] == shape(root)[a] for a in along)
    return fits and bool(along and axes) and None not in axes and along.isdisjoint({0} | axes)


def _pointwise(weighted: WeightedOp) -> bool:
    value = weighted.weight.meta["val"]
    return all(int(size) == 1 for size in value.shape[2:])


def _smooths(reading: Reading, node: Node, own: int) -> bool:
    """Whether it is a depthwise convolution behind the last projection of a sublayer."""
    facts = reading.facts
    full = facts.bits(n for n, w in reading.weighted.items() if not w.depthwise) & own
    at = facts.position[node]
    return reading.weighted[node].depthwise and bool(facts.above[at] & full) and not facts.below[at] & full
