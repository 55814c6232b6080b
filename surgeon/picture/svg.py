"""Draws a scene as SVG: before surgery on the left, after it on the right, the base's boxes in the same rows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from surgeon.picture.boxes import Box, Line
from surgeon.picture.layout import Edge, Placed, place, rows
from surgeon.picture.scene import Scene

FONT = "ui-sans-serif, system-ui, 'Segoe UI', 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"
INK, FAINT, GREY, PAPER, PLAIN = "#1f2328", "#59636e", "#8c959f", "#ffffff", "#f3f4f6"
COLOURS = [
    ("#ffe8d1", "#c2570c"),
    ("#dbeafe", "#2563a8"),
    ("#dcf5e3", "#23804a"),
    ("#eee2fb", "#7440b8"),
    ("#fde2ec", "#b3346c"),
    ("#d8f3f3", "#0f7b80"),
]
"""Fill and line of each technique, in the order the spec applies them."""

BOLD, TEXT = 7.3, 6.4
"""Widths of a character, estimated on the safe side: the reader's font is not known here."""

LEADING, PAD, ROUND = 15.0, 9.0, 22.0
ROW_GAP, MARGIN, BETWEEN, HEAD = 25.0, 24.0, 44.0, 68.0

Point = tuple[float, float]


@dataclass(frozen=True)
class Rows:
    """Top and foot of each row of the picture."""

    tops: tuple[float, ...]
    feet: tuple[float, ...]

    def middle(self, row: int) -> float:
        """Where the boxes of a row are centred."""
        return (self.tops[row] + self.feet[row]) / 2


@dataclass(frozen=True)
class Side:
    """One of the two panels: its boxes as it shows them, its edges, and where they are."""

    caption: str
    boxes: Mapping[str, Box]
    edges: Sequence[Edge]
    placed: Placed

    @property
    def width(self) -> float:
        """With room for its caption."""
        return max(self.placed.width, 150.0)


def draw(scene: Scene) -> str:
    """The whole picture."""
    row = rows([*scene.after, *scene.before])
    grid = _grid(scene, row)
    sides = (_side(scene, row, "before"), _side(scene, row, "after"))
    foot = grid.feet[-1]
    width = 2 * MARGIN + BETWEEN + sum(side.width for side in sides)
    height = foot + 20 * (len(scene.techniques) + 1) + 30
    middle = MARGIN + sides[0].width + BETWEEN / 2
    title = f"{scene.title}, before and after surgery"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" role="img" font-family="{FONT}">',
        f"<title>{escape(title)}</title>",
        f"<defs>{''.join(map(_marker, [GREY, *(line for _, line in COLOURS[: len(scene.techniques)])]))}</defs>",
        f'<rect width="{width:.0f}" height="{height:.0f}" rx="10" fill="{PAPER}"/>',
        label((MARGIN, 30), scene.title, size=15, weight=600, anchor="start"),
        f'<path d="M{middle:.1f} 44V{foot:.1f}" stroke="#d1d9e0" stroke-dasharray="3 4"/>',
        *_panel(scene, sides[0], row, grid, MARGIN),
        *_panel(scene, sides[1], row, grid, MARGIN + sides[0].width + BETWEEN),
        *_legend(scene, foot + 22),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _grid(scene: Scene, row: Mapping[str, int]) -> Rows:
    """Every row as tall as its tallest box."""
    tall = [0.0] * (max(row.values()) + 1)
    for name, r in row.items():
        tall[r] = max(tall[r], _height(scene.boxes[name]))
    tops = [HEAD + sum(tall[:r]) + ROW_GAP * r for r in range(len(tall))]
    return Rows(tuple(tops), tuple(top + height for top, height in zip(tops, tall, strict=True)))


def _side(scene: Scene, row: Mapping[str, int], caption: str) -> Side:
    after = caption == "after"
    edges = scene.after if after else scene.before
    names = {name for edge in edges for name in edge}
    boxes = {name: box if after else box.bare() for name, box in scene.boxes.items() if name in names}
    widths = {name: _width(box) for name, box in boxes.items()}
    return Side(caption, boxes, edges, place({n: row[n] for n in boxes}, widths, _weights(scene, boxes, edges)))


def _weights(scene: Scene, boxes: Mapping[str, Box], edges: Sequence[Edge]) -> dict[Edge, float]:
    """How straight each edge should be: the base's own flow most, what was inserted hangs beside it, skips go round."""
    main = {name for name, box in boxes.items() if box.technique is None}
    main |= {a for a, b in edges if b in main}  # what stands for a value of the base
    flow = [edge for edge in edges if main.issuperset(edge) and edge not in scene.skips]
    into = Counter(b for _, b in flow)
    return {edge: 0.0 if edge in scene.skips else 12 / into[edge[1]] if edge in flow else 1.0 for edge in edges}


