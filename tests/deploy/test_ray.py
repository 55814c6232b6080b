"""Replicas on Ray Serve: every answer is the session's own, also where a replica is killed under load."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tritonclient.http import InferenceServerClient, InferInput

import surgeon

ray = pytest.importorskip("ray")
serve = pytest.importorskip("ray.serve")

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.sweep, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def build(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("ray") / "build"
    spec = {
        "base": {"model": str(base_folder), "head": "sequence-classification"},
        "surgery": [{"lora": {"rank": 4, "start": "gaussian"}}, {"head": {}}],
        "tasks": {name: {"labels": ["bad", "good"]} for name in ("a", "b", "c")},
        "export": {"modes": ["switch", "mixed"]},
    }
    surgeon.compile(spec, out=folder)
    return folder


@pytest.fixture(scope="module")
def port(build: Path):
    """A free port behind which two replicas answer."""
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    from deploy.ray.app import app

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, configure_logging=False)
    serve.start(http_options={"host": "127.0.0.1", "port": number})
    serve.run(app({"build": str(build), "replicas": 2}), name="tasks", route_prefix="/")
    yield number
    serve.shutdown()
    ray.shutdown()


def test_a_killed_replica_costs_no_answer_and_makes_none_wrong(port: int, build: Path) -> None:
    feeds = [{n: np.full((1, k), v) for n, v in (("input_ids", 5 + k), ("attention_mask", 1))} for k in range(2, 10)]
    with surgeon.Session(build, threads=1) as session:
        wanted = {(t, i): session.run(feed, t)["logits"] for t in session.tasks for i, feed in enumerate(feeds)}
    asked = [(task, i) for _ in range(20) for task, i in wanted]
    before = _processes()
    assert len(before) == 2

    def ask(which: tuple[str, int]) -> np.ndarray:
        task, i = which
        inputs = []
        for name, array in feeds[i].items():
            one = InferInput(name, list(array.shape), "INT64")
            one.set_data_from_numpy(array.astype(np.int64))
            inputs.append(one)
        client = InferenceServerClient(f"127.0.0.1:{port}", network_timeout=60, connection_timeout=60)
        try:
            found: np.ndarray = client.infer(task, inputs).as_numpy("logits")
        finally:
            client.close()
        return found

    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(ask, which) for which in asked]
        while sum(answer.done() for answer in answers) < len(asked) // 4:
            time.sleep(0.05)
        os.kill(min(before), signal.SIGKILL)
        found = [answer.result() for answer in answers]
    for which, logits in zip(asked, found, strict=True):
        np.testing.assert_allclose(logits, wanted[which], rtol=0, atol=1e-6 * np.abs(wanted[which]).max())
    end = time.monotonic() + 90
    while len(after := _processes()) < 2 and time.monotonic() < end:
        time.sleep(0.5)
    assert len(after) == 2
    assert after != before


def _processes() -> set[int]:
    """The replicas' processes: asked often enough that both are among them."""
    handle = serve.get_deployment_handle("Replica", "tasks")
    return {handle.process.remote().result(timeout_s=60) for _ in range(16)}
