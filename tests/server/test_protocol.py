"""The Open Inference Protocol, spoken by Triton's own client; every answer is that of the session alone."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from tests.server.conftest import TEXTS, Live

NAMES = ["base", "sentiment", "topic", *(f"t{i}" for i in range(6))]


@pytest.fixture
def client(live: Live) -> Any:
    with triton.InferenceServerClient(live.url, concurrency=4) as client:
        yield client


def text_input(*texts: str) -> Any:
    given = triton.InferInput("text", [len(texts)], "BYTES")
    given.set_data_from_numpy(np.array([text.encode() for text in texts], dtype=object))
    return given


def alone(live: Live, name: str, texts: list[str]) -> np.ndarray:
    task = None if name == "base" else name
    return live.session.run(live.session.encode(texts, task=task), task)["logits"]


def test_health_and_metadata(live: Live, client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data", "model_repository"]
    assert [model["name"] for model in client.get_model_repository_index()] == NAMES
    assert client.is_model_ready("topic")
    assert client.is_model_ready("topic", "1")
    assert not client.is_model_ready("topic", "2")
    assert not client.is_model_ready("nothing")
    about = client.get_model_metadata("topic")
    assert about["parameters"]["labels"] == ["a", "b", "c"]
    assert {i["name"]: i["datatype"] for i in about["inputs"]}["text"] == "BYTES"
    assert about["outputs"][0] == {"name": "logits", "datatype": "FP32", "shape": [-1, -1]}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("binary", [True, False])
def test_ids_and_texts_give_what_the_session_gives(live: Live, client: Any, name: str, binary: bool) -> None:
    task = None if name == "base" else name
    arrays = live.session.encode(list(TEXTS), task=task)
    given = []
    for key, array in arrays.items():
        tensor = triton.InferInput(key, list(array.shape), "INT64")
        tensor.set_data_from_numpy(array, binary_data=binary)
        given.append(tensor)
    wanted = triton.InferRequestedOutput("logits", binary_data=binary)
    right = alone(live, name, list(TEXTS))
    found = client.infer(name, given, outputs=[wanted], request_id="seven")
    np.testing.assert_allclose(found.as_numpy("logits"), right, rtol=1e-5, atol=1e-5)
    assert found.get_response()["id"] == "seven"
    found = client.infer(name, [text_input(*TEXTS)])
    np.testing.assert_allclose(found.as_numpy("logits"), right, rtol=1e-5, atol=1e-5)
    labels = None if task is None else live.session.task(task).labels
    best = right.argmax(1)
    named = [str(i) if labels is None else labels[i] for i in best]
    assert [label.decode() for label in found.as_numpy("label")] == named
    assert ((found.as_numpy("score") > 0) & (found.as_numpy("score") <= 1)).all()


def test_the_task_may_be_a_parameter_of_the_base(live: Live, client: Any) -> None:
    found = client.infer("base", [text_input("a fine film")], parameters={"task": "t3"})
    np.testing.assert_allclose(found.as_numpy("logits"), alone(live, "t3", ["a fine film"]), atol=1e-5)
    assert found.get_response()["model_name"] == "t3"


def test_versions_compression_pairs_and_other_integers(live: Live, client: Any) -> None:
    right = alone(live, "t1", ["good"])
    for algorithm in ("gzip", "deflate"):
        found = client.infer("t1", [text_input("good")], model_version="1", request_compression_algorithm=algorithm)
        np.testing.assert_allclose(found.as_numpy("logits"), right, atol=1e-5)
    pair = triton.InferInput("text", [1, 2], "BYTES")
    pair.set_data_from_numpy(np.array([[b"a film", b"was good"]], dtype=object))
    inputs = live.session.encode([("a film", "was good")], task="t1")
    found = client.infer("t1", [pair]).as_numpy("logits")
    np.testing.assert_allclose(found, live.session.run(inputs, "t1")["logits"], atol=1e-5)
    narrow = triton.InferInput("input_ids", [1, 3], "INT32")
    narrow.set_data_from_numpy(np.array([[2, 4, 3]], np.int32))
    found = client.infer("t1", [narrow]).as_numpy("logits")
    np.testing.assert_allclose(found, live.session.run({"input_ids": [[2, 4, 3]]}, "t1")["logits"], atol=1e-5)


def test_requests_of_all_tasks_share_batches_and_stay_right(live: Live) -> None:
    """Forty clients at once: batches have several tasks, and every answer is its own."""
    right = {(name, text): alone(live, name, [text])[0] for name in NAMES for text in TEXTS}
    before = _sums(live)
    start = threading.Barrier(8)

    def ask(worker: int) -> None:
        rng = np.random.default_rng(worker)
        start.wait()
        for _ in range(15):
            name, text = NAMES[rng.integers(len(NAMES))], TEXTS[rng.integers(len(TEXTS))]
            found = live.ask(name, text)
            assert found.status == 200, found.body
            logits = next(o for o in found.json["outputs"] if o["name"] == "logits")
            np.testing.assert_allclose(logits["data"], right[name, text], rtol=1e-4, atol=1e-5)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(8)))
    after = _sums(live)
    batches, rows, tasks = (after[key] - before[key] for key in ("count", "rows", "tasks"))
    assert rows == 120
    assert batches < 100  # some stood together
    assert tasks > batches  # of several tasks


def _sums(live: Live) -> dict[str, float]:
    text = live.call("GET", "/metrics").body.decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    keys = {"count": "surgeon_batch_rows_count", "rows": "surgeon_batch_rows_sum", "tasks": "surgeon_batch_tasks_sum"}
    return {key: float(values[name]) for key, name in keys.items()}


def test_errors_reach_the_client_as_its_own(live: Live, client: Any) -> None:
    with pytest.raises(InferenceServerException, match=r"there is no task 'topik'.*did you mean 'topic'"):
        client.infer("topik", [text_input("good")])
    with pytest.raises(InferenceServerException, match="there is no output 'logit'"):
        client.infer("topic", [text_input("good")], outputs=[triton.InferRequestedOutput("logit")])
