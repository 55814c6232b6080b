"""A real Triton Inference Server on what `surgeon export --to triton` writes: each row is answered as by a session."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient
from google.protobuf import json_format, text_format
from tritonclient.http import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException

import surgeon
from surgeon.cli import main

ROOT = Path(__file__).parents[2]
OWN = ROOT / ".cache" / "triton"
STUB = Path("python_backend_stubs", f"{sys.version_info[0]}.{sys.version_info[1]}", "triton_python_backend_stub")
HOME = next((path.parents[2] for path in OWN.glob(f"lib/*/site-packages/pytriton/tritonserver/{STUB}")), None)
pytestmark = [
    pytest.mark.sweep,
    pytest.mark.filterwarnings("default"),
    pytest.mark.skipif(HOME is None, reason="there is no tritonserver for this Python: `make triton` installs one"),
]
TEXTS = ("a fine film", "the film was dull", "good", "a poor film was the film the film a great film was")
TASKS = ("a", "b", "base", "c")


@pytest.fixture(scope="module")
def build(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("triton") / "build"
    two = {"labels": ["bad", "good"]}
    spec = {
        "base": {"model": str(base_folder), "head": "sequence-classification"},
        "surgery": [{"lora": {"rank": 4, "start": "gaussian"}}, {"head": {}}],
        "tasks": {"a": two, "b": two, "c": {"labels": 3}},
        "export": {"modes": ["switch", "mixed"]},
    }
    surgeon.compile(spec, out=folder)
    return folder


@pytest.fixture(scope="module")
def repository(build: Path) -> Path:
    folder = build.parent / "models"
    assert main(["export", str(build), "--to", "triton", "-o", str(folder), "--name", "tasks"]) == 0
    return folder


@contextmanager
def started(repository: Path, environment: Path, folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], int, Path]]:
    """The server, its port and its log. The backend's Python is the first `python3` of PATH."""
    assert HOME is not None
    shutil.copytree(HOME / "backends", folder / "backends")
    shutil.copy2(HOME / STUB, folder / "backends" / "python")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    libraries = (HOME.parents[1] / "nvidia_pytriton.libs", sysconfig.get_config_var("LIBDIR"))
    paths = {
        "PATH": os.pathsep.join([str(environment / "bin"), os.environ["PATH"]]),
        "LD_LIBRARY_PATH": os.pathsep.join(map(str, libraries)),
    }
    command = [HOME / "bin" / "tritonserver", f"--model-repository={repository}"]
    command += [f"--backend-directory={folder / 'backends'}", "--allow-grpc=false", "--allow-metrics=false"]
    command += ["--http-address=127.0.0.1", f"--http-port={port}"]
    log = folder / "log"
    with log.open("wb") as out:  # that Python looks for modules in the folder it is started in, too
        server = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **paths}, stdout=out, stderr=out)
        try:
            yield server, port, log
        finally:
            server.terminate()
            server.wait(60)


