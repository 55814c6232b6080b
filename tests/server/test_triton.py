"""The repository entry for Triton: a configuration that its own schema reads, and a model that answers its requests."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tritonclient
from google.protobuf import json_format, text_format

from surgeon.errors import BuildError, SpecError
from surgeon.runtime import Session
from surgeon.server.triton import write_entry


class Tensor:
    """As `triton_python_backend_utils` has it."""

    def __init__(self, name: str, array: np.ndarray) -> None:
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._array

    def to_dlpack(self) -> np.ndarray:
        return self._array

    @classmethod
    def from_dlpack(cls, name: str, given: np.ndarray) -> Tensor:
        return cls(name, given)


class Old(Tensor):
    """As a backend that was built before NumPy 2 reads what that made."""

    @classmethod
    def from_dlpack(cls, name: str, given: np.ndarray) -> Tensor:
        return cls(name, np.full_like(given, given[0]))


class Request:
    def __init__(self, **arrays: Any) -> None:
        self._tensors = [Tensor(name, np.asarray(array)) for name, array in arrays.items()]

    def inputs(self) -> list[Tensor]:
        return self._tensors


class Response:
    def __init__(self, output_tensors: list[Tensor] | None = None, error: Exception | None = None) -> None:
        self.outputs = {t.name(): t.as_numpy() for t in output_tensors or ()}
        self.error = error


def load(path: Path) -> ModuleType:
    """A file as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def schema() -> ModuleType:
    """Triton's `model_config.proto`, from its own client and without the rest of that."""
    path = Path(tritonclient.__file__).parent / "grpc" / "model_config_pb2.py"
    return load(path)


@pytest.fixture(scope="module")
def entry(served_build: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_entry(served_build, tmp_path_factory.mktemp("models"), "tasks", threads=1)


@pytest.fixture(scope="module")
def parsed(entry: Path, schema: ModuleType) -> Any:
    return text_format.Parse((entry / "config.pbtxt").read_text(encoding="utf-8"), schema.ModelConfig())


@pytest.fixture(scope="module")
def model(entry: Path, parsed: Any) -> Iterator[Any]:
    """The entry's model.py, loaded as the backend loads it."""
    utils = ModuleType("triton_python_backend_utils")
    utils.Tensor, utils.InferenceResponse, utils.TritonError = Tensor, Response, RuntimeError  # type: ignore[attr-defined]
    sys.modules[utils.__name__] = utils
    made = load(entry / "1" / "model.py").TritonPythonModel()
    said = json_format.MessageToDict(parsed, preserving_proto_field_name=True)
    made.initialize(
        {"model_config": json.dumps(said), "model_repository": str(entry), "model_version": "1", "model_name": "tasks"}
    )
    yield made
    made.finalize()
    del sys.modules[utils.__name__]


def test_tritons_own_schema_reads_the_configuration(parsed: Any, schema: ModuleType) -> None:
    assert (parsed.name, parsed.backend) == ("tasks", "python")
    assert parsed.max_batch_size > 1
    inputs = {port.name: port for port in parsed.input}
    assert inputs["input_ids"].data_type == schema.TYPE_INT64
    assert list(inputs["input_ids"].dims) == [-1]
    assert all(port.optional for port in parsed.input)
    assert (list(inputs["text"].dims), list(inputs["task"].dims)) == ([-1], [1])
    assert inputs["task"].data_type == inputs["text"].data_type == schema.TYPE_STRING
    assert {port.name for port in parsed.output} == {"logits", "label", "score"}


def test_requests_of_several_tasks_are_answered_each_by_its_own(model: Any, served_build: Path) -> None:
    texts = [b"a fine film", b"the film was dull"]
    with Session(served_build, threads=1) as session:
        names = [*list(session.tasks)[:2], None]
        requests = [
            Request(text=np.array([[t] for t in texts], object), **({} if n is None else {"task": [[n.encode()]] * 2}))
            for n in names
        ]
        for name, response in zip(names, model.execute(requests), strict=True):
            assert response.error is None
            wanted = session.classify([text.decode() for text in texts], name)
            assert response.outputs["label"].shape == (2, 1)
            np.testing.assert_allclose(response.outputs["score"][:, 0], [a.score for a in wanted], atol=1e-5)
            if name is not None:
                assert [label.decode() for label in response.outputs["label"][:, 0]] == [a.label for a in wanted]


def test_every_row_of_a_request_names_its_own_task(model: Any, served_build: Path) -> None:
    ids, names = np.array([[5, 6], [7, 8], [5, 7], [9, 6]]), [b"sentiment", b"base", b"sentiment", b"base"]
    [response] = model.execute([Request(input_ids=ids, task=[[name] for name in names])])
    assert response.error is None
    with Session(served_build, threads=1) as session:
        for row, logits, name in zip(ids, response.outputs["logits"], names, strict=True):
            wanted = session.run({"input_ids": row[None]}, "sentiment" if name == b"sentiment" else None)["logits"][0]
            np.testing.assert_allclose(logits, wanted, atol=1e-5)


def test_a_pair_of_texts_is_a_row(model: Any, served_build: Path) -> None:
    [response] = model.execute([Request(text=np.array([[b"a fine film", b"good"]], object), task=[[b"topic"]])])
    with Session(served_build, threads=1) as session:
        wanted = session.classify([("a fine film", "good")], "topic")
    np.testing.assert_allclose(response.outputs["score"][0], wanted[0].score, atol=1e-5)


def test_a_backend_older_than_its_numpy_is_refused_before_it_misreads(
    model: Any, entry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["triton_python_backend_utils"], "Tensor", Old)
    with pytest.raises(BuildError, match=r"misreads the arrays of NumPy \d"):
        type(model)().initialize({"model_config": "{}", "model_repository": str(entry), "model_version": "1"})


def test_a_request_that_fails_disturbs_no_other(model: Any) -> None:
    good = Request(input_ids=np.array([[5, 6, 7]]))
    unknown = Request(input_ids=np.array([[5, 6, 7]]), task=[[b"nobody"]])
    several = Request(input_ids=np.array([[5], [6]]), task=[[b"sentiment"], [b"topic"]])
    wrong = Request(input_ids=np.array([[0.5]]))
    found = model.execute([good, unknown, several, wrong, good])
    assert [response.error is None for response in found] == [True, False, False, False, True]
    assert "there is no task 'nobody'" in str(found[1].error)
    assert "tasks whose 'logits' differ in shape; there is: [2], [3]; try: a request for each" in str(found[2].error)


def test_a_name_that_is_taken_is_refused_and_nothing_is_left(entry: Path, served_build: Path) -> None:
    before = sorted(entry.parent.iterdir())
    with pytest.raises(SpecError, match="has a model 'tasks' already"):
        write_entry(served_build, entry.parent, "tasks")
    assert sorted(entry.parent.iterdir()) == before
