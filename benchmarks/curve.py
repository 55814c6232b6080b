"""A line chart as SVG: one measure against another, a line for each of some names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from surgeon.picture.svg import COLOURS, FAINT, FONT, MARGIN, PAPER, label

Points = Sequence[tuple[float, float]]
WIDTH, HEIGHT, LEFT, TOP, FOOT = 640.0, 360.0, 64.0, 56.0, 52.0


def curve(title: str, across: str, up: str, lines: Mapping[str, Points]) -> str:
    """Draw each line from the origin's axes; the first of `lines` is the boldest."""
    right, low = WIDTH - MARGIN, HEIGHT - FOOT
    most = [max(point[axis] for points in lines.values() for point in points) for axis in (0, 1)]
    step = [_step(value) for value in most]
    most = [-(-value // by) * by for value, by in zip(most, step, strict=True)]
    place = lambda x, y: (LEFT + x / most[0] * (right - LEFT), low - y / most[1] * (low - TOP))  # noqa: E731
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH:.0f}" height="{HEIGHT:.0f}" '
        f'viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" role="img" font-family="{FONT}">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH:.0f}" height="{HEIGHT:.0f}" rx="10" fill="{PAPER}"/>',
        label((MARGIN, 30), title, size=15, weight=600, anchor="start"),
        label(((LEFT + right) / 2, HEIGHT - 12), across, size=12),
        label((LEFT - 8, TOP - 12), up, size=12, anchor="end"),
    ]
    for number in range(round(most[0] / step[0]) + 1):
        x, y = place(number * step[0], 0)
        parts.append(label((x, y + 18), f"{number * step[0]:g}", size=11, colour=FAINT))
    for number in range(round(most[1] / step[1]) + 1):
        x, y = place(0, number * step[1])
        parts.append(_path([(x, y), (right, y)], "#e5e7eb", 1))
        parts.append(label((x - 8, y + 4), f"{number * step[1]:g}", size=11, anchor="end", colour=FAINT))
    for order, (name, points) in enumerate(lines.items()):
        colour = COLOURS[order % len(COLOURS)][1]
        parts.append(_path([place(*point) for point in points], colour, 1.6 if order else 2.6))
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in (place(*p) for p in points)]
        parts.append(label((LEFT + 14, TOP + 18 * (order + 1)), name, size=12, anchor="start", colour=colour))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _step(most: float) -> float:
    """A round number that divides the axis into four to ten parts."""
    size = 10.0 ** (len(str(int(most))) - 1) if most >= 1 else 0.1
    return next(by for by in (size / 5, size / 2, size, 2 * size) if most / by <= 10)


def _path(points: Points, colour: str, wide: float) -> str:
    way = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{way}" fill="none" stroke="{colour}" stroke-width="{wide}"/>'
