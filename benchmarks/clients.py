"""What soak and load tests share: a served build in a process of its own, and its clients."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from surgeon.runtime import Manifest

TOKEN = "soak-soak-soak"


@dataclass(frozen=True)
class Process:
    """A server that somebody else could run."""

    port: int
    process: subprocess.Popen[str]

    @property
    def resident(self) -> int:
        """Bytes of memory."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def served(*arguments: str) -> Iterator[Process]:
    """`surgeon serve` with these arguments, on a free port, until the end of the block; then it must stop in peace."""
    command = [sys.executable, "-m", "surgeon", "serve", *arguments, "--port", "0"]
    environment = {**os.environ, "SURGEON_ADMIN_TOKEN": TOKEN}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    said: list[dict[str, Any]] = []
    for line in process.stderr:
        said.append(json.loads(line))
        if said[-1]["event"] == "ready":
            break
    else:
        raise RuntimeError(f"the server did not start: {said}")
    faults: list[str] = []
    reader = threading.Thread(target=lambda: faults.extend(x for x in process.stderr or () if '"traceback"' in x))
    reader.start()
    try:
        yield Process(next(line["port"] for line in said if line["event"] == "listening"), process)
    finally:
        process.terminate()
        code = process.wait(60)
        reader.join()
        process.stderr.close()
    if code or faults:
        raise RuntimeError(f"the server ended with {code}: {faults[:3]}")


class Client:
    """One connection, opened again where the server closed it."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def send(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, bytes]:
        """Status and body."""
        try:
            self._connection.request(method, path, body, headers)
        except (BrokenPipeError, ConnectionResetError):
            self._connection.close()
            self._connection.request(method, path, body, headers)
        answer = self._connection.getresponse()
        return answer.status, answer.read()

    def infer(self, task: str, texts: Sequence[str]) -> tuple[int, Any]:
        """Status, and the logits or the error."""
        status, body = self.send("POST", f"/v2/models/{task}/infer", asked(texts))
        if status != 200:
            return status, body
        tensor = json.loads(body)["outputs"][0]
        return status, np.array(tensor["data"], np.float32).reshape(tensor["shape"])

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


def asked(texts: Sequence[str]) -> bytes:
    """A request for the logits of texts."""
    tensor = {"name": "text", "datatype": "BYTES", "shape": [len(texts)], "data": list(texts)}
    return json.dumps({"inputs": [tensor], "outputs": [{"name": "logits"}]}).encode()


def random_task(manifest: Manifest, seed: int, rank: int, labels: int) -> dict[str, np.ndarray]:
    """Values of a task, large enough to tell tasks apart."""
    rng = np.random.default_rng(seed)
    sizes = {symbol: labels if symbol == "labels" else rank for d in manifest.deltas for symbol in d.free.values()}
    shapes = {d.name: [sizes.get(str(axis), axis) for axis in d.axes] for d in manifest.deltas}
    return {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}
