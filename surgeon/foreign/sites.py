"""Finds the sites of a base that a foreign file means by the path of a module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from surgeon.anatomy import Anatomy, Join, Projection
from surgeon.errors import DeltaError, did_you_mean
from surgeon.foreign.pieces import Bottleneck

BESIDE = {
    "attention_adapters": "residual.attention",
    "output_adapters": "residual.ffn",
    "cross_attention_adapters": "residual.cross_attention",
}
"""Modules that AdapterHub adds to a layer, by the join they act on."""


def projections(anatomy: Anatomy, model: Any, path: str, where: str) -> Sequence[Projection]:
    """The projections of the module at `path`: one, or one for each role of a fused one and each call of a shared one.

    A module whose weight is tied to another's, as a head is to an embedding, is found by the weight they share.
    """
    found = [site for site in anatomy.projections if site.path == path]
    if not found:
        found = [s for s in anatomy.projections if f"{path}.weight" in module_names(model, s.weight)]
    if not found:
        known = list(dict.fromkeys(site.path for site in anatomy.projections))
        raise DeltaError(
            f"the base has no projection {path}",
            where=where,
            there_is=known,
            try_=did_you_mean(path, known) or "was it trained on another base?",
        )
    return found


def module_names(model: Any, parameter: str) -> list[str]:
    """The names of a parameter in the modules that compute with it; an embedding that shares it only looks rows up."""
    wanted = model.get_parameter(parameter)
    return [
        f"{path}.{leaf}"
        for path, module in model.named_modules()
        if not isinstance(module, torch.nn.Embedding)
        for leaf, own in module._parameters.items()
        if own is wanted
    ]


def width_of(model: Any, site: Projection) -> int:
    """Output features of the whole module of a projection, fused or not."""
    return int(model.get_parameter(site.weight).shape[1 if site.in_first else 0])


def parameter(model: Any, name: str) -> torch.Tensor | None:
    """A parameter or a buffer of the base, by any of its names."""
    named = {**dict(model.named_buffers()), **dict(model.named_parameters(remove_duplicate=False))}
    return named.get(name)


def join_at(anatomy: Anatomy, path: str, where: str) -> Join:
    """The join of the sublayer that ends in the module at `path`, or beside which AdapterHub has put one of its own."""
    parent, _, leaf = path.rpartition(".")
    inside, role = (parent, BESIDE[leaf]) if leaf in BESIDE else (path, None)
    found = [j for j in anatomy.joins if j.path.startswith(f"{inside}.") and role in (None, j.role)]
    if len(found) != 1:
        raise DeltaError(
            f"the base has {len(found) or 'no'} residual joins at {path}",
            where=where,
            there_is=[j.path for j in anatomy.joins],
            try_="was it trained on another base?",
        )
    return found[0]


def form(piece: Bottleneck) -> tuple[str, str]:
    """What all adapters of one `adapter` item share."""
    return piece.placement, piece.activation


def check_entry(join: Join, piece: Bottleneck, where: str) -> None:
    """A parallel adapter of AdapterHub reads the stream, ours what the sublayer reads: one where no norm is between."""
    if piece.placement == "parallel" and join.entry is not join.skip:
        raise DeltaError(
            f"AdapterHub's parallel adapter at {piece.path} reads the stream before the norm",
            where=where,
            try_="He et al. define it behind the norm, and so does `adapter`: train it again here",
        )


def stack_of(anatomy: Anatomy, stack: str | None, where: str) -> str:
    """The stack of this name, or the only one. Raises DeltaError where there is none, or there are two to choose."""
    known = list(anatomy.layers)
    if stack is None and len(known) == 1:
        return known[0]
    if stack not in known:
        raise DeltaError(f"the base has no stack '{stack or 'of its own'}'", where=where, there_is=known)
    return stack
