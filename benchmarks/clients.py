"""What soak and load tests share: a served build in a process of its own, and its clients."""

from __future__ import annotations

import http.client
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from surgeon.runtime import Manifest

TOKEN = "soak-soak-soak"
PATIENCE = 60.0
"""Seconds after which a request that nobody answers is given up."""


@dataclass(frozen=True)
class Process:
    """A server that somebody else could run."""

    port: int
    process: subprocess.Popen[str]
    faults: list[str]
    reader: threading.Thread

    def stop(self) -> None:
        """Ask it to end, which it must do in peace."""
        self.process.terminate()
        code = self._end()
        if code or self.faults:
            raise RuntimeError(f"the server ended with {code}: {self.faults[:3]}")

    def kill(self) -> None:
        """End it at once, whatever it is at."""
        self.process.kill()
        self._end()

    def _end(self) -> int:
        code = self.process.wait(60)
        self.reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()
        return code

    @property
    def resident(self) -> int:
        """Bytes of memory."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def served(*arguments: str) -> Iterator[Process]:
    """`surgeon serve` with these arguments until the end of the block."""
    process = start(*arguments)
    try:
        yield process
    finally:
        process.stop()


def start(*arguments: str) -> Process:
    """`surgeon serve` with these arguments, on a free port."""
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
    return Process(next(line["port"] for line in said if line["event"] == "listening"), process, faults, reader)


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

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


class Retrying:
    """A client of several replicas: where one does not answer, another is asked."""

    def __init__(self, replicas: Sequence[Process], rng: random.Random) -> None:
        self._replicas, self._rng = replicas, rng
        self._clients: dict[int, Client] = {}
        self.retried = 0
        """How often the last request was sent again."""

    def send(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, bytes]:
        """Status and body. Raises what the last replica failed with, where none answers for long."""
        self.retried, end = 0, time.monotonic() + PATIENCE
        while True:
            port = self._rng.choice(self._replicas).port
            client = self._clients.setdefault(port, Client(port))
            try:
                return client.send(method, path, body, **headers)
            except (OSError, http.client.HTTPException):
                self._clients.pop(port).close()
                self.retried += 1
                if time.monotonic() > end:
                    raise
                time.sleep(0.01)

    def infer(self, task: str, texts: Sequence[str]) -> tuple[int, Any]:
        """Status, and the logits or the error."""
        status, body = self.send("POST", f"/v2/models/{task}/infer", asked(texts))
        return status, logits(body) if status == 200 else body

    def close(self) -> None:
        """Close all connections."""
        for client in self._clients.values():
            client.close()


def logits(body: bytes) -> np.ndarray:
    """The first output of an answer."""
    tensor = json.loads(body)["outputs"][0]
    return np.array(tensor["data"], np.float32).reshape(tensor["shape"])


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