def _panel(scene: Scene, side: Side, row: Mapping[str, int], grid: Rows, left: float) -> Iterator[str]:
    yield label((left + side.width / 2, 54), side.caption, size=13, colour=FAINT)
    left += (side.width - side.placed.width) / 2
    at = {name: (left + x, grid.middle(row[name])) for name, x in side.placed.x.items()}
    for edge in side.edges:
        source, target = (side.boxes[name] for name in edge)
        _, colour = _colours(scene, target.technique or source.technique)
        begin = (at[edge[0]][0], at[edge[0]][1] + _height(source) / 2)
        end = (at[edge[1]][0], at[edge[1]][1] - _height(target) / 2)
        if edge in side.placed.lanes:
            lane = left + side.placed.lanes[edge]
            between = [x for name, (x, _) in at.items() if row[name] == row[edge[1]] and lane < x < end[0]]
            aside = target.round and not between and abs(lane - end[0]) > 1.4 * ROUND
            way = _bend(begin, (lane, grid.tops[row[edge[0]] + 1]))
            way += _sideways(lane, at[edge[1]]) if aside else _down((lane, grid.feet[row[edge[1]] - 1]), end)
        else:
            way = _bend(begin, end)
        yield (
            f'<path d="M{_point(begin)}{way}" fill="none" stroke="{colour}" stroke-width="1.4" '
            f'marker-end="url(#{_name(colour)})"/>'
        )
    for name, box in side.boxes.items():
        yield _box(scene, box, *at[name])


def _sideways(lane: float, target: Point) -> str:
    """Down a lane, round a corner, and into a round box from its side."""
    (x, y), side = target, math.copysign(1, target[0] - lane)
    return f"V{y - 9:.1f}Q{lane:.1f} {y:.1f} {lane + 9 * side:.1f} {y:.1f}H{x - ROUND / 2 * side:.1f}"


def _down(foot: Point, end: Point) -> str:
    """Down a lane to its foot, and from there to the top of a box."""
    return f"V{foot[1]:.1f}{_bend(foot, end)}"


def _bend(begin: Point, end: Point) -> str:
    """From one point to another, leaving and arriving vertically."""
    (x, y), (to, foot) = begin, end
    if abs(x - to) < 1:
        return f"L{_point(end)}"
    half = (y + foot) / 2
    return f"C{x:.1f} {half:.1f} {to:.1f} {half:.1f} {_point(end)}"


def _point(point: Point) -> str:
    return f"{point[0]:.1f} {point[1]:.1f}"


def _name(colour: str) -> str:
    return f"to{colour.removeprefix('#')}"


def _marker(colour: str) -> str:
    return (
        f'<marker id="{_name(colour)}" viewBox="0 0 7 7" refX="6.5" refY="3.5" markerWidth="7" markerHeight="7" '
        f'markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0L7 3.5L0 7z" fill="{colour}"/></marker>'
    )


def _width(box: Box) -> float:
    if box.round:
        return ROUND
    return max(len(line.text) * (TEXT if i else BOLD) for i, line in enumerate(box.lines)) + 2 * PAD + 4


def _height(box: Box) -> float:
    return ROUND if box.round else len(box.lines) * LEADING + PAD


def _colours(scene: Scene, technique: str | None) -> tuple[str, str]:
    return (PLAIN, GREY) if technique is None else COLOURS[scene.techniques.index(technique) % len(COLOURS)]


def _box(scene: Scene, box: Box, x: float, y: float) -> str:
    fill, line = _colours(scene, box.technique)
    if box.round:
        circle = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{ROUND / 2:g}" fill="{fill}" stroke="{line}"/>'
        return circle + label((x, y + 5.5), box.lines[0].text, size=16)
    if box.end:
        return label((x, y + 4.5), box.lines[0].text, size=13, colour=FAINT)
    wide, tall = _width(box), _height(box)
    top = y - tall / 2
    frame = rectangle((x - wide / 2, top), (wide, tall), fill, line)
    bases = [top + PAD / 2 + LEADING * (i + 0.75) for i in range(len(box.lines))]
    return frame + "".join(
        _line(scene, box, line, (x, base), wide, first=line is box.lines[0])
        for line, base in zip(box.lines, bases, strict=True)
    )


def _line(scene: Scene, box: Box, line: Line, at: Point, wide: float, *, first: bool) -> str:
    """One line of a box; a delta in a box of the base stands on its technique's colour."""
    size, weight = (12.5, 600) if first else (11, 400)
    if line.technique is None or box.technique is not None:
        return label(at, line.text, size=size, weight=weight, colour=INK if first else FAINT)
    fill, colour = _colours(scene, line.technique)
    under = rectangle((at[0] - wide / 2 + 3, at[1] - 11), (wide - 6, 14), fill, "none")
    return under + label(at, line.text, size=size, colour=colour)


def rectangle(corner: Point, size: Point, fill: str, line: str) -> str:
    """A rectangle with round corners."""
    (x, y), (wide, tall) = corner, size
    radius = 6 if tall > 15 else 3
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{tall:.1f}" rx="{radius}" fill="{fill}" '
        f'stroke="{line}"/>'
    )


def _legend(scene: Scene, top: float) -> Iterator[str]:
    shown = [(None, "the base: frozen, shared by all tasks"), *((t, f"{t}: each task's own") for t in scene.techniques)]
    for i, (technique, text) in enumerate(shown):
        at = top + 20 * i
        yield rectangle((MARGIN, at), (18, 12), *_colours(scene, technique))
        yield label((MARGIN + 26, at + 10), text, size=12, colour=FAINT, anchor="start")


def label(at: Point, text: str, *, size: float, weight: int = 400, colour: str = INK, anchor: str = "middle") -> str:
    """A line of text; `at` is its baseline."""
    return (
        f'<text x="{at[0]:.1f}" y="{at[1]:.1f}" font-size="{size:g}" font-weight="{weight}" fill="{colour}" '
        f'text-anchor="{anchor}">{escape(text)}</text>'
    )
