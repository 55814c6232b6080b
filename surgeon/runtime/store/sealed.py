"""A stored task: a checked task file, and behind it what the check found, under one checksum.

One file a task is one rename a change: whoever reads sees the former task or the new one, whenever a writer dies. ONNX
Runtime reads such a file as it reads any task file; to it the end is nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import IO, Any

import numpy as np

from surgeon.errors import DeltaError
from surgeon.runtime.manifest import Manifest
from surgeon.runtime.store.places import Stream, failing
from surgeon.runtime.taskfile import Bytes
from surgeon.runtime.tasks import TaskInfo

MARK = b"SURGEON2"
TAIL = struct.Struct(f"<II{len(MARK)}s")  # length of the JSON, `checksum` of all before, the mark
WORDS = 512
"""Words of eight bytes in a row of the checksum: a page of memory."""
CHUNK = 64 * 8 * WORDS
"""Bytes that are read, summed and copied while a core's cache has them."""
MOST = 1 << 20
"""Bytes that what is said of a task may have."""


@dataclass(frozen=True)
class Seal:
    """What a check found. `ledger` tells which deltas it was checked against."""

    info: TaskInfo
    ledger: str
    checksum: int


def ledger_of(manifest: Manifest) -> str:
    """A hash of the base and the deltas that a task is checked against: what fits one build fits its equals."""
    deltas = [(d.name, d.axes, d.dtype, d.optional, sorted(d.least.items())) for d in manifest.deltas]
    return hashlib.sha256(json.dumps([manifest.base.fingerprint, deltas]).encode()).hexdigest()[:16]


def seal(data: bytes, info: TaskInfo, ledger: str) -> bytes:
    """A task file's bytes with what is known of them."""
    document = {
        "name": info.name,
        "labels": info.labels,
        "columns": info.columns,
        "sizes": dict(info.sizes),
        "parameters": info.parameters,
        "ledger": ledger,
    }
    body = data + json.dumps(document, sort_keys=True).encode()
    return body + TAIL.pack(len(body) - len(data), checksum([body]), MARK)


def checksum(chunks: Iterable[Bytes]) -> int:
    """CRC-32 of the sums of all rows and columns of words, and of what is left: it reads memory as fast as it comes.

    A change goes unseen where it leaves every row's and every column's sum as it was, or by CRC-32's chance. Every
    chunk but the last has whole rows.
    """
    columns, rows, left = np.zeros(WORDS, "<u8"), [], b""
    for chunk in chunks:
        count = memoryview(chunk).nbytes // (8 * WORDS)
        table = np.frombuffer(chunk, "<u8", count * WORDS).reshape(count, WORDS)
        columns += table.sum(0, dtype="<u8")
        rows.append(table.sum(1, dtype="<u8"))
        left = bytes(memoryview(chunk)[count * 8 * WORDS :])
    crc = zlib.crc32(columns.data)
    for sums in rows:
        crc = zlib.crc32(sums.data, crc)
    return zlib.crc32(left, crc)


def unseal(stream: Stream, name: str, ledger: str, where: str, out: IO[bytes] | None = None) -> Seal:
    """What is known of a stored task; its task file goes to `out`. Raises DeltaError where a byte is not as it was
    added, and then what `out` has is nothing.
    """
    document, crc, size = _document(stream, where)
    if checksum(_copied(stream, size, size - len(document), where, out)) != crc:
        raise DeltaError(
            "the stored task was changed after it was added: its checksum does not hold",
            where=where,
            try_="add it again",
        )
    found = read_seal(document, crc, where)
    if found.info.name != name:
        raise DeltaError(f"the stored file is of task '{found.info.name}', not of '{name}'", where=where)
    check_ledger(found, ledger, where)
    return found


def _copied(stream: Stream, size: int, most: int, where: str, out: IO[bytes] | None) -> Iterator[memoryview]:
    """A stream's first `size` bytes in chunks of one buffer, of which the first `most` are written to `out` too."""
    buffer = memoryview(bytearray(min(CHUNK, size)))
    for start in range(0, size, CHUNK):
        chunk = buffer[: size - start]
        _fill(chunk, stream, start, where)
        if out is not None:
            out.write(chunk[: max(most - start, 0)])
        yield chunk


def _fill(chunk: memoryview, stream: Stream, start: int, where: str) -> None:
    """Read so many bytes from there. Raises DeltaError where the stream ends before."""
    try:
        stream.seek(start)
        filled = 0
        while filled < len(chunk):
            count = stream.readinto(chunk[filled:])
            if not count:
                raise _foreign(where)
            filled += count
    except OSError as error:
        raise failing(error, where) from error


def check_ledger(found: Seal, ledger: str, where: str) -> None:
    """Was the task checked against the deltas of this build? Raises DeltaError."""
    if found.ledger != ledger:
        raise DeltaError(
            "the stored task was added for another build",
            where=where,
            there_is=f"deltas {ledger} in this build, {found.ledger} when it was added",
            try_="a store for each spec and base; or add the task again with this build",
        )


def read_seal(document: bytes, crc: int, where: str) -> Seal:
    """What a stored task says of itself."""
    try:
        doc: Mapping[str, Any] = json.loads(document)
        labels = doc["labels"]
        info = TaskInfo(
            name=str(doc["name"]),
            labels=None if labels is None else tuple(map(str, labels)),
            columns=None if doc["columns"] is None else int(doc["columns"]),
            sizes=MappingProxyType({str(symbol): int(size) for symbol, size in doc["sizes"].items()}),
            parameters=int(doc["parameters"]),
        )
        return Seal(info, str(doc["ledger"]), crc)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _foreign(where) from error


def _document(stream: Stream, where: str) -> tuple[bytes, int, int]:
    """The JSON at a file's end, its checksum, and the bytes that that is of."""
    size = stream.seek(0, os.SEEK_END) - TAIL.size
    if size < 0:
        raise _foreign(where)
    tail = bytearray(TAIL.size)
    _fill(memoryview(tail), stream, size, where)
    length, crc, mark = TAIL.unpack(tail)
    if mark != MARK or length > min(MOST, size):
        raise _foreign(where)
    document = bytearray(length)
    _fill(memoryview(document), stream, size - length, where)
    return bytes(document), crc, size


def _foreign(where: str) -> DeltaError:
    return DeltaError(
        "is not a stored task, or is cut",
        where=where,
        try_="put tasks into a store by `TaskStore.add` or `surgeon serve`'s admin route: it checks them",
    )
