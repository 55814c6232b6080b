"""Trained tensors of a task, from the file that `surgeon train` or a person wrote."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from surgeon.errors import DeltaError


def read_weights(path: Path, fingerprint: str) -> dict[str, Tensor]:
    """Trained tensors from a safetensors file. Raises DeltaError for another base or a damaged file.

    An empty `fingerprint`, of a base without weights, fits every file.
    """
    if path.suffix != ".safetensors":
        raise DeltaError(
            "weights are read from .safetensors files only",
            where=str(path),
            try_="pickle files can run code when opened: convert it once where you trust it",
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise DeltaError(f"the weights cannot be read: {error}", where=str(path)) from error
    theirs = metadata.get("base")
    if theirs is not None and fingerprint not in ("", theirs):
        raise DeltaError(
            "the weights were trained on another base",
            where=str(path),
            there_is=f"their base: {theirs[:16]}; this base: {fingerprint[:16]}",
            try_="deltas only fit the base they were trained on: compile with that base, or train again",
        )
    return tensors
