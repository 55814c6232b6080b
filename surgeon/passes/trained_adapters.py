"""Adapters that other tasks have trained, for techniques that build on them: read, checked, stacked site by site."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

from surgeon.anatomy import Join
from surgeon.errors import BuildError, DeltaError, SpecError, did_you_mean, shorten
from surgeon.runtime.document import read_manifest
from surgeon.runtime.files import check_files, hash_file
from surgeon.runtime.manifest import Manifest
from surgeon.weights import read_weights

SUFFIX = ".safetensors"
SPEC = "spec.yaml"
MARK = ".adapter."
HEAD = ".head."


class Source(NamedTuple):
    """The tensors of one trained task, and the file they come from."""

    file: str
    tensors: Mapping[str, Tensor]


class Stacked(NamedTuple):
    """N adapters of one site; narrower ones are padded with zeros, which changes none of them.

    Down `[N, d, m]` and `[N, m]`, up `[N, m, d]` and `[N, d]`.
    """

    down: Tensor
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor


def read_sources(
    of: Sequence[str], build: str | None, fingerprint: str, options: Mapping[str, Any]
) -> tuple[Source, ...]:
    """The tasks of `build` that `of` names, and the files it names.

    Raises SpecError for less than two, one twice, or one that there is not; DeltaError where the adapters are not of
    this base or of other `options` than the build's.
    """
    manifest = None if build is None else read_manifest(build)
    known = () if manifest is None else tuple(manifest.tasks)
    there_is = f"tasks of {build}: {shorten(known) or 'none'}" if build else "no `build` is named"
    if len(of) < 2:
        raise SpecError(
            f"{len(of)} adapter{'' if len(of) == 1 else 's'} cannot be fused, it takes two at least", there_is=there_is
        )
    if twice := sorted({entry for entry in of if of.count(entry) > 1}):
        raise SpecError(f"the same adapter twice: {', '.join(twice)}", there_is=there_is)
    for entry in of:
        if not entry.endswith(SUFFIX) and entry not in known:
            raise SpecError(
                f"there is no trained task '{entry}'",
                there_is=there_is,
                try_=did_you_mean(entry, known) or f"`build: PATH` and a task of it, or a path to a {SUFFIX} file",
            )
    if build is not None and manifest is not None:
        if not set(of) & set(known):
            raise SpecError(f"nothing is taken from the build {build}", there_is=there_is, try_="leave `build` out")
        _check_options(Path(build), manifest, options)
    paths = [Path(e) if e.endswith(SUFFIX) else _weights(Path(str(build)), manifest, e) for e in of]
    return tuple(Source(str(path), read_weights(path, fingerprint)) for path in paths)


def _weights(build: Path, manifest: Manifest | None, task: str) -> Path:
    """The weights' file of a task, which must be the one that the manifest names."""
    assert manifest is not None
    path = build / manifest.tasks[task].weights
    if not path.is_file() or hash_file(path) != manifest.tasks[task].weights_sha256:
        raise BuildError("is missing or has other content than the manifest says", where=str(path))
    return path


def _check_options(build: Path, manifest: Manifest, options: Mapping[str, Any]) -> None:
    """Were the build's adapters made with these options? Their tensors alone do not tell."""
    check_files(build, manifest, [SPEC])
    document = yaml.safe_load((build / SPEC).read_text(encoding="utf-8"))
    made = [item["adapter"] for item in document["surgery"] if "adapter" in item]
    if not made:
        techniques = shorten(name for item in document["surgery"] for name in item)
        raise DeltaError("the build has no adapters", where=str(build), there_is=techniques or "no surgery")
    for item in made:
        for option, wanted in options.items():
            found = item.get(option) or 1.0 if option == "scale" else item.get(option)
            if found != wanted:
                raise DeltaError(
                    f"the build's adapters have `{option}: {found}`, and {wanted} is wanted",
                    where=str(build),
                    try_="the same option in both specs" if option != "placement" else "`placement: pfeiffer` there",
                )


def check_sites(source: Source, joins: Collection[Join], *, every: bool) -> None:
    """Raise DeltaError unless `source` has an adapter at each of `joins`, at no other place if `every` one is wanted,
    and nothing beside adapters and a head: an adapter that was trained with other deltas is half of something.
    """
    wanted = {f"{join.path}{MARK}{part}" for join in joins for part in ("down.weight", "down.bias")}
    wanted |= {f"{join.path}{MARK}{part}" for join in joins for part in ("up.weight", "up.bias")}
    found = {name for name in source.tensors if MARK in name}
    other = [name for name in source.tensors if MARK not in name and HEAD not in name]
    if missing := sorted(wanted - found):
        raise DeltaError(
            f"{len(missing)} of {len(wanted)} adapter tensors are missing: {shorten(missing, 3)}",
            where=source.file,
            there_is=shorten(sorted(source.tensors), 6) or "nothing",
            try_="adapters of `adapter: {placement: pfeiffer}` at the same sites",
        )
    if extra := sorted(found - wanted) if every else []:
        raise DeltaError(
            f"{len(extra)} adapter tensors are at no site of the fusion: {shorten(extra, 3)}",
            where=source.file,
            there_is=f"fused sites: {shorten(join.label for join in joins)}",
            try_="the adapters' own `where`",
        )
    if other:
        raise DeltaError(
            f"the adapters were trained together with other deltas: {shorten(other, 3)}",
            where=source.file,
            try_="adapters that were trained alone (a head apart)",
        )


def stacked(sources: Sequence[Source], join: Join, dtype: torch.dtype) -> Stacked:
    """The adapters of all sources at one join. Raises DeltaError for another width or values that are not finite."""
    parts = [_parts(source, join) for source in sources]
    width = max(down.shape[1] for down, *_ in parts)

    def pad(tensor: Tensor, axis: int) -> Tensor:
        wide = list(tensor.shape)
        wide[axis] = width - tensor.shape[axis]
        return torch.cat([tensor, tensor.new_zeros(wide)], axis).to(dtype)

    return Stacked(
        torch.stack([pad(down, 1) for down, _, _, _ in parts]),
        torch.stack([pad(bias, 0) for _, bias, _, _ in parts]),
        torch.stack([pad(up, 0) for _, _, up, _ in parts]),
        torch.stack([bias.to(dtype) for _, _, _, bias in parts]),
    )


def _parts(source: Source, join: Join) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    names = [f"{join.path}{MARK}{part}" for part in ("down.weight", "down.bias", "up.weight", "up.bias")]
    down, down_bias, up, up_bias = (source.tensors[name] for name in names)
    width, d = down.shape[-1] if down.dim() else 0, join.width
    shapes = ((d, width), (width,), (width, d), (d,))
    for name, shape in zip(names, shapes, strict=True):
        tensor = source.tensors[name]
        if tensor.shape != shape:
            raise DeltaError(
                f"{name} has shape {list(tensor.shape)}, this base wants {list(shape)}",
                where=source.file,
                try_="adapters of this base",
            )
        if not torch.isfinite(tensor).all():
            raise DeltaError(f"NaN or infinity in {name}", where=source.file)
    return down, down_bias, up, up_bias
