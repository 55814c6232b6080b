"""Does a task's set of tensors fit a build? ONNX Runtime asks none of this: a missing tensor means its default to it,
one of the wrong size fails inside a kernel, and NaN runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from surgeon.errors import DeltaError, shorten
from surgeon.runtime.manifest import Delta, Manifest
from surgeon.runtime.taskfile import Array, dtype_name, model_version

LABELS = "labels"  # the symbol of the size that a task's own head chooses


def check_base(manifest: Manifest, version: int, where: str) -> None:
    """Was the file written for this build's base? Raises DeltaError."""
    fingerprint = manifest.base.fingerprint
    if version != model_version(fingerprint):
        raise DeltaError(
            "the task was trained on another base",
            where=where,
            there_is=f"this base: {manifest.base.source} ({manifest.base.architecture}), "
            f"fingerprint {fingerprint[:8]}… = {model_version(fingerprint)}; the file says {version}",
            try_="deltas only fit the base they were trained on: compile with that base, or train again",
        )


def check_task(
    manifest: Manifest, tensors: Mapping[str, Array], where: str, labels: Sequence[str] | None = None
) -> dict[str, int]:
    """Check a task's tensors against the ledger. Returns the size of each free dimension; raises DeltaError.

    A task with `labels` brings its own head of as many columns; without, it may also keep the base's head.
    """
    optional = {delta.name for delta in manifest.deltas if delta.optional}
    with_head = bool(optional) and (labels is not None or not optional.isdisjoint(tensors))
    wanted = {delta.name: delta for delta in manifest.deltas if with_head or delta.name not in optional}
    _check_names(wanted, tensors, where)
    _check_shapes(wanted.values(), tensors, where)
    sizes = _sizes(wanted.values(), tensors, where)
    if with_head:
        _check_labels(columns(manifest, tensors), labels, where)
    _check_least(wanted.values(), tensors, where)
    _check_finite(tensors, where)
    return sizes


def columns(manifest: Manifest, tensors: Mapping[str, Array]) -> int | None:
    """Columns of the task's own head, None where it keeps the base's."""
    for delta in manifest.deltas:
        for axis, symbol in delta.free.items():
            if symbol == LABELS and delta.name in tensors:
                return int(tensors[delta.name].shape[axis])
    return None


def _check_names(wanted: Mapping[str, Delta], tensors: Mapping[str, Array], where: str) -> None:
    missing = [name for name in wanted if name not in tensors]
    extra = [name for name in tensors if name not in wanted]
    if missing or extra:
        parts = [f"{len(missing)} of {len(wanted)} deltas are missing"] if missing else []
        parts += [f"{len(extra)} tensors belong to no delta of this build"] if extra else []
        lists = [f"missing: {shorten(missing)}"] if missing else []
        lists += [f"unexpected: {shorten(sorted(extra))}"] if extra else []
        raise DeltaError(
            "; ".join(parts),
            where=where,
            there_is=f"{'; '.join(lists)}; the other {len(wanted) - len(missing)} are there",
            try_="train and pack the task with this build's spec",
        )


def _check_shapes(wanted: Iterable[Delta], tensors: Mapping[str, Array], where: str) -> None:
    wrong = []
    for delta in wanted:
        array = tensors[delta.name]
        fits = array.ndim == len(delta.axes) and all(
            isinstance(axis, str) or axis == size for axis, size in zip(delta.axes, array.shape, strict=True)
        )
        if not fits or dtype_name(array) != delta.dtype:
            have, want = _form(array.shape, dtype_name(array)), _form(delta.axes, delta.dtype)
            wrong.append(f"{delta.name} is {have}, the build wants {want}")
    if wrong:
        raise DeltaError(
            f"{len(wrong)} of {len(tensors)} tensors have another shape or type than the build's deltas",
            where=where,
            there_is=shorten(wrong),
            try_="names stand for sizes that a task chooses; the others come from the base",
        )


def _sizes(wanted: Iterable[Delta], tensors: Mapping[str, Array], where: str) -> dict[str, int]:
    found: dict[str, dict[int, str]] = {}
    for delta in wanted:
        for axis, symbol in delta.free.items():
            found.setdefault(symbol, {}).setdefault(tensors[delta.name].shape[axis], delta.name)
    clash = {symbol: sizes for symbol, sizes in found.items() if len(sizes) > 1}
    if clash:
        raise DeltaError(
            f"{len(clash)} free dimensions have two sizes at once",
            where=where,
            there_is=shorten(
                f"{symbol}: " + ", ".join(f"{size} in {name}" for size, name in sizes.items())
                for symbol, sizes in clash.items()
            ),
        )
    return {symbol: next(iter(sizes)) for symbol, sizes in found.items()}


def _check_least(wanted: Iterable[Delta], tensors: Mapping[str, Array], where: str) -> None:
    for delta in wanted:
        for axis, size in delta.least.items():
            if (found := tensors[delta.name].shape[axis]) < size:
                raise DeltaError(
                    f"{delta.free[axis]} is {found} in {delta.name}, and must be {size} at least",
                    where=where,
                    try_="a task without it is not the base: leave the task out of the call instead",
                )


def _check_labels(count: int | None, labels: Sequence[str] | None, where: str) -> None:
    if count == 0:
        raise DeltaError("the task's head has no columns", where=where, try_="a task needs at least one label")
    if labels is not None and count != len(labels):
        raise DeltaError(
            f"the task's head has {count} columns for {len(labels)} labels", where=where, there_is=shorten(labels)
        )


def _check_finite(tensors: Mapping[str, Array], where: str) -> None:
    for name, array in tensors.items():
        # The extremes of an array are finite only if all of it is: a NaN anywhere is both.
        if array.dtype.kind != "f" or not array.size or np.isfinite([array.min(), array.max()]).all():
            continue
        wrong = np.argwhere(~np.isfinite(array))
        raise DeltaError(
            f"NaN or infinity in {name} ({len(wrong)} of {array.size} values, first at {wrong[0].tolist()})",
            where=where,
            there_is="every answer of this task would be NaN",
            try_="train it again with a lower learning rate",
        )


def _form(axes: Iterable[str | int], dtype: str) -> str:
    return f"{dtype}[{', '.join(str(axis) for axis in axes)}]"
