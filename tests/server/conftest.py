"""A small real build behind a real server on a port of this machine, in a thread of the test."""

from __future__ import annotations

import json
import logging
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn

import surgeon
from surgeon.runtime import Manifest, Session, read_manifest
from surgeon.runtime.taskfile import SUFFIX, write_adapter
from surgeon.server.app import Server, make_server
from surgeon.server.limits import Limits
from surgeon.server.run import configure, listen

TOKEN = "open sesame"
TEXTS = ("a fine film", "the film was dull", "good", "a poor film was the film the film a great film was")


def tensors(manifest: Manifest, seed: int, rank: int = 4, labels: int = 2) -> dict[str, np.ndarray]:
    """A task's values, large enough to tell tasks apart."""
    rng = np.random.default_rng(seed)
    sizes = {symbol: labels if symbol == "labels" else rank for d in manifest.deltas for symbol in d.free.values()}
    shapes = {d.name: [sizes.get(str(axis), axis) for axis in d.axes] for d in manifest.deltas}
    return {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


def write_task(build: Path, path: Path, seed: int, rank: int = 4, labels: int = 2) -> Path:
    """A task file of random values."""
    manifest = read_manifest(build)
    write_adapter(path, tensors(manifest, seed, rank, labels), manifest.base.fingerprint)
    return path


@dataclass(frozen=True)
class Reply:
    """What the server answered."""

    status: int
    body: bytes
    headers: dict[str, str]

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Live:
    """A running server."""

    port: int
    session: Session
    server: Server

    @property
    def url(self) -> str:
        return f"127.0.0.1:{self.port}"

    def call(
        self, method: str, path: str, body: bytes | dict[str, Any] | None = None, timeout: float = 20, **headers: str
    ) -> Reply:
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(f"http://{self.url}{path}", data, given, method=method)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return Reply(answer.status, answer.read(), {k.lower(): v for k, v in answer.headers.items()})
        except urllib.error.HTTPError as error:
            with error:
                return Reply(error.code, error.read(), {k.lower(): v for k, v in error.headers.items()})

    def ask(self, task: str, *texts: str, **parameters: Any) -> Reply:
        """Classify texts."""
        tensor = {"name": "text", "datatype": "BYTES", "shape": [len(texts)], "data": list(texts)}
        return self.call("POST", f"/v2/models/{task}/infer", {"inputs": [tensor], "parameters": parameters})


@pytest.fixture(scope="session")
def served_build(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRA and heads of two tasks, with the mode mixed."""
    folder = tmp_path_factory.mktemp("served")
    surgeon.compile(
        {
            "base": {"model": str(base_folder), "head": "sequence-classification"},
            "surgery": [{"lora": {"rank": 4}}, {"head": {}}],
            "tasks": {"sentiment": {"labels": ["bad", "good"]}, "topic": {"labels": ["a", "b", "c"]}},
            "export": {"modes": ["switch", "mixed"]},
        },
        out=folder / "build",
    )
    return folder / "build"


@contextmanager
def run_server(build: Path, limits: Limits | None = None, *, port: int = 0, **options: Any) -> Iterator[Live]:
    """Serve until the end of the block."""
    store = options.pop("store", None)
    limits = limits or Limits()
    with Session(build, threads=1, store=store, resident=options.get("resident", 64)) as session:
        server = make_server(session, limits, **options)
        listening = listen("127.0.0.1", port)
        running = uvicorn.Server(configure(server, limits))
        thread = threading.Thread(target=running.run, args=([listening],))
        thread.start()
        try:
            while not running.started:
                time.sleep(0.01)
            yield Live(listening.getsockname()[1], session, server)
        finally:
            running.should_exit = True
            thread.join()
            listening.close()


@pytest.fixture(scope="session")
def serving() -> Callable[..., Any]:
    logging.getLogger("surgeon.server").propagate = False
    return run_server


@pytest.fixture(scope="module")
def live(served_build: Path, serving: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server with a store of six tasks, `t0` to `t5`, of several ranks and numbers of labels."""
    folder = tmp_path_factory.mktemp("store")
    with serving(served_build, store=folder / "tasks", token=TOKEN) as server:
        for i in range(6):
            path = write_task(served_build, folder / f"t{i}{SUFFIX}", seed=i, rank=1 + i, labels=2 + i % 3)
            server.session.add_task(path, f"t{i}")
        yield server


@pytest.fixture
def task_file(served_build: Path, tmp_path: Path) -> Callable[..., Path]:
    def make(seed: int, **sizes: int) -> Path:
        return write_task(served_build, tmp_path / f"task-{seed}{SUFFIX}", seed, **sizes)

    return make
