"""The files of a build against what its manifest records of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from surgeon.errors import BuildError, shorten
from surgeon.runtime.fields import REBUILD
from surgeon.runtime.manifest import File, Manifest

CHANGED = "has other content (its hash differs)"


def hash_file(path: Path) -> str:
    """SHA-256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_files(build: str | Path, manifest: Manifest, names: Iterable[str] | None = None) -> None:
    """Compare files with the manifest: all, or those named. Raises one BuildError that lists every difference."""
    known = manifest.every_file()
    faults = []
    for name in known if names is None else names:
        fault = _fault(Path(build) / name, known[name])
        if fault:
            faults.append(f"{name} {fault}")
    if faults:
        raise damaged(build, faults)


def damaged(build: str | Path, faults: list[str]) -> BuildError:
    """The error for files that are not those the manifest was written with."""
    return BuildError(
        f"{len(faults)} of the build's files {'is' if len(faults) == 1 else 'are'} not what the manifest says",
        where=str(build),
        there_is=shorten(faults),
        try_=REBUILD,
    )


def read_file(build: str | Path, name: str, file: File, *, verify: bool = True) -> bytes:
    """The bytes of one file, compared with the manifest's record: those that are checked are those that are used."""
    try:
        data = (Path(build) / name).read_bytes()
    except OSError as error:
        raise damaged(build, [f"{name} cannot be read: {error.strerror}"]) from error
    if not verify:
        return data
    if file.bytes is not None and len(data) != file.bytes:
        raise damaged(build, [f"{name} has {len(data)} bytes instead of {file.bytes}"])
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise damaged(build, [f"{name} {CHANGED}"])
    return data


def _fault(path: Path, file: File) -> str | None:
    try:
        size = path.stat().st_size
        if file.bytes is not None and size != file.bytes:
            return f"has {size} bytes instead of {file.bytes}"
        return None if hash_file(path) == file.sha256 else CHANGED
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
