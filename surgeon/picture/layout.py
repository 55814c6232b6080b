"""Places the boxes of a scene: rows by longest path, order by fewest crossings, columns by least squares.

An edge over several rows runs down a lane that no box stands in. Everything is computed in a fixed order from fixed
starting points: the same scene gives the same picture.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import networkx as nx

Edge = tuple[str, str]
Span = tuple[float, float]

GAP = 22.0
LANE = 10.0
SWEEPS = 2000
STILL = 0.002


@dataclass(frozen=True)
class Placed:
    """Centres of the boxes, the lane of every edge over several rows, and the width of it all; the left end is 0."""

    x: Mapping[str, float]
    lanes: Mapping[Edge, float]
    width: float


def rows(edges: Iterable[Edge]) -> dict[str, int]:
    """The row of every box: one below the lowest of those that flow into it."""
    return {name: row for row, names in enumerate(nx.topological_generations(nx.DiGraph(edges))) for name in names}


def place(row: Mapping[str, int], wide: Mapping[str, float], weights: Mapping[Edge, float]) -> Placed:
    """Columns for the boxes in `row`, each as wide as `wide` says. The heavier an edge, the straighter it is;
    one of weight 0 pulls nothing, and has its lane on the left.
    """
    order = _ordered(row, weights)
    x = _columns(order, wide, weights)
    lanes: dict[Edge, float] = {}
    for edge in sorted(weights, key=lambda edge: (row[edge[1]] - row[edge[0]], edge)):
        between = range(row[edge[0]] + 1, row[edge[1]])
        if between:
            boxes = [(x[n] - wide[n] / 2 - GAP / 2, x[n] + wide[n] / 2 + GAP / 2) for r in between for n in order[r]]
            taken = [
                (lane - LANE, lane + LANE)
                for (a, b), lane in lanes.items()
                if row[a] <= row[edge[1]] and row[edge[0]] <= row[b]
            ]
            if weights[edge]:
                lanes[edge] = _lane([*boxes, *taken], x[edge[0]])
            else:
                outside = min([*(low for low, _ in boxes), *(x[name] for name in edge)])
                lanes[edge] = _lane([(outside, math.inf), *taken], outside)
    low = min([*(x[n] - wide[n] / 2 for n in x), *lanes.values()])
    high = max([*(x[n] + wide[n] / 2 for n in x), *lanes.values()])
    return Placed({n: at - low for n, at in x.items()}, {edge: at - low for edge, at in lanes.items()}, high - low)


def _lane(blocked: Sequence[Span], wish: float) -> float:
    """The free place nearest to `wish`."""
    places = [wish, *(end for span in blocked for end in span if math.isfinite(end))]
    free = [at for at in places if not any(low < at < high for low, high in blocked)]
    return min(free, key=lambda at: (round(abs(at - wish), 3), -at))


def _ordered(row: Mapping[str, int], edges: Iterable[Edge]) -> list[list[str]]:
    """The boxes of each row from left to right: the order with the fewest crossings that sweeping finds.

    Long edges take part as one point in each row that they pass.
    """
    links = nx.DiGraph()
    level: dict[str, int] = dict(row)
    for a, b in edges:
        points = [a, *(f"{a}>{b}@{r}" for r in range(row[a] + 1, row[b])), b]
        level |= {point: row[a] + step for step, point in enumerate(points)}
        links.add_edges_from(pairwise(points))
    lines: list[list[str]] = [[] for _ in range(max(level.values()) + 1)]
    for name, r in level.items():
        lines[r].append(name)
    best, fewest = [list(line) for line in lines], _crossings(links, lines)
    for sweep in range(24):
        _sweep(lines, links.predecessors if sweep % 2 == 0 else links.successors, downwards=sweep % 2 == 0)
        crossings = _crossings(links, lines)
        if crossings < fewest:
            best, fewest = [list(line) for line in lines], crossings
    return [[name for name in line if name in row] for line in best]


def _sweep(lines: list[list[str]], near: nx.classes.reportviews.DiDegreeView, *, downwards: bool) -> None:
    """Order each row by where the neighbours in the row before it stand."""
    place_of = {name: i for line in lines for i, name in enumerate(line)}
    for line in lines if downwards else reversed(lines):
        middle = {}
        for name in line:
            beside = [place_of[other] for other in near(name)]
            middle[name] = sum(beside) / len(beside) if beside else place_of[name]
        line.sort(key=middle.__getitem__)
        place_of |= {name: i for i, name in enumerate(line)}


def _crossings(links: nx.DiGraph, lines: Sequence[Sequence[str]]) -> int:
    count = 0
    for upper, lower in pairwise(lines):
        at = {name: i for i, name in enumerate(lower)}
        ends = [(i, at[below]) for i, name in enumerate(upper) for below in links.successors(name)]
        count += sum(a < c and b > d for a, b in ends for c, d in ends)
    return count


def _columns(
    order: Sequence[Sequence[str]], wide: Mapping[str, float], weights: Mapping[Edge, float]
) -> dict[str, float]:
    """Every box as near to the weighted mean of its neighbours as its row allows, row by row until it is still."""
    near: dict[str, list[tuple[str, float]]] = {name: [] for line in order for name in line}
    for (a, b), weight in weights.items():
        near[a].append((b, weight))
        near[b].append((a, weight))
    x: dict[str, float] = {}
    for line in order:
        x |= _spread(line, [0.0] * len(line), [1.0] * len(line), wide)
    for sweep in range(SWEEPS):
        before = dict(x)
        for line in order if sweep % 2 == 0 else reversed(order):
            totals = [sum(weight for _, weight in near[name]) for name in line]
            wishes = [
                sum(x[other] * weight for other, weight in near[name]) / total if total else x[name]
                for name, total in zip(line, totals, strict=True)
            ]
            x |= _spread(line, wishes, [total or 1.0 for total in totals], wide)
        if max(abs(x[name] - before[name]) for name in x) < STILL:
            break
    return x


def _spread(
    line: Sequence[str], wishes: Sequence[float], weights: Sequence[float], wide: Mapping[str, float]
) -> dict[str, float]:
    """The positions nearest to `wishes` in weighted least squares that keep the order and do not overlap.

    With each position's own least distance from the first taken off, they must only not fall: neighbours that would
    are pooled at their mean until none does.
    """
    offsets = [0.0] if line else []
    for a, b in pairwise(line):
        offsets.append(offsets[-1] + (wide[a] + wide[b]) / 2 + GAP)
    pools: list[tuple[float, float, int]] = []
    for wish, weight, offset in zip(wishes, weights, offsets, strict=True):
        mean, total, count = wish - offset, weight, 1
        while pools and pools[-1][0] > mean:
            other, heavy, many = pools.pop()
            mean, total, count = (mean * total + other * heavy) / (total + heavy), total + heavy, count + many
        pools.append((mean, total, count))
    flat = [mean for mean, _, count in pools for _ in range(count)]
    return {name: at + offset for name, at, offset in zip(line, flat, offsets, strict=True)}
