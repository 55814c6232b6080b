"""Finds the folder a base's files are in, and looks at them before anything is loaded from it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from surgeon.errors import BaseError
from surgeon.spec import BaseSpec

PACKAGE = "package:"
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def find_folder(base: BaseSpec, *, weights: bool) -> Path:
    """The local folder of `base.model`, downloaded only where the cache lacks it. Raises BaseError."""
    source = base.model or ""
    local = Path(source).expanduser()
    if source.startswith(PACKAGE):
        return _in_package(source)
    if local.is_dir():
        return local
    if local.exists():
        try_ = f"{local.parent}, or a file whose name ends in .gguf"
        raise BaseError("the base is a folder, and this is a file", where=source, try_=try_)
    if local.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        raise BaseError("there is no such folder", where=source)
    return _from_hub(base, source, weights=weights)


def find_file(source: str) -> Path:
    """A base that is one file: a path, or a file inside an installed package. Raises BaseError."""
    path = Path(source).expanduser()
    if source.startswith(PACKAGE):
        roots, inside = _package(source)
        path = next((p for root in roots if (p := root.joinpath(*inside)).is_file()), roots[0].joinpath(*inside))
    if path.is_file():
        return path
    beside = sorted(p.name for p in path.parent.glob(f"*{path.suffix}")) if path.parent.is_dir() else []
    raise BaseError("there is no such file", where=source, there_is=beside)


def _in_package(source: str) -> Path:
    """A folder inside an installed package."""
    roots, inside = _package(source)
    for root in roots:
        if (folder := root.joinpath(*inside)).is_dir():
            return folder
    name = source.removeprefix(PACKAGE).split("/")[0]
    models = [f"{PACKAGE}{name}/{path.parent.relative_to(r)}" for r in roots for path in sorted(r.rglob(CONFIG))]
    raise BaseError(f"package '{name}' has no such folder", where=source, there_is=models)


def _package(source: str) -> tuple[list[Path], list[str]]:
    """The roots of an installed package, found without importing it, and the path inside."""
    name, *inside = source.removeprefix(PACKAGE).split("/")
    if not name.isidentifier() or any(part in ("", ".", "..") for part in inside):
        raise BaseError("this is not of the form `package:NAME/folder`", where=source)
    try:
        found = find_spec(name)
    except (ImportError, ValueError):
        found = None
    if found is None or not found.submodule_search_locations:
        raise BaseError(f"there is no installed package '{name}'", where=source, try_="install it with pip")
    return [Path(root) for root in found.submodule_search_locations], inside


def _from_hub(base: BaseSpec, source: str, *, weights: bool) -> Path:
    """The snapshot of a hub id: from the local cache where it is complete there, else downloaded."""
    wanted = ["*.json", "*.jinja", "*.txt", "*.model", *(["*.safetensors"] if weights else [])]
    if base.trust_remote_code:
        wanted.append("*.py")
    offline = constants.is_offline_mode()
    try:
        try:
            folder = _snapshot(source, base.revision, wanted, local=True)
            if offline or not any(_missing(folder, weights=weights)):
                return folder
        except LocalEntryNotFoundError:
            if offline:
                raise
        return _snapshot(source, base.revision, wanted, local=False)
    except LocalEntryNotFoundError as error:
        why = "the hub is switched off (HF_HUB_OFFLINE)" if offline else "the hub does not answer"
        what = f"it is no folder here and not in the local cache, and {why}"
        raise BaseError(what, where=source, try_="name a folder, or download it once while online") from error
    except (OSError, ValueError) as error:
        raise BaseError(f"it is no folder here, and the hub says: {first_line(error)}", where=source) from error


def _snapshot(source: str, revision: str | None, wanted: list[str], *, local: bool) -> Path:
    found = snapshot_download(
        source, revision=revision, allow_patterns=wanted, ignore_patterns=["*/*"], local_files_only=local
    )
    assert isinstance(found, str)
    return Path(found)


def read_json(path: Path, source: str) -> dict[str, Any]:
    """A JSON object from one of the base's files. Raises BaseError."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise BaseError(f"{path.name} cannot be read: {first_line(error)}", where=source) from error
    if not isinstance(value, dict):
        raise BaseError(f"{path.name} is not a JSON object", where=source)
    return value


def check_folder(folder: Path, source: str, *, weights: bool, trust_remote_code: bool) -> None:
    """Raise BaseError for what loading would stumble over, or do in silence."""
    if (folder / "adapter_config.json").exists():
        what = "this folder holds an adapter (adapter_config.json), which transformers would load on top of a base"
        raise BaseError(what, where=source, try_="name the folder of the base itself")
    missing = list(_missing(folder, weights=weights))
    if CONFIG in missing:
        raise BaseError("there is no config.json in it", where=source, there_is=[p.name for p in _files(folder)])
    config = read_json(folder / CONFIG, source)
    if not trust_remote_code and (kernels := sorted(set(_kernels(config)))):
        what = f"config.json asks for code from the hub: {', '.join(kernels)}"
        raise BaseError(what, where=source, try_="`trust_remote_code: true` under `base`, if you trust it")
    if not weights:
        return
    pickles = [path.name for pattern in PICKLES for path in sorted(folder.glob(pattern))]
    if WEIGHTS in missing and pickles:
        what = f"its weights are pickles ({', '.join(pickles[:3])}), which can run code when opened; none is read"
        where_trusted = "convert them once where you trust them: torch.load(…, weights_only=True), then save_file"
        raise BaseError(what, where=source, try_=where_trusted)
    if missing:
        there_is = [p.name for p in _files(folder)]
        raise BaseError(f"weights are missing: {', '.join(missing[:3])}", where=source, there_is=there_is)
    for name in shards(folder, source):
        try:
            with safe_open(folder / name, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise BaseError(f"{name} is truncated or damaged: {first_line(error)}", where=source) from error


def shards(folder: Path, source: str) -> list[str]:
    """The weight files by name: the single one, or those of the index."""
    if (folder / WEIGHTS).exists():
        return [WEIGHTS]
    names = read_json(folder / INDEX, source).get("weight_map")
    files = sorted({str(name) for name in names.values()}) if isinstance(names, dict) else []
    if not files or any(Path(name).name != name for name in files):
        raise BaseError(f"{INDEX} names no weight files beside it", where=source)
    return files


def _missing(folder: Path, *, weights: bool) -> Iterator[str]:
    """The files that a base needs and this folder lacks."""
    if not (folder / CONFIG).exists():
        yield CONFIG
    if weights and not (folder / WEIGHTS).exists():
        if not (folder / INDEX).exists():
            yield WEIGHTS
        else:
            yield from (name for name in shards(folder, str(folder)) if not (folder / name).exists())


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file())


def _kernels(config: object) -> Iterator[str]:
    """Implementations named as hub ids, here or in a configuration inside: transformers would download and run them."""
    if isinstance(config, dict):
        for key, value in config.items():
            if str(key).endswith("_implementation") and isinstance(value, str) and "/" in value:
                yield value
            yield from _kernels(value)


def first_line(error: BaseException) -> str:
    """What an error of another library says, cut to a line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
