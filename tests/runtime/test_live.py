"""A session under way: tasks come and go, and what happens to files on disk meanwhile changes no answer."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from surgeon.errors import SpecError
from surgeon.runtime import Session


@pytest.fixture(autouse=True, scope="module")
def _collecting_what_is_new():
    """A collection here looks at what these tests make, and not at all that a whole run has loaded: seconds each."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def test_the_task_is_alive_through_every_run_after_collection(pristine, inputs, pack, deltas):
    with Session(pristine, threads=1) as session:
        expected = session.run(inputs, task="movies")["logits"]
        session.add_task(pack(deltas.movies), "copy")
        for _ in range(3):
            gc.collect()
            junk = [os.urandom(1 << 16) for _ in range(20)]
            assert np.array_equal(session.run(inputs, task="copy")["logits"], expected)
            del junk


def overwrite(path):
    with path.open("r+b") as file:
        file.write(os.urandom(path.stat().st_size))


def flip(path):
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))


def cut(path):
    os.truncate(path, 0)


def swap(path):
    other = path.with_suffix(".new")
    other.write_bytes(os.urandom(path.stat().st_size))
    os.replace(other, path)


def unlink(path):
    path.unlink()


DAMAGES = [overwrite, flip, cut, swap, unlink]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_file_changes_no_answer_of_a_live_session(build, inputs, damage):
    with Session(build, threads=1) as session:
        before = {task: session.run(inputs, task=task)["logits"] for task in (None, "movies", "topics")}
        words = session.encode(["w2 w3"])
        for path in build.rglob("*"):
            if path.is_file():
                damage(path)
        gc.collect()
        for task, logits in before.items():
            assert np.array_equal(session.run(inputs, task=task)["logits"], logits)
        assert np.array_equal(session.encode(["w2 w3"])["input_ids"], words["input_ids"])


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_an_added_file_changes_no_answer(pristine, inputs, pack, deltas, damage):
    path = pack(deltas.movies)
    with Session(pristine, threads=1) as session:
        session.add_task(path)
        damage(path)
        assert np.array_equal(session.run(inputs, task="t")["logits"], session.run(inputs, task="movies")["logits"])


def test_eight_threads_and_tasks_that_come_and_go_mix_no_answers(pristine, inputs, pack, deltas):
    path = pack(deltas.make(9, r_query=4, r_value=4, prefix=2, labels=6), "guest")
    with Session(pristine, threads=1) as session:
        expected = {task: session.run(inputs, task=task)["logits"] for task in (None, "movies", "topics")}
        session.add_task(path)
        expected["guest"] = session.run(inputs, task="guest")["logits"]
        start = threading.Barrier(9)

        def come_and_go():
            start.wait()
            for i in range(60):
                session.add_task(path, replace=True)
                session.add_task(path, f"extra-{i}")
                session.remove_task(f"extra-{i}")
                session.remove_task("guest")

        def ask(seed):
            wrong = 0
            start.wait()
            for i in np.random.default_rng(seed).integers(0, 4, 400):
                task = list(expected)[i]
                try:
                    wrong += not np.array_equal(session.run(inputs, task=task)["logits"], expected[task])
                except SpecError:
                    assert task == "guest"
            return wrong

        with ThreadPoolExecutor(9) as pool:
            churn = pool.submit(come_and_go)
            asked = [pool.submit(ask, seed) for seed in range(8)]
            assert [future.result() for future in asked] == [0] * 8
            churn.result()
        assert set(session.tasks) == {"movies", "topics"}


def test_a_removed_task_is_unknown_and_others_stay(pristine, inputs):
    with Session(pristine, threads=1) as session:
        before = session.run(inputs, task="topics")["logits"]
        snapshot = session.tasks
        session.remove_task("movies")
        assert set(session.tasks) == {"topics"}
        assert set(snapshot) == {"movies", "topics"}
        with pytest.raises(SpecError, match="no task 'movies'"):
            session.run(inputs, task="movies")
        with pytest.raises(SpecError, match="no task 'movies'"):
            session.remove_task("movies")
        assert np.array_equal(session.run(inputs, task="topics")["logits"], before)


def test_a_name_in_use_is_refused_unless_replaced(pristine, inputs, pack, deltas):
    path = pack(deltas.topics, "movies")
    with Session(pristine, threads=1) as session:
        before = session.run(inputs, task="movies")["logits"]
        with pytest.raises(SpecError, match="a task 'movies' already"):
            session.add_task(path)
        assert np.array_equal(session.run(inputs, task="movies")["logits"], before)
        snapshot = session.tasks
        session.add_task(path, replace=True, labels=["a", "b", "c", "d"])
        assert snapshot["movies"].labels == ("bad", "good")
        assert session.tasks["movies"].labels == ("a", "b", "c", "d")
        assert np.array_equal(
            session.run(inputs, task="movies")["logits"], session.run(inputs, task="topics")["logits"]
        )


def test_the_name_of_a_task_is_its_files_without_the_hash(pristine, pack, deltas):
    with Session(pristine, threads=1) as session:
        assert session.add_task(pack(deltas.movies, "legal.0123abcd")).name == "legal"
        assert session.add_task(pack(deltas.movies, "v1.2")).name == "v1.2"


def test_sessions_leave_no_files_behind(pristine, pack, deltas, tmp_path, monkeypatch):
    private = tmp_path / "private"
    private.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(private))
    with Session(pristine, threads=1) as session:
        (directory,) = private.iterdir()
        for _ in range(5):
            session.add_task(pack(deltas.movies), replace=True)
        gc.collect()
        assert len(list(directory.iterdir())) == 3  # of the tasks that are there
        assert directory.stat().st_mode & 0o077 == 0
    assert not list(private.iterdir())
    session = Session(pristine, threads=1)
    del session
    gc.collect()
    assert not list(private.iterdir())


def run_python(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], check=False, capture_output=True, text=True
    )


def test_running_loads_neither_torch_nor_transformers_and_prints_nothing(pristine):
    code = """
import sys
for name in ("torch", "transformers", "onnx", "pydantic", "safetensors", "yaml"):
    sys.modules[name] = None
import surgeon.runtime
assert "tokenizers" not in sys.modules
with surgeon.runtime.Session(sys.argv[1], threads=1) as session:
    session.run({"input_ids": [[2, 3], [4, 5]]}, task="movies")
    assert session.classify(["w2 w3", "w4"], task="topics")[0].label in session.tasks["topics"].labels
"""
    result = run_python(code, pristine)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_an_exit_without_close_leaves_no_files(pristine, tmp_path):
    code = f"""
import sys, tempfile
tempfile.tempdir = {str(tmp_path)!r}
from surgeon.runtime import Session
session = Session(sys.argv[1], threads=1)
session.run({{"input_ids": [[2, 3]]}}, task="movies")
"""
    result = run_python(code, pristine)
    assert (result.returncode, result.stderr) == (0, "")
    assert not list(tmp_path.iterdir())
