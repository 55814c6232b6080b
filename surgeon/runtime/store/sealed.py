"""A stored task: a checked task file, and behind it what the check found, under one checksum.

One file a task is one rename a change: whoever reads sees the former task or the new one, whenever a writer dies. ONNX
Runtime reads such a file as it reads any task file; to it the end is nothing.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from surgeon.errors import DeltaError
from surgeon.runtime.manifest import Manifest
from surgeon.runtime.taskfile import Bytes
from surgeon.runtime.tasks import TaskInfo

MARK = b"SURGEON2"
TAIL = struct.Struct(f"<II{len(MARK)}s")  # length of the JSON, `checksum` of all before, the mark
WORDS = 512
"""Words of eight bytes in a row of the checksum: a page of memory."""
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
    return body + TAIL.pack(len(body) - len(data), checksum(body), MARK)


def checksum(data: Bytes) -> int:
    """CRC-32 of the sums of all rows and columns of words, and of what is left: it reads memory as fast as it comes.

    A change goes unseen where it leaves every row's and every column's sum as it was, or by CRC-32's chance.
    """
    count = memoryview(data).nbytes // (8 * WORDS)
    table = np.frombuffer(data, "<u8", count * WORDS).reshape(count, WORDS)
    crc = zlib.crc32(table.sum(1, dtype="<u8").data, zlib.crc32(table.sum(0, dtype="<u8").data))
    return zlib.crc32(memoryview(data)[count * 8 * WORDS :], crc)


def unseal(whole: Bytes, name: str, ledger: str, where: str) -> tuple[memoryview, Seal]:
    """The task file's bytes, and what is known of them. Raises DeltaError where one of them is not as it was added."""
    view = memoryview(whole)
    document, crc = document_of(view, where)
    if checksum(view[: -TAIL.size]) != crc:
        raise DeltaError(
            "the stored task was changed after it was added: its checksum does not hold",
            where=where,
            try_="add it again",
        )
    found = read_seal(document, crc, where)
    if found.info.name != name:
        raise DeltaError(f"the stored file is of task '{found.info.name}', not of '{name}'", where=where)
    check_ledger(found, ledger, where)
    return view[: -TAIL.size - len(document)], found


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


def document_of(end: Bytes, where: str) -> tuple[bytes, int]:
    """The JSON in a file's last bytes, and its checksum."""
    if len(end) < TAIL.size:
        raise _foreign(where)
    length, crc, mark = TAIL.unpack_from(end, len(end) - TAIL.size)
    if mark != MARK or length > MOST:
        raise _foreign(where)
    if length + TAIL.size > len(end):
        raise _foreign(where)
    return bytes(end[len(end) - TAIL.size - length : -TAIL.size]), crc


def _foreign(where: str) -> DeltaError:
    return DeltaError(
        "is not a stored task, or is cut",
        where=where,
        try_="put tasks into a store by `TaskStore.add` or `surgeon serve`'s admin route: it checks them",
    )
