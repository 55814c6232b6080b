"""The server under load that does not wait for it, against FastAPI with PEFT; writes docs/benchmarks-serving.md.

Requests arrive at random at a rate (an open loop: the next does not wait for the last), and their latency counts from
when they should have been sent. Each names one of many tasks, few of them often (Zipf). A rate that a server cannot
hold ends its row of rates. `make bench-serving`; `--seconds` of every rate, `--rates`, `--tasks`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file, save_file

import surgeon
from benchmarks.bases import BASES, open_model
from benchmarks.clients import asked, random_task, served
from benchmarks.machine import machine
from benchmarks.measure import THREADS, Section
from surgeon.runtime import Session, read_manifest
from surgeon.runtime.store import TaskStore
from surgeon.runtime.store.sealed import ledger_of, seal
from surgeon.runtime.taskfile import SUFFIX, write_adapter
from surgeon.runtime.tasks import TaskInfo

BASE = "MiniLM-L6"
RANK, KINDS = 8, 32
"""Of every task; and how many values there are, which the files repeat."""
TASKS, RATES, RESIDENT = (1, 100, 10_000), (10, 20, 40, 80, 160), 64
PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks-serving.md"
WORDS = (
    "the",
    "film",
    "was",
    "a",
    "slow",
    "and",
    "lovely",
    "thing",
    "that",
    "nobody",
    "in",
    "long",
    "rooms",
    "forgave",
)
HELD = 0.95
"""Share of requests that must be answered, each within `LATEST` seconds, for a rate to count as held."""
LATEST = 2.0


@dataclass(frozen=True)
class Load:
    """What came of one rate."""

    rate: float
    answered: float
    p50: float
    p99: float
    held: bool

    def shown(self) -> tuple[str, str, str]:
        """As cells."""
        return f"{self.answered:.1f}", f"{1000 * self.p50:.0f} ms", f"{1000 * self.p99:.0f} ms"


def names(count: int, draws: int, seed: int) -> list[str]:
    """Tasks as they are asked for: the k-th with a share of 1/k."""
    weights = [1 / k for k in range(1, count + 1)]
    return [f"t{i}" for i in random.Random(seed).choices(range(count), weights, k=draws)]


def sentence(seed: int) -> str:
    """Eight to forty words."""
    rng = random.Random(seed)
    return " ".join(rng.choices(WORDS, k=rng.randint(8, 40)))


async def send(port: int, path: str, body: bytes, idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]) -> int:
    """One request over a connection that is free, or a new one; its status."""
    reader, writer = idle.pop() if idle else await asyncio.open_connection("127.0.0.1", port)
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
    length = next(int(line.split(":")[1]) for line in lines if line.startswith("content-length"))
    await reader.readexactly(length)
    idle.append((reader, writer))
    return int(lines[0].split()[1])


async def load(
    port: int, request: Callable[[str, str], tuple[str, bytes]], count: int, rate: float, seconds: float
) -> Load:
    """Requests at a rate, for so long; then what is under way may end."""
    rng, idle = random.Random(rate), []  # type: ignore[var-annotated]
    total = max(int(rate * seconds), 8)
    drawn = names(count, total, seed=int(rate))
    times: list[float] = []
    statuses: list[int] = []

    async def one(at: float, number: int) -> None:
        await asyncio.sleep(at - time.perf_counter())
        path, body = request(drawn[number], sentence(number))
        statuses.append(await send(port, path, body, idle))
        times.append(time.perf_counter() - at)

    at, tasks, begun = time.perf_counter() + 0.05, [], time.perf_counter()
    for number in range(total):
        at += rng.expovariate(rate)
        tasks.append(asyncio.create_task(one(at, number)))
    _, late = await asyncio.wait(tasks, timeout=at - begun + LATEST)
    span = max(time.perf_counter() - begun, at - begun)
    for task in late:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for _, writer in idle:
        writer.close()
    good = sorted(t for t, status in zip(times, statuses, strict=True) if status == 200)
    if not good:
        return Load(rate, 0, float("inf"), float("inf"), False)
    p50, p99 = (good[min(int(share * len(good)), len(good) - 1)] for share in (0.5, 0.99))
    return Load(rate, len(good) / span, p50, p99, len(good) >= HELD * total and p99 <= LATEST)


def write_tasks(build: Path, folder: Path, count: int) -> None:
    """A store of so many tasks: the bytes that `TaskStore.add` writes, without its flush to the disk."""
    manifest = read_manifest(build)
    store = folder / "store"
    TaskStore(store, build)
    values = []
    for kind in range(min(KINDS, count)):
        path = folder / f"{kind}{SUFFIX}"
        tensors = random_task(manifest, kind, RANK, 2)
        write_adapter(path, tensors, manifest.base.fingerprint)
        values.append((path.read_bytes(), tensors))
    symbols = {symbol: RANK for delta in manifest.deltas for symbol in delta.free.values()}
    for i in range(count):
        data, tensors = values[i % len(values)]
        info = TaskInfo(f"t{i}", None, None, symbols, sum(array.size for array in tensors.values()))
        (store / f"t{i}{SUFFIX}").write_bytes(seal(data, info, ledger_of(manifest)))


def write_peer(build: Path, folder: Path, wanted: set[str]) -> None:
    """The same tasks as PEFT saves them; only those that will be asked for."""
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["query", "value"])
    get_peft_model(open_model(BASE), config).save_pretrained(str(folder / "peft-form"))
    form = load_file(folder / "peft-form" / "adapter_model.safetensors")
    manifest = read_manifest(build)
    for name in wanted:
        tensors = random_task(manifest, int(name[1:]) % KINDS, RANK, 2)
        made = {}
        for key in form:
            site, _, part = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
            made[key] = np.ascontiguousarray(tensors[f"{site}.{part}"].T)
            assert made[key].shape == form[key].shape
        (folder / "peft" / name).mkdir(parents=True)
        shutil.copy(folder / "peft-form" / "adapter_config.json", folder / "peft" / name)
        save_file(made, folder / "peft" / name / "adapter_model.safetensors", {"format": "pt"})


@contextmanager
def peer(folder: Path, build: Path) -> Iterator[int]:
    """The peer's port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [folder / "peft", build / "tokenizer.json", BASE, THREADS, port]
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.peft_server", *map(str, arguments)])
    try:
        while process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionRefusedError:
                time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait()


