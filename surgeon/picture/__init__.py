"""A picture of surgery for people: one layer of the real graph, before and after, as SVG.

Path("lora.svg").write_text(picture(compiled.program))
"""

from __future__ import annotations

from surgeon.picture.scene import scene
from surgeon.picture.svg import draw
from surgeon.program import Program

__all__ = ["picture"]


def picture(program: Program, *, layer: int | None = None, stack: str | None = None) -> str:
    """Draw one layer before and after surgery; unset it is the first layer that most of the techniques touch.

    Nodes are those of the program's graph; what passes made is in colour, one per technique. The same program gives
    the same text. Raises SelectorError where there is no such layer.
    """
    return draw(scene(program, stack, layer))
