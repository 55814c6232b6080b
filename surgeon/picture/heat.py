"""A heat map as SVG: how much each of some names weighs in each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from surgeon.picture.svg import FONT, MARGIN, PAPER, TEXT, label, rectangle

CELL, TALL, HEAD = 44.0, 26.0, 76.0
LIGHT, DARK = (247, 250, 253), (24, 78, 136)


def heat(title: str, columns: Sequence[tuple[str, Mapping[str, float]]], *, across: str = "layer") -> str:
    """Draw columns of shares by name, each with its heading; a name that a column lacks leaves its cell empty."""
    names = list(dict.fromkeys(name for _, shares in columns for name in shares))
    left = MARGIN + max(TEXT * len(name) for name in names) + 14
    width = max(left + CELL * len(columns) + MARGIN, 2 * MARGIN + 8.5 * len(title))
    height = HEAD + TALL * len(names) + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" role="img" font-family="{FONT}">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{width:.0f}" height="{height:.0f}" rx="10" fill="{PAPER}"/>',
        label((MARGIN, 30), title, size=15, weight=600, anchor="start"),
        label((left - 10, HEAD - 10), across, size=11, anchor="end"),
    ]
    for row, name in enumerate(names):
        parts.append(label((left - 10, HEAD + TALL * (row + 0.5) + 4), name, size=12, anchor="end"))
    for place, (heading, shares) in enumerate(columns):
        x = left + CELL * place
        parts.append(label((x + CELL / 2, HEAD - 10), heading, size=11))
        for row, name in enumerate(names):
            if name in shares:
                parts += _cell((x, HEAD + TALL * row), shares[name])
    return "\n".join([*parts, "</svg>"]) + "\n"


def _cell(corner: tuple[float, float], share: float) -> list[str]:
    """A square as dark as its share, which stands in it."""
    fill = "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(LIGHT, DARK, strict=True))
    middle = (corner[0] + CELL / 2, corner[1] + TALL / 2 + 4)
    ink = "#ffffff" if share > 0.5 else "#1f2328"
    return [rectangle(corner, (CELL - 2, TALL - 2), fill, "none"), label(middle, f"{share:.2f}", size=11, colour=ink)]
