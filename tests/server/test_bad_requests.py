"""What a client may do wrong: the right status, a message that helps, and nothing else disturbed."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from surgeon.runtime.taskfile import write_adapter
from tests.server.conftest import TOKEN, Live, tensors

INFER = "/v2/models/t1/infer"
AUTH = {"authorization": f"Bearer {TOKEN}"}


def ids(data: Any, shape: Any, datatype: Any = "INT64", **more: Any) -> dict[str, Any]:
    return {"inputs": [{"name": "input_ids", "datatype": datatype, "shape": shape, "data": data, **more}]}


@pytest.fixture(autouse=True)
def undisturbed(live: Live) -> Iterator[None]:
    """Whatever a test did, answers are what they were."""
    right = live.session.run(live.session.encode(["a fine film"]), "t1")["logits"]
    yield
    found = live.ask("t1", "a fine film").json["outputs"][0]["data"]
    np.testing.assert_allclose(found, right[0], rtol=1e-5, atol=1e-5)


BAD: dict[str, tuple[Any, str]] = {
    "not JSON": (b"{not json", "is not JSON"),
    "not UTF-8": (b'{"inputs": "\xff"}', "is not JSON"),
    "nested without end": (b"[" * 100_000, "is not JSON"),
    "NaN": (b'{"inputs": NaN}', "is not JSON"),
    "a list": (b"[]", "the request is not a JSON object"),
    "nothing": (b"", "is not JSON"),
    "no inputs": ({}, "'inputs' is missing"),
    "empty inputs": ({"inputs": []}, "the request has no inputs"),
    "input of another kind": ({"inputs": ["a"]}, "an input is not a JSON object"),
    "no name": ({"inputs": [{}]}, "an input has no name"),
    "unknown input": ({"inputs": [{"name": "x", "datatype": "INT64", "shape": [1], "data": [1]}]}, "no input 'x'"),
    "twice": ({"inputs": 2 * ids([[2]], [1, 1])["inputs"]}, "two inputs 'input_ids'"),
    "unknown datatype": (ids([[2]], [1, 1], "INT65"), "has datatype 'INT65'"),
    "unhashable datatype": (ids([[2]], [1, 1], ["INT64"]), "has datatype"),
    "floats": (ids([[2.5]], [1, 1], "FP32"), "has dtype float32"),
    "floats as integers": (ids([[2.5]], [1, 1]), "its data are not"),
    "strings as integers": (ids([["2"]], [1, 1]), "its data are not"),
    "shape that is none": (ids([[2]], "1,1"), "no shape that is a list of sizes"),
    "negative shape": (ids([[2]], [-1, 1]), "no shape that is a list of sizes"),
    "huge shape": (ids([[2]], [10**9, 10**9]), "has 1 elements"),
    "other shape": (ids([[2, 3]], [1, 3]), "has 2 elements"),
    "ragged": (ids([[2, 3], [2]], [2, 2]), "different lengths"),
    "one axis": (ids([2, 3], [2]), "has 1 axes"),
    "empty": (ids([], [0, 4]), "is empty"),
    "negative ids": (ids([[2, -3]], [1, 2]), "negative numbers are no ids"),
    "ids beyond the vocabulary": (ids([[10**6]], [1, 1]), "cannot run on these inputs"),
    "ids beyond the type": (ids([[2**70]], [1, 1]), "its data are not"),
    "too long": (ids([[2] * 65], [1, 65]), "the base takes 64 at most"),
    "no data": (ids(None, [1, 1]), "has no data"),
    "shared memory": (ids([[2]], [1, 1], parameters={"shared_memory_region": "x"}), "in shared memory"),
    "texts that are numbers": (
        {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": [1]}]}, "are strings",
    ),
    "texts of another type": ({"inputs": [{"name": "text", "datatype": "INT64", "shape": [1], "data": [1]}]}, "BYTES"),
    "texts of another shape": (
        {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1, 3], "data": ["a", "b", "c"]}]}, "has shape",
    ),
    "half a character": (
        {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": ["\ud800"]}]}, "not UTF-8",
    ),
    "texts and ids": (
        {"inputs": [*ids([[2]], [1, 1])["inputs"], {"name": "text", "datatype": "BYTES", "shape": [1], "data": ["a"]}]},
        "and other inputs",
    ),
    "unknown output": ({**ids([[2]], [1, 1]), "outputs": [{"name": "y"}]}, "there is no output 'y'"),
    "classification": (
        {**ids([[2]], [1, 1]), "outputs": [{"name": "logits", "parameters": {"classification": 2}}]}, "'label'",
    ),
    "task of another kind": ({**ids([[2]], [1, 1]), "parameters": {"task": 3}}, "is not a name"),
    "two tasks": ({**ids([[2]], [1, 1]), "parameters": {"task": "t2"}}, "one of them"),
    "deadline of another kind": ({**ids([[2]], [1, 1]), "parameters": {"timeout": "soon"}}, "microseconds"),
    "id of another kind": ({**ids([[2]], [1, 1]), "id": 7}, "'id' is not a string"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_request_is_told_so(live: Live, case: str) -> None:
    body, says = BAD[case]
    reply = live.call("POST", INFER, body)
    assert (reply.status, says in reply.json["error"]) == (400, True), reply.body


def binary(json_: Any, tail: bytes, length: int | str | None = None) -> tuple[bytes, dict[str, str]]:
    text = json.dumps(json_).encode()
    return text + tail, {"inference_header_content_length": str(len(text) if length is None else length)}


@pytest.mark.parametrize(
    ("tail", "size", "length", "says"),
    [
        (b"\x02" + 7 * b"\0", 8, "x", "the header says 'x'"),
        (b"\x02" + 7 * b"\0", 8, 10**9, "the header says '1000000000'"),
        (b"\x02" + 7 * b"\0", 8, -1, "the header says '-1'"),
        (b"\x02" + 7 * b"\0", 16, None, "says 16 bytes, and 8 are left"),
        (b"\x02" + 7 * b"\0", -8, None, "says -8 bytes"),
        (b"\x02" + 7 * b"\0", 4, None, "has 4 bytes"),
        (b"\x02" + 8 * b"\0", 8, None, "9 bytes follow the JSON"),
    ],
)
def test_bad_binary_tensors_are_told(live: Live, tail: bytes, size: int, length: Any, says: str) -> None:
    tensor = {"name": "input_ids", "datatype": "INT64", "shape": [1, 1], "parameters": {"binary_data_size": size}}
    body, headers = binary({"inputs": [tensor]}, tail, length)
    reply = live.call("POST", INFER, body, **headers)
    assert (reply.status, says in reply.json["error"]) == (400, True), reply.body


@pytest.mark.parametrize("tail", [b"\xff\xff\xff\xffab", b"\x01\0\0", b"\x01\0\0\0a\x01\0\0\0b", b"\x05\0\0\0ab"])
def test_bad_lengths_of_texts_are_told(live: Live, tail: bytes) -> None:
    tensor = {"name": "text", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": len(tail)}}
    body, headers = binary({"inputs": [tensor]}, tail)
    reply = live.call("POST", INFER, body, **headers)
    assert (reply.status, "each behind its length" in reply.json["error"]) == (400, True), reply.body


@pytest.mark.parametrize(
    ("method", "path", "status", "says"),
    [
        ("POST", "/v2/models/nothing/infer", 404, "there is no task 'nothing'"),
        ("POST", "/v2/models/t11/infer", 404, "did you mean 't1'"),
        ("POST", "/v2/models/..%2F..%2Fetc%2Fpasswd/infer", 404, "nothing at this path"),
        ("POST", "/v2/models/%2e%2e/infer", 404, "there is no task '..'"),
        ("POST", "/v2/models/a%00b/infer", 404, "there is no task"),
        ("POST", f"/v2/models/{'x' * 5000}/infer", 404, "there is no task"),
        ("POST", "/v2/models/t1/versions/2/infer", 404, "no such version"),
        ("GET", "/v2/models/t1/infer", 405, "does not take GET"),
        ("GET", "/nowhere", 404, "nothing at this path"),
        ("GET", "/static/page.js", 404, "nothing at this path"),
        ("POST", "/v1/completions", 400, "does not write texts"),
    ],
)
def test_paths_that_are_none_are_told(live: Live, method: str, path: str, status: int, says: str) -> None:
    reply = live.call(method, path, ids([[2]], [1, 1]) if method == "POST" else None)
    found = reply.json["error"]
    assert reply.status == status
    assert says in (found if isinstance(found, str) else found["message"])


def test_bodies_in_other_encodings(live: Live) -> None:
    body = json.dumps(ids([[2, 4, 3]], [1, 3])).encode()
    assert live.call("POST", INFER, gzip.compress(body), content_encoding="gzip").status == 200
    assert live.call("POST", INFER, body, content_encoding="br").status == 415
    assert live.call("POST", INFER, body, content_encoding="gzip").status == 400
    assert live.call("POST", INFER, gzip.compress(body)[:-9], content_encoding="gzip").status == 400
    bomb = gzip.compress(b" " * (9 << 20))
    assert live.call("POST", INFER, bomb, content_encoding="gzip").status == 413


def test_more_rows_or_bytes_than_there_may_be(live: Live) -> None:
    reply = live.ask("t1", *["good"] * 257)
    assert (reply.status, "256 are the most" in reply.json["error"]) == (413, True)
    reply = live.call("POST", INFER, b" " * ((8 << 20) + 1))
    assert reply.status == 413


@pytest.mark.parametrize(
    "headers", [{}, {"authorization": "Bearer wrong"}, {"authorization": TOKEN}, {"authorization": "Bearer "}]
)
def test_the_admin_route_asks_for_its_token(live: Live, headers: dict[str, str]) -> None:
    for method, path in (("GET", ""), ("PUT", "/new"), ("DELETE", "/t1")):
        assert live.call(method, f"/admin/tasks{path}", b"" if method == "PUT" else None, **headers).status == 401


@pytest.mark.parametrize("kind", ["nan", "foreign", "half", "cut", "junk", "empty"])
def test_uploads_that_do_not_fit_are_refused(live: Live, served_build: Path, tmp_path: Path, kind: str) -> None:
    manifest = live.session.manifest
    values, fingerprint = tensors(manifest, seed=1), manifest.base.fingerprint
    if kind == "nan":
        next(iter(values.values()))[0] = np.nan
    if kind == "half":
        del values[next(name for name in values if "lora" in name)]
    path = tmp_path / "x.onnx_adapter"
    write_adapter(path, values, "ab" * 32 if kind == "foreign" else fingerprint)
    data = {"cut": path.read_bytes()[:-100], "junk": b"junk", "empty": b""}.get(kind, path.read_bytes())
    before = live.session.names()
    reply = live.call("PUT", "/admin/tasks/new?labels=a,b", data, **AUTH)
    says = {"nan": "NaN", "foreign": "another base", "half": "1 of", "cut": "", "junk": "", "empty": ""}
    assert (reply.status, says[kind] in reply.json["error"]) == (422, True), reply.body
    assert str(tmp_path) not in reply.json["error"]
    assert live.session.names() == before


@pytest.mark.parametrize("name", ["..%2Fnew", "%2e%2e", ".new", "a%20b", "a%00b", "x" * 300, "base"])
def test_names_that_are_none_are_refused(live: Live, task_file: Callable[..., Path], name: str) -> None:
    before = live.session.names()
    reply = live.call("PUT", f"/admin/tasks/{name}", task_file(9).read_bytes(), **AUTH)
    assert reply.status in {400, 404, 409}
    assert live.session.names() == before


def test_tasks_are_added_replaced_listed_and_removed(live: Live, task_file: Callable[..., Path]) -> None:
    first, second = task_file(21), task_file(22, rank=2, labels=3)
    reply = live.call("PUT", "/admin/tasks/new?labels=no,yes", first.read_bytes(), **AUTH)
    assert (reply.status, reply.json["labels"]) == (201, ["no", "yes"])
    before = live.ask("new", "good").json["outputs"][0]["data"]
    assert live.call("PUT", "/admin/tasks/new", second.read_bytes(), **AUTH).status == 409
    assert live.call("PUT", "/admin/tasks/new?replace=maybe", second.read_bytes(), **AUTH).status == 400
    assert live.call("PUT", "/admin/tasks/new?labels=no,yes&replace=true", second.read_bytes(), **AUTH).status == 422
    reply = live.call("PUT", "/admin/tasks/new?label=a&label=b&label=c&replace=true", second.read_bytes(), **AUTH)
    assert (reply.status, reply.json["labels"]) == (201, ["a", "b", "c"])
    after = live.ask("new", "good").json["outputs"]
    assert (len(before), len(after[0]["data"])) == (2, 3)
    assert after[1]["data"][0] in {"a", "b", "c"}
    listed = live.call("GET", "/admin/tasks?after=base&limit=2", **AUTH).json
    assert listed == {"tasks": ["new", "sentiment"], "total": 9}
    assert live.call("DELETE", "/admin/tasks/new", **AUTH).status == 204
    assert live.call("DELETE", "/admin/tasks/new", **AUTH).status == 404
    assert live.ask("new", "good").status == 404
