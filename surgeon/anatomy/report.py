"""What `surgeon inspect` shows: an anatomy as plain rows and a summary; whoever prints them chooses the form."""

from __future__ import annotations

from collections import Counter
from itertools import groupby
from typing import Any

from surgeon.anatomy.sites import Anatomy, Attention, Embedding, Join, Norm, Projection, Site, graph_order


def rows(anatomy: Anatomy) -> list[dict[str, Any]]:
    """One JSON-able row a site, in graph order: where it is, what it does, how large it is."""
    return [
        {
            "stack": site.stack,
            "layer": site.layer,
            "role": site.role,
            "kind": type(site).__name__.lower(),
            "path": site.path,
            **_details(site),
        }
        for site in graph_order(anatomy)
    ]


def summary(anatomy: Anatomy) -> dict[str, Any]:
    """Layers of each stack, sites of each role, and what was not understood."""
    return {
        "layers": dict(anatomy.layers),
        "roles": dict(Counter(site.role for site in graph_order(anatomy))),
        "shared_weights": _shared(anatomy),
        "notes": list(anatomy.notes),
    }


def spans(features: tuple[int, ...]) -> str:
    """Feature indices as half-open runs: `0:32`, or `0:8, 24:32, … (4 runs)`."""
    groups = groupby(enumerate(features), key=lambda pair: pair[1] - pair[0])
    runs = [[index for _, index in group] for _, group in groups]
    text = [f"{run[0]}:{run[-1] + 1}" for run in runs]
    return ", ".join(text) if len(text) <= 3 else f"{', '.join(text[:2])}, … ({len(text)} runs)"


def _details(site: Site) -> dict[str, Any]:
    match site:
        case Projection():
            return {
                "shape": f"{site.in_features}->{site.out_features}",
                "features": spans(site.features) if site.features is not None else None,
                "weight": site.weight,
                "bias": site.bias,
            }
        case Attention():
            heads = f"{site.heads} heads of {site.head_dim}"
            value = f", values {site.value_dim}" if site.value_dim != site.head_dim else ""
            groups = f", {site.kv_heads} for keys and values" if site.kv_heads != site.heads else ""
            return {
                "shape": heads + value + groups,
                "heads": site.heads,
                "kv_heads": site.kv_heads,
                "head_dim": site.head_dim,
            }
        case Embedding():
            return {"shape": f"{site.rows}x{site.width}", "weight": site.weight}
        case Join():
            return {"shape": str(site.width), "post_norm": site.post_norm.path if site.post_norm else None}
        case Norm():
            return {"shape": _width(site), "weight": site.weight, "bias": site.bias}
        case _:
            return {"shape": ""}


def _width(norm: Norm) -> str:
    return str(norm.output.meta["val"].shape[-1])


def _shared(anatomy: Anatomy) -> dict[str, int]:
    """Weights that several call sites use (the slices of a fused projection are one call), with their number."""
    calls = {site.node: site.weight for site in anatomy.embeddings}
    calls |= {site.node: site.weight for site in anatomy.projections}
    counts = Counter(calls.values())
    return {weight: count for weight, count in counts.items() if count > 1}