@pytest.fixture(scope="module")
def port(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with started(repository, OWN, tmp_path_factory.mktemp("server")) as (server, number, log):
        with InferenceServerClient(f"127.0.0.1:{number}") as client:
            end = time.monotonic() + 60
            while not _ready(client):
                assert server.poll() is None, log.read_text(errors="replace")
                assert time.monotonic() < end, log.read_text(errors="replace")
                time.sleep(0.2)
        yield number
    assert server.returncode == 0


def _ready(client: InferenceServerClient) -> bool:
    try:
        return bool(client.is_server_ready() and client.is_model_ready("tasks"))
    except OSError:
        return False


def _ask(port: int, **given: np.ndarray) -> dict[str, np.ndarray] | str:
    """The outputs, or what was said instead."""
    inputs = []
    for name, array in given.items():
        kind = {"O": "BYTES", "f": "FP32", "i": "INT64"}[array.dtype.kind]
        inputs.append(InferInput(name, list(array.shape), kind).set_data_from_numpy(array))
    with InferenceServerClient(f"127.0.0.1:{port}", network_timeout=60, connection_timeout=60) as client:
        try:
            answer = client.infer("tasks", inputs)
        except InferenceServerException as error:
            return str(error.message())
        return {name: answer.as_numpy(name) for name in ("logits", "label", "score")}


def _column(values: Sequence[str]) -> np.ndarray:
    return np.array([[value.encode()] for value in values], object)


def test_the_server_holds_what_was_written(port: int, repository: Path) -> None:
    path = Path(tritonclient.__file__).parent / "grpc" / "model_config_pb2.py"  # without the rest of `grpc`
    found = importlib.util.spec_from_file_location(path.stem, path)
    assert found is not None
    assert found.loader is not None
    schema = importlib.util.module_from_spec(found)
    found.loader.exec_module(schema)
    written = text_format.Parse((repository / "tasks" / "config.pbtxt").read_text(), schema.ModelConfig())
    with InferenceServerClient(f"127.0.0.1:{port}") as client:
        config = json_format.ParseDict(client.get_model_config("tasks"), schema.ModelConfig())
        metadata = client.get_model_metadata("tasks")
    for field in ("name", "backend", "max_batch_size", "input", "output", "parameters"):
        assert getattr(config, field) == getattr(written, field)
    waits = [one.dynamic_batching.max_queue_delay_microseconds for one in (config, written)]
    assert waits == [2000, 2000]
    assert {p["name"]: (p["datatype"], p["shape"]) for p in metadata["inputs"]}["text"] == ("BYTES", [-1, -1])
    assert [p["name"] for p in metadata["outputs"]] == ["logits", "label", "score"]


@pytest.fixture(scope="module")
def alone(build: Path) -> dict[tuple[str, str], Any]:
    """The ids, logits and answer of every task and text, each by itself."""
    found = {}
    with surgeon.Session(build, threads=1) as session:
        for text, name in product(TEXTS, TASKS):
            task = None if name == "base" else name
            inputs = session.encode([text], task=task)
            logits = session.run(inputs, task)["logits"][0]
            found[name, text] = inputs["input_ids"], logits, session.classify([text], task)[0]
    return found


def _same(found: dict[str, np.ndarray] | str, wanted: Sequence[Any]) -> None:
    assert not isinstance(found, str), found
    for logits, [label], [score], (_, alone, answer) in zip(*found.values(), wanted, strict=True):
        np.testing.assert_allclose(logits, alone, rtol=0, atol=1e-6 * np.abs(alone).max())
        assert (label.decode(), score) == (answer.label, pytest.approx(answer.score, abs=1e-6))


def test_rows_of_many_tasks_are_answered_each_as_alone(port: int, alone: dict[tuple[str, str], Any]) -> None:
    """By texts and by ids, and with rows of several tasks in one request; Triton runs together what it likes."""
    asked: list[tuple[list[tuple[str, str]], dict[str, np.ndarray]]] = []
    for row, (ids, *_) in alone.items():
        asked += [([row], {"text": _column(row[1:])}), ([row], {"input_ids": ids})]
    rows = [row for row in alone if row[0] != "c"]  # of as many labels
    asked += [(some, {"text": _column([text for _, text in some])}) for some in (rows, rows[::-1], rows[::3])]
    with ThreadPoolExecutor(16) as pool, InferenceServerClient(f"127.0.0.1:{port}") as client:
        asked *= 10
        answers = [pool.submit(_ask, port, **given, task=_column([name for name, _ in of])) for of, given in asked]
        for (of, _), answer in zip(asked, answers, strict=True):
            _same(answer.result(), [alone[row] for row in of])
        [told] = client.get_inference_statistics("tasks")["model_stats"]
    assert int(told["inference_stats"]["success"]["count"]) == len(asked)
    assert int(told["execution_count"]) < len(asked)  # so some came together


def test_a_bad_request_hears_why_and_disturbs_no_other(port: int, alone: dict[tuple[str, str], Any]) -> None:
    good, text = ("a", TEXTS[0]), _column(TEXTS[:2])
    bad: dict[str, dict[str, np.ndarray]] = {
        "there is no task 'nobody'; there is: a, b, c": {"text": text, "task": _column(["a", "nobody"])},
        "tasks whose 'logits' differ in shape": {"text": text, "task": _column(["a", "c"])},
        "data-type is 'FP32', but model 'tasks' expects 'INT64'": {"input_ids": np.ones((1, 2), np.float32)},
        "Expected [-1,-1], got [2]": {"input_ids": np.array([5, 6])},
        "its sequence is 2; there is: 3 in input_ids": {
            "input_ids": np.array([[5, 6, 7]]),
            "attention_mask": np.array([[1, 1]]),
        },
        "the base takes 64 at most": {"input_ids": np.full((1, 65), 5)},
        "idx=1000 must be within": {"input_ids": np.array([[1000]])},
        "is not UTF-8": {"text": np.array([[b"\xff"]], object)},
    }
    with ThreadPoolExecutor(16) as pool:
        fine = {"text": _column([good[1]]), "task": _column([good[0]])}
        answers = [(pool.submit(_ask, port, **fine), what, pool.submit(_ask, port, **bad[what])) for what in [*bad] * 5]
        for ours, what, other in answers:
            said = other.result()
            assert isinstance(said, str)
            assert what in said
            _same(ours.result(), [alone[good]])


@pytest.mark.skipif(np.__version__.startswith("1."), reason="this environment has no NumPy 2")
def test_the_server_refuses_the_model_where_numpy_2_would_be_misread(repository: Path, tmp_path: Path) -> None:
    with started(repository, Path(sys.prefix), tmp_path) as (server, _, log):
        assert server.wait(60) != 0
    assert f"misreads the arrays of NumPy {np.__version__}" in log.read_text(errors="replace")
