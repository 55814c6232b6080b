"""Servers under mixed load while tasks come, change and go, among bad requests and slow clients; `make soak`.

Two of them share a store, and one is killed and started again now and then; its clients ask the other. Every answer is
compared with what its task alone gives. A task that changed while a request was under way may answer as either; nothing
else is right. Memory of the server that lives must stay flat.
"""

from __future__ import annotations

import argparse
import random
import socket
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.clients import TOKEN, Client, Process, Retrying, random_task, start
from surgeon import Session
from surgeon.runtime import read_manifest
from surgeon.runtime.store import TaskStore
from surgeon.runtime.taskfile import SUFFIX, write_adapter

STABLE, CHANGING, VARIANTS, CALLERS, REPLICAS = 40, 8, 4, 4, 2
LIFE = 20.0
"""Seconds at most between a server's start and its end."""
TEXTS = ("a fine film", "the film was dull", "good", "bad bad film", "it was a great film and a fine one the whole way")
BAD: tuple[tuple[str, str, bytes], ...] = (
    ("POST", "/v2/models/s0/infer", b"{"),
    ("POST", "/v2/models/nothing/infer", b"{}"),
    ("POST", "/v2/models/s0/infer", b'{"inputs":[{"name":"input_ids","datatype":"INT64","shape":[1,1],"data":[-5]}]}'),
    (
        "POST",
        "/v2/models/s0/infer",
        b'{"inputs":[{"name":"input_ids","datatype":"INT64","shape":[1,1],"data":[99999999]}]}',
    ),
    ("POST", "/v2/models/s0/infer", b" " * (8_100_000)),
    ("PUT", "/admin/tasks/s0?replace=true", b"junk"),
    ("PUT", "/admin/tasks/s0", b""),
    ("GET", "/v2/models/..%2Fx", b""),
)
GROWTH, SLACK = 1.05, 16 << 20
"""How far memory of the last quarter may be from that of the second: a share, and bytes."""


@dataclass
class History:
    """Which variants a name had, and when: a change is both from its beginning to its end."""

    spans: list[tuple[float, float | None, int | None]] = field(default_factory=lambda: [(0.0, None, None)])

    def during(self, begin: float, end: float) -> set[int | None]:
        """Variants that an answer may come from, None for no task at all."""
        return {variant for start, stop, variant in self.spans if start <= end and (stop is None or stop >= begin)}


