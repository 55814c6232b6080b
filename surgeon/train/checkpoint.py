"""Checkpoints of a training run: one safetensors file each, whole or not there; nothing is pickled."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from surgeon.errors import BuildError, DataError

NAME = re.compile(r"step-(\d{8,})\.safetensors(\.partial)?")


class Checkpoint(NamedTuple):
    """Tensors by name (`weights/…`, `best/…`, `optimizer/…`, `schedule/…`, `random/…`) and JSON for all else."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The tensors of one kind, by the rest of their names."""
        start = f"{prefix}/"
        return {name.removeprefix(start): t for name, t in self.tensors.items() if name.startswith(start)}


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write under a temporary name, rename, and only then remove what is older."""
    path = folder / f"step-{checkpoint.step:08d}.safetensors"
    partial = path.with_name(path.name + ".partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.contiguous() for name, tensor in checkpoint.tensors.items()}
        save_file(tensors, partial, metadata={"surgeon": "checkpoint 1", "state": json.dumps(checkpoint.state)})
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        if partial.is_file():
            partial.unlink()
        raise BuildError(f"the checkpoint could not be written: {error}", where=str(folder)) from error
    for old in _ours(folder):
        if old != path:
            old.unlink(missing_ok=True)


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The checkpoint to go on from, or None. Raises DataError where the newest is damaged."""
    whole = [p for p in _ours(folder) if p.suffix == ".safetensors"]
    if not whole:
        return None
    path = max(whole, key=_step)
    try:
        with safe_open(path, framework="pt") as file:
            metadata: Mapping[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        if metadata.get("surgeon") != "checkpoint 1":
            raise DataError("this is no checkpoint of a format that is known", where=str(path))
        return Checkpoint(_step(path), tensors, json.loads(metadata["state"]))
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise DataError(f"the checkpoint is damaged: {error}", where=str(path), try_="delete it") from error


def clear_checkpoints(folder: Path) -> None:
    """Remove the checkpoints in `folder`, and the folder if nothing else is in it."""
    for path in _ours(folder):
        path.unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _ours(folder: Path) -> list[Path]:
    return [p for p in folder.iterdir() if NAME.fullmatch(p.name)] if folder.is_dir() else []


def _step(path: Path) -> int:
    return int(path.name.split("-")[1].split(".")[0])
