"""Puts what a technique inserts (prefixes, prompts, adapters, VeRA's vectors) into the deltas of a task."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from surgeon.anatomy import Attention, select
from surgeon.errors import DeltaError
from surgeon.foreign.meaning import steps, times
from surgeon.foreign.pieces import Bottleneck, Fused, Prefix, Prompt, Shared
from surgeon.foreign.sites import check_entry, form, join_at, stack_of
from surgeon.passes.columns import biased
from surgeon.passes.slices import gather
from surgeon.passes.trained_adapters import MARK, Source, stacked

FUSION = (
    *("adapter.down.weight", "adapter.down.bias", "adapter.up.weight", "adapter.up.bias", "adapter.index"),
    *("query.weight", "query.bias", "key.weight", "key.bias", "value.weight"),
)
"""What a task of `fusion` holds at a join."""

if TYPE_CHECKING:
    from surgeon.foreign.placing import Placing


def shared(task: Placing, piece: Shared) -> None:
    """VeRA's vectors. Raises DeltaError where the build's matrices are not the folder's, as far as they are read."""
    assert piece.matrices is not None  # since it was settled
    for site in task.projections(piece.path):
        between, behind = task.delta(site, "vera_lambda_d"), task.delta(site, "vera_lambda_b")
        if between is None or behind is None:
            raise task.lacking(site.role, piece.path, "vera")
        step = next(s for s in steps(task.compiled, "vera") if site in s.sites(task.program))
        take, own = gather(site), step.matrices(task.program)
        wanted, found = ((a[: site.in_features], take(b)) for a, b in (piece.matrices, own))
        if not all(x.shape == y.shape and x.to(y.dtype).equal(y) for x, y in zip(wanted, found, strict=True)):
            raise DeltaError(
                f"VeRA's shared matrices at {piece.path} are not those of the build",
                where=task.where,
                there_is=f"A of {list(own[0].shape)} from key {step.projection_key} in the build, "
                f"of {list(piece.matrices[0].shape)} and key {piece.key} in the folder",
                try_="the folder's rank, key and targets in `vera`: they decide what is drawn; matrices that were not "
                "drawn from their key have no place in a build",
            )
        task.put(between, piece.between)
        task.put(behind, piece.behind if site.features is None else take(piece.behind))


def prefix(task: Placing, piece: Prefix) -> None:
    """Keys and values in front of those of every layer of a stack."""
    stack = stack_of(task.program.anatomy, piece.stack, task.where)
    own = [s for s in task.program.anatomy.attentions if s.stack == stack and s.cross == piece.cross]
    for step in steps(task.compiled, "prefix"):
        if step.where is not None and set(own).isdisjoint(select(task.program.anatomy, step.where, Attention)):
            continue
        if step.shift != piece.shift:
            says = f"prefix: {{shift: {str(piece.shift).lower()}}}"
            raise DeltaError("text has other positions behind this prefix", where=task.where, try_=says)
        if step.distances != piece.distances and biased(task.program, own):
            raise DeltaError(
                f"the bias by distance of {stack}'s attention is another at the keys of this prefix",
                where=task.where,
                there_is=step.distances,
                try_=f"prefix: {{distances: {piece.distances}}}",
            )
    for kind, tensors in (("prefix.key", piece.keys), ("prefix.value", piece.values)):
        cross = "cross_attention" if piece.cross else "attention"
        found = {d.layer: d for d in task.deltas(kind) if d.stack == stack and d.role == cross}
        if not found:
            raise task.lacking(cross, stack, "prefix")
        if len(tensors) != task.program.anatomy.layers[stack]:
            raise DeltaError(
                f"the prefix has {len(tensors)} layers and the base {task.program.anatomy.layers[stack]}",
                where=task.where,
                try_="was it trained on another base?",
            )
        for layer, tensor in enumerate(tensors):
            if layer not in found:
                raise task.lacking(cross, f"layer {layer}", "prefix")
            heads, _, width = found[layer].shape
            if tensor.shape[1] != heads * width:
                what = f"the prefix has {tensor.shape[1]} numbers a token and layer, the base {heads} · {width}"
                raise DeltaError(what, where=task.where, try_="was it trained on another base?")
            task.put(found[layer], tensor.reshape(-1, heads, width).transpose(0, 1))


def bottleneck(task: Placing, piece: Bottleneck) -> None:
    """An adapter at the join that its path means."""
    join = join_at(task.program.anatomy, piece.path, task.where)
    deltas = [task.delta(join, part) for part in ("down.weight", "down.bias", "up.weight", "up.bias")]
    own = [s for s in steps(task.compiled, "adapter") if (s.placement, s.activation) == form(piece)]
    if None in deltas or not own:
        raise task.lacking(f"a {' '.join(form(piece))} adapter in place", piece.path, "adapter")
    ratio = piece.scale / own[0].factor
    check_entry(join, piece, task.where)
    for delta, weight, scaled in zip(deltas, piece.weights, (False, False, True, True), strict=True):
        if delta is not None:
            task.put(delta, weight * ratio if scaled and ratio != 1 else weight)


def fused(task: Placing, piece: Fused) -> None:
    """The adapters at a join side by side, and the fusion's Q, K and V."""
    join = join_at(task.program.anatomy, piece.path, task.where)
    names = {part: f"{join.path}.fusion.{part}" for part in FUSION}
    own = [s for s in steps(task.compiled, "fusion") if {s.activation} == {a.activation for a in piece.adapters}]
    if not own or any(name not in task.ledger.trained for name in names.values()):
        activations = " and ".join(sorted({a.activation for a in piece.adapters}))
        raise task.lacking(f"adapters with {activations}", piece.path, "fusion")
    parts = ("down.weight", "down.bias", "up.weight", "up.bias")
    sources = []
    for adapter in piece.adapters:
        down, down_bias, up, up_bias = adapter.weights
        ratio = adapter.scale / own[0].scale
        weights = (down, down_bias, times(up, ratio), times(up_bias, ratio))
        named = {f"{join.path}{MARK}{part}": w for part, w in zip(parts, weights, strict=True)}
        sources.append(Source(task.where, named))
    frozen = stacked(sources, join, piece.value.dtype)
    index = torch.arange(float(len(sources)))
    filled = (*frozen, index, *piece.query, *piece.key, piece.value)
    task.tensors |= {name: t.contiguous() for name, t in zip(names.values(), filled, strict=True)}


def prompt(task: Placing, piece: Prompt) -> None:
    """Rows in front of the text."""
    found = task.deltas("prompt")
    if not found:
        raise task.lacking("the text", "the input", "prompt")
    for step in steps(task.compiled, "prompt"):
        if step.place != "front":
            raise DeltaError(f"the build's prompt stands {step.place} the first token", where=task.where)
    task.put(found[0], piece.rows)
