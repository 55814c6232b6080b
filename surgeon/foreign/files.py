"""Reads a foreign folder: its configuration and its tensors, whole or not at all, and never by unpickling unasked."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from surgeon.errors import DeltaError, did_you_mean, shorten

PICKLED = (".bin", ".pt")


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object. Raises DeltaError for a file that is missing, cut or something else."""
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise DeltaError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except (ValueError, RecursionError) as error:
        raise DeltaError(f"is cut or not JSON: {error}", where=str(path)) from error
    if not isinstance(config, dict):
        raise DeltaError(f"holds {type(config).__name__} where an object of options is expected", where=str(path))
    return config


def read_tensors(folder: Path, names: Iterable[str], *, allow_pickle: bool) -> tuple[dict[str, Tensor], str | None]:
    """The tensors of the one file of these names that the folder has, and the base's fingerprint if it holds one.

    Raises DeltaError where there is none or it is damaged, for NaN, and for a pickled file without `allow_pickle`.
    """
    names = list(names)
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        there_is = sorted(p.name for p in folder.iterdir() if not p.name.endswith((".md", ".json")))
        raise DeltaError("has no weights", where=str(folder), there_is=there_is or "nothing", try_=" or ".join(names))
    fingerprint = None
    if path.suffix in PICKLED:
        tensors = _unpickled(path, allow_pickle=allow_pickle)
    else:
        try:
            with safe_open(path, framework="pt") as file:
                fingerprint = (file.metadata() or {}).get("base")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise DeltaError(f"cannot be read, it may be cut: {error}", where=str(path)) from error
    check_finite(tensors, str(path))
    return tensors, fingerprint


def _unpickled(path: Path, *, allow_pickle: bool) -> dict[str, Tensor]:
    if not allow_pickle:
        raise DeltaError(
            "is a pickle, which can run code when it is opened",
            where=str(path),
            try_="save it as safetensors where you trust it; or --allow-pickle, which lets torch read it by its "
            "`weights_only` loader",
        )
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        first = str(error).strip().splitlines()[0]
        raise DeltaError(f"is no file of tensors alone: {first}", where=str(path)) from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise DeltaError("holds something else than named tensors", where=str(path))
    return tensors


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise DeltaError where a value is NaN or infinite."""
    for name, tensor in tensors.items():
        bad = ~torch.isfinite(tensor)
        if bad.any():
            what = f"NaN or infinity in {name} ({int(bad.sum())} of {tensor.numel()} values)"
            raise DeltaError(what, where=where, try_="it was saved so: a training that diverged?")


class Options:
    """A foreign configuration, read key by key: what is asked for must be there, and what is set must be asked for."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.config = config
        self.where = where
        self._known: set[str] = set()

    def need(self, key: str, kind: type | tuple[type, ...]) -> Any:
        """A key that must be set. Its default is the writer's own, and would be a guess here."""
        if self.config.get(key) is None:
            raise DeltaError(
                f"does not say `{key}`",
                where=self.where,
                there_is=self.config,
                try_="the configuration that was saved with these weights; a default would be a guess",
            )
        return self.get(key, kind)

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """A key that may be absent or null."""
        self._known.add(key)
        value = self.config.get(key)
        if value is None:
            return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            named = " or ".join(k.__name__ for k in kinds)
            raise DeltaError(f"`{key}` must be {named}, got {value!r}", where=self.where)
        return value

    def ignore(self, *keys: str) -> None:
        """Keys that change nothing of what a trained checkpoint computes."""
        self._known.update(keys)

    def finish(self, method: str) -> None:
        """Raise DeltaError where any other key is set: it would change the function, and nothing here knows how."""
        left = {k: v for k, v in self.config.items() if k not in self._known and v not in (None, False, "", [], {})}
        if left:
            first = next(iter(left))
            raise DeltaError(
                f"sets what cannot be read of {method}: {shorten(f'{k} = {v!r}' for k, v in left.items())}",
                where=self.where,
                there_is=shorten(sorted(self._known), 40),
                try_=did_you_mean(first, self._known) or "a checkpoint without it: ignoring it would change the answer",
            )
