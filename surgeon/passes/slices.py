"""Acting on one role of a fused projection: its output features among those of the others."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from surgeon.anatomy import Projection


def scatter(site: Projection, width: int | None = None) -> Callable[[Tensor], Tensor]:
    """Place a role's features `[..., len(features)]` among all output features `[..., width]`, zeros elsewhere."""
    if site.features is None:
        return lambda t: t
    own, width = site.features, width or fused_width(site)
    first, last = own[0], own[-1]
    if own == tuple(range(first, last + 1)):
        return lambda t: torch.nn.functional.pad(t, (first, width - 1 - last))
    if heads := _heads(own, width):
        count, period, first, length = heads
        ends = (first, period - first - length)
        return lambda t: torch.nn.functional.pad(torch.unflatten(t, -1, (count, length)), ends).flatten(-2)
    position = {feature: i for i, feature in enumerate(own)}
    blocks = _runs([position.get(f, -1) for f in range(width)])

    def spread(t: Tensor) -> Tensor:
        pieces = [
            t[..., start : start + length] if start >= 0 else torch.zeros_like(t[..., :1]).expand(*t.shape[:-1], length)
            for start, length in blocks
        ]
        return torch.cat(pieces, -1)

    return spread


def gather(site: Projection) -> Callable[[Tensor], Tensor]:
    """Take a role's features `[..., len(features)]` out of as many columns as any projection has, or more."""
    own = site.features or tuple(range(site.out_features))
    if heads := _heads(own, fused_width(site)):
        count, period, first, length = heads
        width = count * period
        return lambda t: (
            torch.unflatten(t.narrow(-1, 0, width), -1, (count, period)).narrow(-1, first, length).flatten(-2)
        )
    runs = _runs(list(own))

    def taken(t: Tensor) -> Tensor:
        pieces = [t.narrow(-1, start, length) for start, length in runs]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)

    return taken


def fused_width(site: Projection) -> int:
    """Output features of the whole fused projection."""
    shape = site.weight_node.meta["val"].shape
    return int(shape[-1] if site.in_first else shape[-2])  # in front of these, experts


@cache
def _heads(own: tuple[int, ...], width: int) -> tuple[int, int, int, int] | None:
    """Features that lie alike in every head, as (heads, width of one, first, how many); None if they do not.

    A projection of 128 heads would else be spread by as many slices.
    """
    runs = _runs(list(own))
    first, length = runs[0]
    period = runs[1][0] - first if len(runs) > 1 else width
    alike = runs == [(first + i * period, length) for i in range(len(runs))]
    whole = len(runs) * period == width and first + length <= period
    return (len(runs), period, first, length) if alike and whole and len(runs) > 1 else None


def _runs(sources: list[int]) -> list[tuple[int, int]]:
    """Cut a list of source positions (-1 for none) into (start, length) runs."""
    runs: list[tuple[int, int]] = []
    for source in sources:
        start, length = runs[-1] if runs else (0, 0)
        if runs and ((start < 0 and source < 0) or (start >= 0 and source == start + length)):
            runs[-1] = (start, length + 1)
        else:
            runs.append((source, 1))
    return runs
