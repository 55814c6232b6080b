"""Is this the base a foreign checkpoint was trained on, and is all of the checkpoint there? As far as can be told."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePosixPath

from surgeon.base import Base
from surgeon.errors import BaseError, DeltaError, shorten
from surgeon.foreign.pieces import Checkpoint, Targets
from surgeon.spec import BaseSpec


def check(
    checkpoint: Checkpoint, base: Base, fingerprint: str, named: BaseSpec | None, *, ignore_base_name: bool
) -> None:
    """Raise DeltaError for another base or a checkpoint that lacks tensors, BaseError for a base that does.

    `fingerprint` is that of the base as the program holds it, which may be in another form than the checkpoint's.
    """
    if checkpoint.fingerprint is not None and checkpoint.fingerprint != fingerprint:
        raise DeltaError(
            "it was trained on another base",
            where=checkpoint.where,
            there_is=f"its base: {checkpoint.fingerprint[:16]}; this base: {fingerprint[:16]}",
        )
    if not ignore_base_name:
        _check_name(checkpoint, named)
    if checkpoint.architecture not in (None, type(base.model).__name__):
        raise DeltaError(
            f"it was trained on a {checkpoint.architecture}",
            where=checkpoint.where,
            there_is=f"the base is a {type(base.model).__name__}",
        )
    if checkpoint.head is not None and checkpoint.head != base.head:
        raise DeltaError(
            f"it was trained for {checkpoint.head}",
            where=checkpoint.where,
            there_is=f"the base is loaded for {base.head}",
            try_=f"a base with `head: {checkpoint.head}`",
        )
    if checkpoint.targets is not None:
        _check_targets(checkpoint, checkpoint.targets, base)
    fresh = [name for name in base.fresh if name not in checkpoint.whole]
    if fresh:
        raise BaseError(
            f"the base's files lack {shorten(fresh)}, and so does the folder",
            where=checkpoint.where,
            try_="they were drawn at random when it was trained, and are lost unless you have that base",
        )


def _check_name(checkpoint: Checkpoint, named: BaseSpec | None) -> None:
    """Names are all that PEFT keeps of a base. Where both sides have one, they must end alike."""
    if named is None or named.model is None:
        return
    ours, theirs = named.model, checkpoint.base
    same = theirs is None or _end(theirs) == _end(ours)
    if same and None not in (checkpoint.revision, named.revision) and checkpoint.revision != named.revision:
        same, ours, theirs = False, f"{ours} at {named.revision}", f"{theirs} at {checkpoint.revision}"
    if not same:
        raise DeltaError(
            f"it says that it was trained on {theirs}",
            where=checkpoint.where,
            there_is=f"the base is {ours}",
            try_="that base; or --ignore-base-name where you know that both are the same weights",
        )


def _end(name: str) -> str:
    return PurePosixPath(name.replace("\\", "/").partition(":")[2] or name.replace("\\", "/")).name.lower()


def _check_targets(checkpoint: Checkpoint, targets: Targets, base: Base) -> None:
    paths = [name for name, _ in base.model.named_modules() if name]
    lost = sorted(targets.wanted(paths) - targets.found)
    if lost:
        raise DeltaError(
            f"{len(lost)} modules that the configuration selects have no tensors in the file: {shorten(lost, 3)}",
            where=checkpoint.where,
            there_is=f"{len(targets.found)} modules with tensors",
            try_="a base of more layers than the one it was trained on, or a file that was cut?",
        )
    lost = sorted(set(_biases(targets, base)) - checkpoint.whole)
    if lost:
        raise DeltaError(
            f"{len(lost)} biases that the configuration trains are not in the file: {shorten(lost, 3)}",
            where=checkpoint.where,
            there_is=f"bias = {targets.biases}",
            try_="PEFT up to 0.18 did not save them",
        )


def _biases(targets: Targets, base: Base) -> Iterable[str]:
    for name, _ in base.model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if leaf == "bias" and (targets.biases == "all" or (targets.biases == "own" and owner in targets.found)):
            yield name
