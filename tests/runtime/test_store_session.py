"""A session over a store: tasks come in when they are named, as the store has them then, and few are held."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from surgeon import Session
from surgeon.errors import DeltaError, SpecError
from surgeon.runtime.store import TaskStore
from surgeon.runtime.taskfile import SUFFIX, write_adapter

Tensors = dict[str, np.ndarray]
Oracle = Callable[[Tensors, Tensors], np.ndarray]


@pytest.fixture
def many(deltas: SimpleNamespace) -> dict[str, Tensors]:
    return {f"t{i}": deltas.make(20 + i, r_query=1 + i, r_value=1, prefix=i % 3, labels=2 + i % 2) for i in range(6)}


@pytest.fixture
def store(build: Path, tmp_path: Path, many: dict[str, Tensors], pack: Callable[..., Path]) -> TaskStore:
    store = TaskStore(tmp_path / "store", build)
    for name, tensors in many.items():
        store.add(pack(tensors, name))
    return store


def test_answers_are_those_of_the_store_and_few_tasks_are_held(
    build: Path, store: TaskStore, many: dict[str, Tensors], inputs: Tensors, oracle: Oracle
) -> None:
    with Session(build, store=store, resident=2) as session:
        for name in [*many, *reversed(many)]:
            np.testing.assert_allclose(session.run(inputs, name)["logits"], oracle(inputs, many[name]), atol=1e-4)
            assert len(session.resident) <= 2
        assert session.resident == ("t1", "t0")
        session.run(inputs, "t1")
        session.run(inputs, "t4")
        assert session.resident == ("t1", "t4")  # t0 was used longest ago
        assert session.task("t5").sizes["r_query"] == 6


def test_bytes_bound_what_is_held(build: Path, store: TaskStore, tmp_path: Path) -> None:
    loaded = {name: store.load(name, tmp_path) for name in store}
    size = loaded["t3"].nbytes
    with Session(build, store=store, resident_bytes=2 * size) as session:
        for name in store:
            session.task(name)
        held = sum(loaded[name].nbytes for name in session.resident)
        assert held <= 2 * size
        assert session.resident[-1] == "t5"
        assert len(session.resident) < 3


def test_a_task_in_use_is_found_after_it_gave_way(build: Path, store: TaskStore) -> None:
    with Session(build, store=store, resident=1) as session:
        held = session._table.find("t0")
        session.task("t1")
        assert session.resident == ("t1",)
        assert session._table.find("t0") is held


def test_the_store_comes_before_the_build(
    build: Path, store: TaskStore, many: dict[str, Tensors], deltas: SimpleNamespace, pack: Callable[..., Path],
    inputs: Tensors, oracle: Oracle,
) -> None:  # fmt: skip
    with Session(build, store=store) as session:
        np.testing.assert_allclose(session.run(inputs, "movies")["logits"], oracle(inputs, deltas.movies), atol=1e-4)
        with pytest.raises(SpecError, match="already"):
            session.add_task(pack(many["t2"]), "movies")
        session.add_task(pack(many["t2"]), "movies", replace=True)
        assert "movies" in store
        np.testing.assert_allclose(session.run(inputs, "movies")["logits"], oracle(inputs, many["t2"]), atol=1e-4)
        session.remove_task("movies")
        assert "movies" not in store
        assert sorted(session.names()) == ["t0", "t1", "t2", "t3", "t4", "t5", "topics"]
        with pytest.raises(SpecError, match="there is no task 'movies'"):
            session.run(inputs, "movies")


def test_what_others_change_shows_at_the_next_call(
    build: Path, store: TaskStore, many: dict[str, Tensors], pack: Callable[..., Path], inputs: Tensors, oracle: Oracle
) -> None:
    with Session(build, store=str(store.where)) as session:
        session.run(inputs, "t1")
        store.add(pack(many["t5"]), "t1", replace=True)  # another process's hand
        np.testing.assert_allclose(session.run(inputs, "t1")["logits"], oracle(inputs, many["t5"]), atol=1e-4)
        assert session.resident == ("t1",)
        assert session.tasks["t1"].sizes["r_query"] == 6
        store.remove("t1")
        with pytest.raises(SpecError, match="there is no task"):
            session.run(inputs, "t1")
        assert "t1" not in session.tasks


def test_a_damaged_file_is_refused_and_can_be_replaced_and_removed(
    build: Path, store: TaskStore, many: dict[str, Tensors], pack: Callable[..., Path], inputs: Tensors, tmp_path: Path
) -> None:
    path = tmp_path / "store" / f"t1{SUFFIX}"
    whole = path.read_bytes()
    with Session(build, store=store) as session:
        session.run(inputs, "t1")
        path.write_bytes(whole[:-30] + b"\0" + whole[-29:])
        with pytest.raises(DeltaError, match="its checksum does not hold"):
            session.run(inputs, "t1")
        session.run(inputs, "t2")
        session.add_task(pack(many["t1"]), "t1", replace=True)
        session.run(inputs, "t1")
        path.write_bytes(b"")
        session.remove_task("t1")
        assert "t1" not in store


def test_calls_go_on_while_tasks_change(
    build: Path, store: TaskStore, many: dict[str, Tensors], inputs: Tensors, oracle: Oracle, tmp_path: Path,
    fingerprint: str,
) -> None:  # fmt: skip
    """Replaced by turns with one of two tasks, every answer is one of the two."""
    files = [tmp_path / f"{name}{SUFFIX}" for name in ("t3", "t5")]
    for path in files:
        write_adapter(path, many[path.name.removesuffix(SUFFIX)], fingerprint)
    right = [oracle(inputs, many[name]) for name in ("t3", "t5")]
    faults: list[str] = []
    over = threading.Event()
    with Session(build, store=store, resident=2) as session:

        def call() -> None:
            while not over.is_set():
                found = session.run(inputs, "t3")["logits"]
                if not any(found.shape == r.shape and np.abs(found - r).max() < 1e-4 for r in right):
                    faults.append(f"{found}")
                session.run(inputs, "t0")
                session.run(inputs, "t1")

        threads = [threading.Thread(target=call) for _ in range(2)]
        for thread in threads:
            thread.start()
        for turn in range(40):
            session.add_task(files[turn % 2], "t3", replace=True)
        over.set()
        for thread in threads:
            thread.join()
    assert not faults