def ours(task: str, text: str) -> tuple[str, bytes]:
    """A request to us."""
    return f"/v2/models/{task}/infer", asked([text])


def theirs(task: str, text: str) -> tuple[str, bytes]:
    """The same to the peer."""
    return "/infer", json.dumps({"task": task, "text": text}).encode()


async def rates(
    port: int, request: Callable[[str, str], tuple[str, bytes]], count: int, wanted: Sequence[float], seconds: float
) -> dict[float, Load]:
    """Rising rates until one is not held."""
    await load(port, request, min(count, 8), 10, 1)  # warm
    found: dict[float, Load] = {}
    for rate in wanted:
        found[rate] = await load(port, request, count, rate, seconds)
        if not found[rate].held:
            break
    return found


def same(build: Path, folder: Path, port: int) -> float:
    """How far the peer's answer is from ours, relative to the largest logit."""
    import urllib.request

    text = sentence(0)
    body = theirs("t0", text)[1]
    request = urllib.request.Request(f"http://127.0.0.1:{port}/infer", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        found = np.array(json.load(answer)["logits"])
    with Session(build, threads=THREADS, store=folder / "store") as session:
        right = session.run(session.encode([text]), "t0")["logits"][0]
    return float(np.abs(found - right).max() / np.abs(right).max())


def make(build: Path) -> None:
    """A build of the base with LoRA."""
    spec = {
        "base": BASES[BASE],
        "surgery": [{"lora": {"rank": RANK, "where": ["attention.query", "attention.value"]}}],
        "export": {"modes": ["switch", "mixed"]},
    }
    surgeon.compile(spec, out=build)


def measure(build: Path, count: int, wanted: Sequence[float], seconds: float) -> Section:
    """A table of one number of tasks."""
    with tempfile.TemporaryDirectory(prefix="serving-") as name:
        folder = Path(name)
        write_tasks(build, folder, count)
        warm = set(names(min(count, 8), 10, 10))
        asked_for = {n for rate in wanted for n in names(count, max(int(rate * seconds), 8), int(rate))}
        write_peer(build, folder, warm | asked_for | {"t0"})
        options = ("--store", str(folder / "store"), "--threads", str(THREADS), "--resident", str(RESIDENT))
        with served(str(build), *options) as server:
            mine = asyncio.run(rates(server.port, ours, count, wanted, seconds))
        with peer(folder, build) as port:
            apart = same(build, folder, port)
            other = asyncio.run(rates(port, theirs, count, wanted, seconds))
    rows = []
    for rate in wanted:
        cells = [load_.shown() if (load_ := side.get(rate)) else ("–", "–", "–") for side in (mine, other)]
        rows.append((f"{rate:g}", *cells[0], *cells[1]))
    return Section(
        f"{count:,} tasks",
        f"Requests per second asked for; answered per second, and latency, of ours and of FastAPI with PEFT. Their "
        f"answers agree to {apart:.0e}.",
        ("rate", "ours", "p50", "p99", "FastAPI + PEFT", "p50", "p99"),
        tuple(rows),
    )


def main() -> None:
    """Measure, print, and where all was measured write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--tasks", type=int, nargs="+", default=TASKS)
    given = parser.parse_args()
    sections = []
    with tempfile.TemporaryDirectory(prefix="serving-") as name:
        make(Path(name, "build"))
        for count in given.tasks:
            sections.append(measure(Path(name, "build"), count, given.rates, given.seconds))
            print(sections[-1].markdown(), flush=True)
    if tuple(given.tasks) == TASKS and tuple(given.rates) == RATES:
        head = (
            "# Serving under load\n\nWritten by `make bench-serving`: one machine, clients and server on the same "
            f"cores, {THREADS} threads each; {BASE} with LoRA r={RANK} on q and v, sentences of 8 to 40 words. "
            f"Open loop, Zipf over the tasks, {RESIDENT} tasks held by either server. A rate that is not held (fewer "
            f"than {HELD:.0%} answered, or p99 above {LATEST:g} s) is the last of its column.\n\n"
            f"Machine: {machine('onnxruntime', 'torch', 'peft', 'fastapi', 'uvicorn')}.\n"
        )
        PAGE.write_text(head + "".join(f"\n{section.markdown()}" for section in sections), encoding="utf-8")


if __name__ == "__main__":
    main()
