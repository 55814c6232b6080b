"""Turns pieces that need a base to be understood into those that name its parameters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from surgeon.anatomy import Anatomy, Projection
from surgeon.base import Base
from surgeon.errors import DeltaError
from surgeon.foreign.pieces import Checkpoint, Classifier, Piece, Same, Shared, Whole
from surgeon.foreign.sites import parameter, projections
from surgeon.passes.vera import drawn, shared_size

TANH = (torch.ops.aten.tanh.default,)


def settle(checkpoint: Checkpoint, base: Base, anatomy: Anatomy) -> Checkpoint:
    """The checkpoint with a classifier as the base's own two layers, and without a language head that is the base's.

    VeRA's shared matrices are drawn where they were not saved: the modules of this base say how large they are.
    """
    pieces = [q for p in checkpoint.pieces for q in _settled(p, checkpoint, base, anatomy)]
    bare = [p for p in pieces if isinstance(p, Shared) and p.matrices is None]
    if bare:
        sites = [s for p in bare for s in projections(anatomy, base.model, p.path, checkpoint.where)]
        matrices = drawn(bare[0].key, len(bare[0].between), *shared_size(sites))
        pieces = [replace(p, matrices=matrices) if isinstance(p, Shared) else p for p in pieces]
    return replace(checkpoint, pieces=tuple(pieces))


def _settled(piece: Piece, checkpoint: Checkpoint, base: Base, anatomy: Anatomy) -> Iterator[Piece]:
    if isinstance(piece, Classifier):
        yield from _classifier(piece, checkpoint, anatomy)
    elif isinstance(piece, Whole) and not base.head.endswith("-classification"):
        own = parameter(base.model, piece.name)
        same = own is not None and own.shape == piece.tensor.shape and own.detach().equal(piece.tensor.to(own.dtype))
        yield Same(name=piece.name, tensor=piece.tensor) if same else piece
    else:
        yield piece


def _classifier(piece: Classifier, checkpoint: Checkpoint, anatomy: Anatomy) -> Iterator[Piece]:
    dense, out = ([s for s in anatomy.projections if s.role == role] for role in ("head.dense", "head.out"))
    if len(dense) != 1 or len(out) != 1 or not any(user.target in TANH for user in dense[0].output.users):
        raise DeltaError(
            "the folder's head has two layers with tanh between them, and the base's has not",
            where=checkpoint.where,
            there_is=[s.path for s in (*dense, *out)] or "no head",
            try_="a base loaded for sequence-classification",
        )
    for site, (weight, bias) in ((dense[0], piece.dense), (out[0], piece.out)):
        yield Whole(name=site.weight, tensor=weight.T if site.in_first else weight)
        yield Whole(name=_bias(site, checkpoint.where), tensor=bias)


def _bias(site: Projection, where: str) -> str:
    if site.bias is None:
        raise DeltaError(f"{site.path} has no bias in the base, and the folder's head has one", where=where)
    return site.bias
