"""What masks show an attention of a text: all that was before, or a window of the last columns."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx

from surgeon.program import Program

LONG = 2**15
"""Columns at most of the longest text for which a mask is looked at."""
HIDDEN = -1e4
"""What is added to the score of a column that is not seen is less."""


def windows(program: Program, cores: Iterable[fx.Node]) -> dict[fx.Node, int] | None:
    """How many columns a token sees in each attention, itself among them: 0 for all that there are.

    None where an attention sees others than the last, looked at for the last two tokens of the longest text: of two,
    since a block of a text that is cut into blocks ends like a window does.
    """
    masks = {core: core.args[3] if len(core.args) > 3 else core.kwargs.get("attn_mask") for core in cores}
    if any(core.kwargs.get("is_causal") or any(core.args[5:]) for core in masks):
        return None
    nodes = [mask for mask in dict.fromkeys(masks.values()) if isinstance(mask, fx.Node)]
    if len(nodes) < len(set(masks.values())):
        return None
    sizes = {"batch": 1, "sequence": 2, "past": min(program.max_length or LONG, LONG) - 2}
    feed = {  # of the cache only the sizes are read
        i.name: torch.zeros(1).expand(i.shape(sizes)) if i.cached else torch.ones(i.shape(sizes), dtype=i.dtype)
        for i in program.inputs
    }
    found = {node: window(mask) for node, mask in zip(nodes, program.evaluate(nodes, feed), strict=True)}
    if None in found.values():
        return None
    return {core: found[mask] or 0 for core, mask in masks.items()}  # type: ignore[index]


def window(mask: Tensor) -> int | None:
    """How many columns two tokens see by a mask `[…, 2, columns]`, 0 for all, None if these are not the last ones."""
    seen = mask if mask.dtype == torch.bool else mask == 0
    if mask.shape[-2] != 2 or not (mask.dtype == torch.bool or (seen | (mask < HIDDEN)).all()):
        return None
    columns = seen.shape[-1]
    rows = seen.reshape(-1, 2, columns)
    width = int(rows[0, 1].sum())
    at, last = torch.arange(columns), torch.tensor([[columns - 2], [columns - 1]])
    if width < 1 or not (rows == (at <= last) & (at > last - width)).all():
        return None
    return 0 if width == columns else width
