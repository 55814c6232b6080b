"""Limits: what is too much, too slow or too late is refused at once, and all else goes on; a stop loses nothing."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from surgeon.errors import DataError, SpecError, UnknownTaskError
from surgeon.server.faults import Fault, status_of
from surgeon.server.gathering import Gatherer, Job, answer
from surgeon.server.limits import Limits
from tests.server.conftest import Live

Serving = Callable[..., Any]


def connect(live: Live) -> socket.socket:
    return socket.create_connection(("127.0.0.1", live.port), timeout=10)


def test_a_full_queue_is_told_and_empties(served_build: Path, serving: Serving) -> None:
    with serving(served_build, Limits(queue=2, wait=1.5)) as live, ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda _: live.ask("topic", "good"), range(8)))
        counts = {status: sum(reply.status == status for reply in replies) for status in (200, 429)}
        assert counts == {200: 2, 429: 6}
        busy = next(reply for reply in replies if reply.status == 429)
        assert "2 rows in the queue" in busy.json["error"]
        assert busy.headers["retry-after"] == "1"
        assert live.ask("topic", "good").status == 200


def test_a_deadline_that_passes_is_told(served_build: Path, serving: Serving) -> None:
    with serving(served_build, Limits(wait=0.3)) as live:
        late = live.ask("topic", "good", timeout=50_000)  # microseconds, as Triton counts
        assert (late.status, "within the deadline" in late.json["error"]) == (504, True)
        assert live.ask("topic", "good", timeout=5_000_000).status == 200
        assert live.ask("topic", "good").status == 200


def test_slow_bodies_and_silent_connections_are_closed(served_build: Path, serving: Serving) -> None:
    with serving(served_build, Limits(patience=1.0)) as live:
        with connect(live) as slow:
            slow.sendall(b"POST /v2/models/topic/infer HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
            with slow.makefile("rb") as reply:  # to the end: head and body may come apart
                assert reply.read().startswith(b"HTTP/1.1 408")
        with connect(live) as silent:
            assert silent.recv(10) == b""
        with connect(live) as dripping:
            dripping.sendall(b"GET / HTTP/1.1\r\nx: ")
            assert dripping.recv(10) == b""
        assert live.ask("topic", "good").status == 200


def test_a_thousand_connections_disturb_nobody(served_build: Path, serving: Serving) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(8192, hard), hard))
    opened: list[socket.socket] = []
    try:
        with serving(served_build, Limits(connections=1100)) as live:
            opened += [connect(live) for _ in range(1000)]
            assert live.ask("topic", "good").status == 200
            opened += [connect(live) for _ in range(150)]
            assert live.ask("topic", "good").status == 503  # told, not left waiting
            for one in opened:
                one.close()
            opened.clear()
            end = time.monotonic() + 10
            while (reply := live.ask("topic", "good")).status != 200 and time.monotonic() < end:
                time.sleep(0.05)
            assert reply.status == 200
    finally:
        for one in opened:
            one.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_clients_that_go_away_disturb_nobody(served_build: Path, serving: Serving) -> None:
    body = json.dumps({"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": ["good"]}]}).encode()
    head = f"POST /v2/models/topic/infer HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    with serving(served_build) as live:
        right = live.ask("topic", "good").json["outputs"][0]["data"]
        for sent in (b"", b"POST", head, head + body[:5], head + body, b"\x16\x03\x01\x02\0", b"GET /\r\n\r\n" * 9):
            with connect(live) as client:
                client.sendall(sent)
        np.testing.assert_allclose(live.ask("topic", "good").json["outputs"][0]["data"], right, atol=1e-5)


def test_a_stop_answers_what_was_taken_in(served_build: Path, tmp_path: Path) -> None:
    """SIGTERM while requests wait: every one is answered, and later ones find nobody. torch was never there."""
    code = (
        "import sys; from surgeon.server.run import serve; from surgeon.server.limits import Limits; "
        f"serve({str(served_build)!r}, port=0, threads=1, tune=True, limits=Limits(wait=1.0)); "
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = iter(process.stderr.readline, "")
    said = next(line for line in map(json.loads, lines) if line["event"] == "listening")
    assert said["fusions"] in ("all", ["SkipLayerNormFusion"])
    next(line for line in map(json.loads, lines) if line["event"] == "ready")
    live = Live(said["port"], None, None)  # type: ignore[arg-type]
    while True:
        try:
            connect(live).close()
            break
        except ConnectionRefusedError:
            time.sleep(0.05)
    with ThreadPoolExecutor(6) as pool:
        waiting = [pool.submit(live.ask, "topic", "good") for _ in range(6)]
        time.sleep(0.5)  # they are in, and wait for others
        process.send_signal(signal.SIGTERM)
        assert [future.result().status for future in waiting] == [200] * 6
    out, err = process.communicate(timeout=20)
    assert json.loads(err.splitlines()[-1])["event"] == "stopped"
    assert (process.returncode, out) == (0, "[]\n")
    with pytest.raises(ConnectionRefusedError):
        connect(live)


def test_the_command_says_what_is_wrong(served_build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from surgeon.cli import main

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["serve", str(served_build), "--port", str(taken.getsockname()[1])]) == 2
    assert "cannot listen" in capsys.readouterr().err
    assert main(["serve", str(served_build), "--base-name", "topic", "--port", "0"]) == 2
    assert "a task is called 'topic'" in capsys.readouterr().err
    assert main(["serve", str(served_build / "nothing"), "--port", "0"]) == 1
    assert main(["serve", str(served_build), "--log", "loud"]) == 2
    os.environ["SURGEON_ADMIN_TOKEN"] = "short"
    try:
        assert main(["serve", str(served_build), "--port", "0"]) == 2
    finally:
        del os.environ["SURGEON_ADMIN_TOKEN"]
    with pytest.raises(SpecError, match="queue is a number above 0"):
        Limits(queue=0)


class Slow:
    """A runner that writes down its batches, and goes on when it is told to."""

    def __init__(self) -> None:
        self.batches: list[list[Job]] = []
        self.go = threading.Semaphore(0)

    def __call__(self, jobs: list[Job]) -> None:
        self.batches.append(list(jobs))
        self.go.acquire()
        for job in jobs:
            answer(job, {"n": np.array([job.rows])})


def job(
    task: str | None = None, rows: int = 1, length: int = 8, form: str = "x", taken: int = 0, left: float = 60
) -> Job:
    return Job(task, {}, rows, length, taken, form, time.monotonic() + left)


@pytest.fixture
def gather() -> Iterator[Callable[..., tuple[Gatherer, Slow]]]:
    made: list[tuple[Gatherer, Slow]] = []

    def make(tasks: int = 3, room: int | None = 64, **limits: Any) -> tuple[Gatherer, Slow]:
        slow = Slow()
        gatherer = Gatherer(slow, Limits(**{"batch": 4, "wait": 0, **limits}), tasks=tasks, room=room)
        made.append((gatherer, slow))
        return gatherer, slow

    yield make
    for gatherer, slow in made:
        for _ in range(100):
            slow.go.release()
        gatherer.close()


def batches_of(gatherer: Gatherer, slow: Slow, jobs: list[Job]) -> list[list[int]]:
    """Numbers of the jobs of every batch; all are in before the second begins."""
    first = job(form="first")
    futures: list[Future[Any]] = [gatherer.submit(first)]
    while not slow.batches:
        time.sleep(0.001)
    futures += [gatherer.submit(one) for one in jobs]
    for _ in range(len(jobs) + 1):
        slow.go.release()
    for future in futures:
        future.result(5)
    return [[jobs.index(one) for one in batch] for batch in slow.batches[1:]]


def test_what_may_stand_together_does(gather: Callable[..., tuple[Gatherer, Slow]]) -> None:
    assert batches_of(*gather(), [job("a"), job("b"), job(), job("a"), job("b")]) == [[0, 1, 2, 3], [4]]
    assert batches_of(*gather(), [job(f"{i}") for i in range(4)]) == [[0, 1, 2], [3]]  # tasks at hand
    assert batches_of(*gather(tasks=1), [job("a"), job("b"), job("a")]) == [[0, 2], [1]]
    assert batches_of(*gather(), [job(form="x"), job(form="y"), job(form="x")]) == [[0, 2], [1]]
    assert batches_of(*gather(), [job(length=8), job(length=64), job(length=30)]) == [[0, 2], [1]]  # padding
    assert batches_of(*gather(), [job(rows=3), job(rows=3), job(rows=1)]) == [[0, 2], [1]]
    assert batches_of(*gather(), [job(rows=9), job()]) == [[0], [1]]  # larger than a batch, alone
    assert batches_of(*gather(tokens=100), [job(length=40), job(length=50), job(length=60)]) == [[0, 1], [2]]
    assert batches_of(*gather(), [job("a", length=50), job("b", length=40, taken=20)]) == [[0], [1]]  # positions


def test_late_and_cancelled_requests_are_not_run(gather: Callable[..., tuple[Gatherer, Slow]]) -> None:
    gatherer, slow = gather()
    gatherer.submit(job(form="first"))
    while not slow.batches:
        time.sleep(0.001)
    late, gone, kept = job(left=-1), job(), job()
    futures = [gatherer.submit(one) for one in (late, gone, kept)]
    futures[1].cancel()
    slow.go.release()
    slow.go.release()
    futures[2].result(5)
    assert slow.batches[1:] == [[kept]]
    with pytest.raises(Fault, match="within the deadline"):
        futures[0].result(5)


def test_one_waits_for_others_as_long_as_it_may(gather: Callable[..., tuple[Gatherer, Slow]]) -> None:
    gatherer, slow = gather(wait=1.0)
    begun = time.monotonic()
    gatherer.submit(job())
    time.sleep(0.05)
    gatherer.submit(job())
    while not slow.batches:
        time.sleep(0.001)
    assert time.monotonic() - begun > 0.9
    assert len(slow.batches[0]) == 2
    slow.go.release()
    begun = time.monotonic()
    for _ in range(4):
        gatherer.submit(job())
    while len(slow.batches) < 2:
        time.sleep(0.001)
    assert len(slow.batches[1]) == 4  # full, so it did not wait
    assert time.monotonic() - begun < 0.9


def test_a_batch_that_fails_fails_for_the_one_at_fault_alone(live: Live) -> None:
    """A task that vanishes between the door and the run: its request is told, its neighbours are answered."""
    answering = live.server.answering
    arrays = live.session.encode(["good"])
    path = Path(live.session._table._hand.store.where) / "t5.onnx_adapter"  # type: ignore[union-attr]
    doomed = answering.admit(arrays, "t5", time.monotonic() + 60)
    others = [answering.admit(arrays, name, time.monotonic() + 60) for name in ("t1", "t2")]
    kept = path.read_bytes()
    path.unlink()
    try:
        answering._run([others[0], doomed, others[1]])
    finally:
        path.write_bytes(kept)
    with pytest.raises(Fault, match="there is no task 't5'") as told:
        doomed.future.result(0)
    assert told.value.status == 404
    for one in others:
        right = live.session.run(arrays, one.task)["logits"]
        np.testing.assert_allclose(one.future.result(0)["logits"], right, atol=1e-5)
    with pytest.raises(DataError):
        answering.admit({"input_ids": np.array([[2.5]])}, "t1", time.monotonic() + 60)


def test_a_task_that_vanishes_behind_the_door_is_unknown_wherever_that_is_seen(live: Live) -> None:
    """Between the route's look and the request's preparation, too, and where it is back before anybody is told."""
    answering = live.server.answering
    arrays, store = live.session.encode(["good"]), live.session._table._hand.store  # type: ignore[union-attr]
    looks: tuple[Callable[[], object], ...] = (
        lambda: answering.admit(arrays, "gone", time.monotonic() + 60),
        lambda: live.session.run(arrays, "gone"),
        lambda: live.session.run(arrays, ["gone"]),
        lambda: store.info("gone"),
    )
    for look in looks:
        with pytest.raises(UnknownTaskError) as told:
            look()
        assert status_of(told.value) == 404
