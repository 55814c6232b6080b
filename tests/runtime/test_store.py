"""The store of tasks: checked when added, one rename a change, whole whenever a writer dies."""

from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import numpy as np
import pytest
from typing_extensions import Buffer

from surgeon.errors import BuildError, DeltaError, SpecError
from surgeon.runtime.store import TaskStore
from surgeon.runtime.store.sealed import CHUNK, seal, unseal
from surgeon.runtime.taskfile import SUFFIX
from surgeon.runtime.tasks import TaskInfo

Pack = Callable[..., Path]

WRITER = """
import itertools, sys
from pathlib import Path
from surgeon.errors import SpecError
from surgeon.runtime.store import TaskStore
build, folder, *files = map(Path, sys.argv[1:])
store = TaskStore(folder, build)
print("ready", flush=True)
for i in itertools.count():
    name = f"t{i % 3}"
    store.add(files[i % len(files)], name, replace=True)
    if i % 5 == 4:
        try:
            store.remove(name)
        except SpecError:
            pass  # the other writer was faster
"""


@pytest.fixture
def store(build: Path, tmp_path: Path) -> TaskStore:
    return TaskStore(tmp_path / "store", build)


def value(store: TaskStore, name: str, folder: Path) -> float:
    """A number of a task, as a run would read it."""
    folder.mkdir(exist_ok=True)
    return float(store.load(name, folder).task.tensors()["l0.bias"][0])


@pytest.fixture
def marked(deltas: SimpleNamespace, pack: Pack) -> Callable[[float, int], Path]:
    """A task file whose bias begins with a number, and of a rank."""

    def make(number: float, rank: int = 2) -> Path:
        tensors = deltas.make(5, r_query=rank, r_value=1, prefix=0, labels=2)
        tensors["l0.bias"][:] = number
        return pack(tensors, f"marked-{number}-{rank}")

    return make


def test_tasks_are_added_replaced_listed_and_removed(
    store: TaskStore, marked: Callable[..., Path], tmp_path: Path
) -> None:
    info = store.add(marked(1.0), "a", ["no", "yes"])
    assert (info.labels, info.columns, info.sizes["r_query"]) == (("no", "yes"), 2, 2)
    first = store.version("a")
    with pytest.raises(SpecError, match="there is a task 'a' already"):
        store.add(marked(2.0), "a")
    assert value(store, "a", tmp_path / "p") == 1.0
    store.add(marked(2.0, 4), "a", replace=True)
    assert store.version("a") != first
    assert store.info("a").sizes["r_query"] == 4
    assert value(store, "a", tmp_path / "p") == 2.0
    store.add(marked(3.0), "b")
    assert list(store) == ["a", "b"]
    assert ("a" in store, "c" in store, len(store)) == (True, False, 2)
    store.remove("a")
    assert store.names() == ["b"]
    with pytest.raises(SpecError, match="did you mean 'b'"):
        store.remove("bb")


def test_what_is_read_again_is_what_was_checked(store: TaskStore, marked: Callable[..., Path], tmp_path: Path) -> None:
    given = store.add(marked(1.0), "a", ["no", "yes"])
    found = store.load("a", tmp_path)
    assert found.task.info == given
    assert found.version == store.version("a")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda data: data[: len(data) // 2], "is not a stored task, or is cut"),
        (lambda data: data[:-1], "is not a stored task, or is cut"),
        (lambda data: b"", "is not a stored task, or is cut"),
        (lambda data: data[:400] + bytes([data[400] ^ 1]) + data[401:], "its checksum does not hold"),
        (lambda data: data[:-20] + bytes([data[-20] ^ 1]) + data[-19:], "its checksum does not hold"),
    ],
)
def test_a_file_damaged_in_the_store_is_refused(
    store: TaskStore, marked: Callable[..., Path], tmp_path: Path, damage: Callable[[bytes], bytes], says: str
) -> None:
    store.add(marked(1.0), "a")
    path = tmp_path / "store" / f"a{SUFFIX}"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DeltaError, match=says):
        store.load("a", tmp_path)
    with pytest.raises(DeltaError, match=says):
        store.info("a")
    assert store.names() == ["a"]  # to be replaced or removed


