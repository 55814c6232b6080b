"""What makes two training runs the same one, so that a checkpoint is never taken up by another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from surgeon.errors import DataError
from surgeon.train.options import TrainOptions
from surgeon.train.processes import Processes
from surgeon.train.rows import TaskRows

if TYPE_CHECKING:
    from surgeon.train.joint import Joint

INDIFFERENT = {"threads", "checkpoint_steps", "gradient_checkpointing"}


def identify(joint: Joint, rows: Mapping[str, TaskRows], options: TrainOptions, processes: Processes) -> dict[str, Any]:
    """The options that change the outcome, and hashes of the rows and of the models before their first step."""
    return {
        **options.model_dump(mode="json", exclude=INDIFFERENT),
        "processes": processes.count,
        "train_base": bool(joint.base),
        **{f"training rows of {task}": _hash_rows(rows[task].training) for task in joint.models},
        **{f"validation rows of {task}": _hash_rows(rows[task].validation or ()) for task in joint.models},
        "base and first weights": _hash_tensors(joint),
    }


def check_same_run(found: dict[str, Any], wanted: dict[str, Any], folder: Path | None) -> None:
    """Raise DataError that names what differs."""
    differing = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
    if differing:
        raise DataError(
            "the checkpoint is of another run, so it cannot be gone on from",
            where=str(folder),
            there_is=f"different: {', '.join(_difference(key, found, wanted) for key in differing)}",
            try_="the same options and data, or start over with `--fresh` (in Python: clear_checkpoints)",
        )


def _difference(key: str, found: dict[str, Any], wanted: dict[str, Any]) -> str:
    if " " in key:
        return key
    return f"{key} ({found.get(key)} there, {wanted.get(key)} here)"


def _hash_rows(rows: Sequence[Any]) -> str:
    """Of their content, not of where they were read."""
    content = [{name: value for name, value in row._asdict().items() if name != "where"} for row in rows]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _hash_tensors(joint: Joint) -> str:
    digest = hashlib.sha256()
    tensors = joint.tensors() | {f"base/{name}": tensor for name, tensor in joint.any.base_parameters().items()}
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