@dataclass
class Soak:
    """One run."""

    replicas: list[Process]
    begin: Callable[[], Process]
    store: TaskStore
    files: list[Path]
    right: dict[tuple[int, str], np.ndarray]
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)
    histories: dict[str, History] = field(default_factory=lambda: {f"c{i}": History() for i in range(CHANGING)})

    def run(self, seconds: float) -> None:
        """All clients until the end of the time."""
        work: list[Callable[[], None]] = [lambda i=i: self.call(i) for i in range(CALLERS)]  # type: ignore[misc]
        work += [self.change, self.misbehave, self.dawdle, lambda: self.kill(min(LIFE, seconds / 6))]
        threads = [threading.Thread(target=self._guarded, args=(one,)) for one in work]
        for thread in threads:
            thread.start()
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.wrong:
            self.memory.append(self.replicas[0].resident)
            time.sleep(min(1.0, seconds / 60))
        self.over.set()
        for thread in threads:
            thread.join()

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self.wrong.append(f"{type(error).__name__}: {error}")

    def call(self, seed: int) -> None:
        """Ask, and compare every answer."""
        rng = random.Random(seed)
        client = Retrying(self.replicas, rng)
        while not self.over.is_set():
            texts = rng.sample(TEXTS, rng.randint(1, 2))
            changing = rng.random() < 0.3
            name = f"c{rng.randrange(CHANGING)}" if changing else f"s{min(int(rng.paretovariate(0.7)), STABLE) - 1}"
            begun = time.monotonic()
            status, found = client.infer(name, texts)
            ended = time.monotonic()
            self.counts["asked again"] += client.retried
            allowed = self.histories[name].during(begun, ended) if changing else {int(name[1:])}
            self._judge(name, texts, status, found, allowed)
        client.close()

    def _judge(self, name: str, texts: list[str], status: int, found: object, allowed: set[int | None]) -> None:
        if status == 404 and None in allowed:
            self.counts["no task"] += 1
            return
        if status != 200 or not isinstance(found, np.ndarray):
            self.wrong.append(f"{name}: status {status}, {found!r}")
            return
        for variant in allowed - {None}:
            right = np.stack([self.right[variant, text] for text in texts])  # type: ignore[index]
            if right.shape == found.shape and np.abs(found - right).max() <= 1e-4 * np.abs(right).max():
                self.counts["right"] += len(texts)
                return
        self.wrong.append(f"{name}: an answer of none of {allowed}: {found.tolist()}")

    def change(self) -> None:
        """Add, replace and remove, by the admin route and behind the server's back by turns."""
        rng = random.Random(7)
        client = Retrying(self.replicas, rng)
        headers = {"authorization": f"Bearer {TOKEN}"}
        while not self.over.wait(0.02):
            name, variant = f"c{rng.randrange(CHANGING)}", STABLE + rng.randrange(VARIANTS)
            history = self.histories[name]
            there = history.spans[-1][2] is not None
            remove, here = there and rng.random() < 0.3, rng.random() < 0.5
            history.spans.append((time.monotonic(), None, None if remove else variant))
            path = f"/admin/tasks/{name}"
            status, client.retried = 0, 0
            if remove and here:
                self.store.remove(name)
            elif remove:
                status, _ = client.send("DELETE", path, **headers)
            elif here:
                self.store.add(self.files[variant], name, replace=True)
            else:
                status, _ = client.send("PUT", f"{path}?replace=true", self.files[variant].read_bytes(), **headers)
            if status not in {0, 201, 204} and not (status == 404 and client.retried):  # done before it was killed
                self.wrong.append(f"{name}: a change has status {status}")
            start, _, before = history.spans[-2]
            history.spans[-2] = (start, time.monotonic(), before)
            del history.spans[:-16]
            self.counts["changes"] += 1
        client.close()

    def misbehave(self) -> None:
        """Send what is wrong; it must be told so."""
        rng = random.Random(8)
        while not self.over.wait(0.05):
            method, path, body = rng.choice(BAD)
            client = Client(self.replicas[0].port)
            try:
                status, _ = client.send(method, path, body, authorization=f"Bearer {TOKEN}")
            except (BrokenPipeError, ConnectionResetError):
                status = 413  # closed while it was still sent
            if not 400 <= status < 500:
                self.wrong.append(f"{method} {path}: status {status} for a bad request")
            self.counts["bad requests"] += 1
            client.close()

    def dawdle(self) -> None:
        """Begin requests and go away, or send them byte by byte."""
        rng = random.Random(9)
        head = b"POST /v2/models/s0/infer HTTP/1.1\r\nhost: x\r\ncontent-length: 500\r\n\r\n"
        while not self.over.wait(0.05):
            with socket.create_connection(("127.0.0.1", self.replicas[0].port)) as slow:
                for byte in head[: rng.randrange(len(head) + 1)]:
                    slow.sendall(bytes([byte]))
                    if self.over.wait(0.002):
                        break
            self.counts["slow clients"] += 1

    def kill(self, life: float) -> None:
        """Kill all servers but the first, each after so many seconds, and start another in its place."""
        while not self.over.wait(life):
            for at in range(1, len(self.replicas)):
                self.replicas[at].kill()
                self.over.wait(life / 10)
                self.replicas[at] = self.begin()
                self.counts["kills"] += 1

    def flat(self) -> tuple[bool, float, float]:
        """Whether memory stayed, and its medians in MB."""
        quarter = max(len(self.memory) // 4, 1)
        early, late = (statistics.median(part) for part in (self.memory[quarter : 2 * quarter], self.memory[-quarter:]))
        return late <= GROWTH * early + SLACK, early / 1e6, late / 1e6


def soak(build: Path, seconds: float) -> Soak:
    """Serve a build with the mode mixed, and soak it. Raises AssertionError for any wrong answer."""
    manifest = read_manifest(build)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        files, store = [], TaskStore(Path(folder, "store"), build)
        for i in range(STABLE + VARIANTS):
            files.append(Path(folder, f"{i}{SUFFIX}"))
            write_adapter(files[-1], random_task(manifest, i, 1 + i % 8, 2 + i % 3), manifest.base.fingerprint)
        for i in range(STABLE):
            store.add(files[i], f"s{i}")
        with Session(build, threads=1) as session:
            right = {}
            for i, path in enumerate(files):
                session.add_task(path, "one", replace=True)
                for text in TEXTS:
                    right[i, text] = session.run(session.encode([text], task="one"), "one")["logits"][0]
        begin = partial(start, str(build), "--store", store.where, "--resident", "12", "--threads", "1")
        run = Soak([begin() for _ in range(REPLICAS)], begin, store, files, right)
        try:
            run.run(seconds)
        finally:
            for server in run.replicas:
                server.stop()
    assert not run.wrong, run.wrong[:5]
    stayed, early, late = run.flat()
    assert stayed, f"memory grew from {early:.0f} to {late:.0f} MB"
    return run


def main() -> None:
    """Soak a MiniLM with LoRA and heads."""
    import surgeon
    from benchmarks.bases import BASES

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    seconds: float = parser.parse_args().seconds
    with tempfile.TemporaryDirectory() as folder:
        spec = {
            "base": BASES["MiniLM-L6"],
            "surgery": [{"lora": {"rank": 8}}, {"head": {}}],
            "tasks": {"first": {"labels": 2}},
            "export": {"modes": ["switch", "mixed"]},
        }
        surgeon.compile(spec, out=Path(folder, "build"))
        run = soak(Path(folder, "build"), seconds)
    _, early, late = run.flat()
    said = ", ".join(f"{count:,} {name}" for name, count in sorted(run.counts.items()))
    print(f"{seconds:.0f} s, {REPLICAS} servers: 0 wrong; {said}; memory {early:.0f} MB, then {late:.0f} MB")


if __name__ == "__main__":
    main()