def test_what_does_not_fit_never_gets_in(store: TaskStore, deltas: SimpleNamespace, pack: Pack, tmp_path: Path) -> None:
    poisoned = deltas.make(5, r_query=1, r_value=1, prefix=0, labels=2)
    poisoned["l0.bias"][3] = np.nan
    half = {name: array for name, array in deltas.movies.items() if "prefix" not in name}
    junk = tmp_path / f"junk{SUFFIX}"
    junk.write_bytes(b"not a task file at all")
    for path, says in (
        (pack(poisoned, "nan"), "NaN or infinity"),
        (pack(half, "half"), "deltas are missing"),
        (pack(deltas.movies, "foreign", fingerprint="ab" * 32), "trained on another base"),
        (junk, "is not a task file"),
        (tmp_path / "absent", "cannot be read"),
    ):
        with pytest.raises(DeltaError, match=says):
            store.add(path, "a")
    assert store.names() == []
    assert [path.name for path in (tmp_path / "store").iterdir()] == []


@pytest.mark.parametrize("name", ["../a", "a/b", ".a", "", "a\0b", "x" * 201, "a\n"])
def test_names_that_are_no_files_are_refused(store: TaskStore, marked: Callable[..., Path], name: str) -> None:
    with pytest.raises(SpecError, match="name of a task"):
        store.add(marked(1.0), name)
    assert name not in store
    with pytest.raises(SpecError, match="there is no task"):
        store.info(name)


def test_a_file_moved_to_another_name_or_build_is_refused(
    store: TaskStore, marked: Callable[..., Path], build: Path, tmp_path: Path, reseal: Callable[..., None]
) -> None:
    store.add(marked(1.0), "a")
    os.rename(tmp_path / "store" / f"a{SUFFIX}", tmp_path / "store" / f"b{SUFFIX}")
    with pytest.raises(DeltaError, match="is of task 'a', not of 'b'"):
        store.info("b")
    store.add(marked(1.0), "c")
    reseal(lambda doc: doc["deltas"][6].update(optional=True))
    with pytest.raises(DeltaError, match="added for another build"):
        TaskStore(tmp_path / "store", build).info("c")


def test_two_processes_write_and_a_third_reads(
    store: TaskStore, build: Path, marked: Callable[..., Path], tmp_path: Path
) -> None:
    files = [[marked(float(number), 1 + number) for number in numbers] for numbers in ((1, 2, 3), (11, 12))]
    writers = [_writer(build, tmp_path / "store", mine) for mine in files]
    seen: set[float] = set()
    try:
        every = {1.0, 2.0, 3.0, 11.0, 12.0}
        begun = time.monotonic()
        while (seen < every or time.monotonic() < begun + 0.5) and time.monotonic() < begun + 30:
            for name in store.names():
                try:
                    loaded = store.load(name, tmp_path)
                except SpecError:
                    continue  # removed since it was listed
                number = float(loaded.task.tensors()["l0.bias"][0])
                assert loaded.task.info.sizes["r_query"] == 1 + number  # never half of one and half of another
                seen.add(number)
        assert all(writer.poll() is None for writer in writers)
    finally:
        for writer in writers:
            _kill(writer)
    assert seen == every


def test_a_writer_killed_at_any_moment_leaves_it_readable(
    store: TaskStore, build: Path, marked: Callable[..., Path], tmp_path: Path
) -> None:
    files = [marked(float(number), 1 + number) for number in (1, 2, 3)]
    for moment in (0.005, 0.06):
        writer = _writer(build, tmp_path / "store", files)
        time.sleep(moment)
        _kill(writer)
        for name in store.names():
            loaded = store.load(name, tmp_path)
            assert loaded.task.info.sizes["r_query"] == 1 + float(loaded.task.tensors()["l0.bias"][0])
    store.add(files[0], "after")
    assert "after" in store


def _writer(build: Path, folder: Path, files: list[Path]) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, *map(str, (build, folder, *files))]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "ready\n"
    return writer


def _kill(writer: subprocess.Popen[str]) -> None:
    writer.send_signal(signal.SIGKILL)
    writer.communicate()


def test_what_dead_writers_left_goes_after_an_hour(build: Path, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    folder.mkdir()
    old, young = folder / ".0123.tmp", folder / ".4567.tmp"
    old.write_bytes(b"half")
    young.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    assert TaskStore(folder, build).names() == []
    assert (old.exists(), young.exists()) == (False, True)


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 5_000, CHUNK - 300, CHUNK, CHUNK + 1, 3 * CHUNK + 4097])
def test_a_file_of_any_size_is_unsealed_as_it_was_sealed(size: int) -> None:
    data = np.random.default_rng(size).bytes(size)
    info = TaskInfo("a", ("no", "yes"), 2, MappingProxyType({"r": 4}), 100)
    whole, out = seal(data, info, "1234"), io.BytesIO()
    assert unseal(io.BytesIO(whole), "a", "1234", "here", out).info == info
    assert out.getvalue() == data
    for at in {0, size // 2, len(whole) - 60} if size else {3}:
        changed = whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :]
        with pytest.raises(DeltaError, match="checksum does not hold"):
            unseal(io.BytesIO(changed), "a", "1234", "here")


def test_what_is_refused_leaves_no_file_behind(store: TaskStore, marked: Callable[..., Path], tmp_path: Path) -> None:
    store.add(marked(1.0), "a")
    path, private = tmp_path / "store" / f"a{SUFFIX}", tmp_path / "private"
    private.mkdir()
    data = path.read_bytes()
    path.write_bytes(data[:400] + bytes([data[400] ^ 1]) + data[401:])
    with pytest.raises(DeltaError):
        store.load("a", private)
    assert list(private.iterdir()) == []


def test_a_disk_that_fails_half_way_is_told_and_leaves_no_file(
    store: TaskStore, marked: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(io.FileIO):
        def readinto(self, buffer: Buffer, /) -> int | None:
            if self.tell() < 100:
                return super().readinto(memoryview(buffer)[:100])
            raise OSError(errno.EIO, "Input/output error")

    store.add(marked(1.0), "a")
    private = tmp_path / "private"
    private.mkdir()
    monkeypatch.setattr(store._place, "open", lambda name: Failing(tmp_path / "store" / name))
    with pytest.raises(BuildError, match="the store fails: Input/output error"):
        store.load("a", private)
    assert list(private.iterdir()) == []


def test_of_threads_that_add_one_name_one_wins(store: TaskStore, marked: Callable[..., Path], tmp_path: Path) -> None:
    files = [marked(float(number)) for number in range(6)]
    won: list[float] = []

    def add(number: int) -> None:
        try:
            store.add(files[number], "a")
        except SpecError:
            return
        won.append(float(number))

    threads = [threading.Thread(target=add, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won == [value(store, "a", tmp_path)]


def test_a_store_behind_a_url_is_the_same(
    build: Path, marked: Callable[..., Path], tmp_path: Path, deltas: SimpleNamespace, pack: Pack
) -> None:
    store = TaskStore("memory://tasks-of-a-test", build, refresh=0)
    store.add(marked(1.0), "a")
    with pytest.raises(SpecError, match="already"):
        store.add(marked(2.0), "a")
    first = store.version("a")
    store.add(marked(2.0, 4), "a", replace=True)
    assert store.version("a") != first
    assert value(store, "a", tmp_path) == 2.0
    assert store.names() == ["a"]
    with pytest.raises(DeltaError):
        store.add(pack(deltas.movies, "foreign", fingerprint="ab" * 32), "b")
    store.remove("a")
    assert store.version("a") is None
    with pytest.raises(SpecError, match="there is no task 'a'"):
        store.load("a", tmp_path)
    assert TaskStore(f"file://{tmp_path}/other", build).names() == []


def test_a_place_that_cannot_be_is_told(build: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BuildError, match="no store can be here"):
        TaskStore(tmp_path / "file" / "store", build)
    with pytest.raises(BuildError, match="no store can be here"):
        TaskStore("nonsense://somewhere", build)
