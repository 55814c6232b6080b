"""Builds that are damaged, edited, of another format, or none at all: refused when opened, with what is wrong."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import onnx
import pytest

from surgeon.errors import BuildError, DeltaError, SurgeonError
from surgeon.runtime import Session, read_manifest
from surgeon.runtime.document import canonical_hash, seal
from surgeon.runtime.files import check_files, hash_file


def refused(build, match, kind=BuildError):
    with pytest.raises(kind, match=match) as caught:
        Session(build, threads=1)
    assert caught.value.exit_code == 1


def test_a_good_build_is_whole(build):
    check_files(build, read_manifest(build))


def test_sealing_is_repeatable_and_sees_every_change(pristine):
    doc = json.loads((pristine / "manifest.json").read_text())
    assert seal(doc) == doc == seal(seal(doc))
    assert canonical_hash({**doc, "opset": 21}) != doc["sha256"]


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "tasks/movies.onnx_adapter"])
def test_a_flipped_byte_in_any_file_that_runs_is_refused(build, name):
    data = bytearray((build / name).read_bytes())
    data[len(data) // 2] ^= 1
    (build / name).write_bytes(data)
    refused(build, "manifest")


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "tasks/movies.onnx_adapter"])
@pytest.mark.parametrize("keep", [0, 0.5, None])
def test_a_cut_or_missing_file_is_refused(build, name, keep):
    path = build / name
    if keep is None:
        path.unlink()
    else:
        os.truncate(path, int(path.stat().st_size * keep))
    refused(build, name.replace(".", r"\."), SurgeonError)


def test_a_changed_tokenizer_is_refused_when_texts_come(build):
    (build / "tokenizer.json").write_text("{}")
    with (
        Session(build, threads=1) as session,
        pytest.raises(BuildError, match=r"tokenizer\.json has 2 bytes instead of"),
    ):
        session.encode(["w2"])


def test_check_files_lists_every_difference_at_once(build):
    (build / "tasks/topics.safetensors").write_bytes(b"")
    (build / "model.onnx.data").unlink()
    (build / "tokenizer.json").write_text("{}")
    with pytest.raises(BuildError, match="3 of the build's files") as caught:
        check_files(build, read_manifest(build))
    for part in ("topics.safetensors has other content", "model.onnx.data is missing", "tokenizer.json has 2 bytes"):
        assert part in str(caught.value)


def test_a_trusted_build_is_not_hashed_and_runs_the_same(build, inputs):
    with Session(build, threads=1) as hashed, Session(build, threads=1, verify=False) as trusted:
        assert np.array_equal(hashed.run(inputs, "movies")["logits"], trusted.run(inputs, "movies")["logits"])
    (build / "model.onnx.data").write_bytes((build / "model.onnx.data").read_bytes()[::-1])
    Session(build, threads=1, verify=False).close()
    (build / "tasks/movies.onnx_adapter").write_bytes(b"x")
    with pytest.raises(DeltaError, match="not a task file"):
        Session(build, threads=1, verify=False)


def test_an_edited_manifest_is_refused(build):
    path = build / "manifest.json"
    path.write_text(path.read_text().replace('"good"', '"fine"'))
    refused(build, "edited")


def test_a_manifest_cut_anywhere_is_refused(build):
    path = build / "manifest.json"
    text = path.read_text()
    for length in range(0, len(text), 97):
        path.write_text(text[:length])
        refused(build, "cut or not JSON")


@pytest.mark.parametrize("text", ["[]", "null", "{}", '{"format": true}', "[" * 100_000, "\xff"])
def test_json_that_is_no_manifest_is_refused(build, text):
    (build / "manifest.json").write_text(text, encoding="latin-1")
    refused(build, "manifest")


def test_a_newer_format_is_refused_by_its_number(build, reseal):
    reseal(lambda doc: doc.update(format=2, surgeon="9.9", deltas="of another form"))
    refused(build, r"format 2, this Surgeon reads format 1\n.*Surgeon 9\.9")


def test_a_directory_without_manifest_is_no_build(tmp_path):
    refused(tmp_path, "not a build")
    refused(tmp_path / "none", "not a build")


def test_every_field_that_is_gone_or_of_another_kind_is_named(build, reseal):
    doc = json.loads((build / "manifest.json").read_text())
    for key in set(doc) - {"format", "sha256"}:
        reseal(lambda doc, key=key: doc.pop(key))
        refused(build, f"'{key}' is missing or is not")
        reseal(lambda _, key=key: _.update({key: doc[key]}))
    reseal(lambda doc: doc["deltas"][3].update(free={"7": "r"}))
    refused(build, r"'deltas\[3\]\.free' is missing or is not a map")


@pytest.mark.parametrize("path", ["../x.onnx_adapter", "/etc/passwd", "tasks/../../x", "a\\..\\x", "C:x", ""])
def test_a_path_that_leaves_the_build_is_refused(build, reseal, path):
    reseal(lambda doc: doc["tasks"]["movies"].update(adapter=path))
    refused(build, "outside the build")


def test_a_model_that_lost_a_delta_is_refused(build, reseal):
    path = build / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    for value in [value for value in model.graph.input if value.name == "l0.bias"]:
        model.graph.input.remove(value)
    path.write_bytes(model.SerializeToString())
    size = path.stat().st_size
    reseal(lambda doc: doc["files"].update({"model.onnx": {"sha256": hash_file(path), "bytes": size}}))
    refused(build, r"deltas are not those of the manifest\n.*only in the manifest: l0.bias float32\[8\]")


def test_a_model_that_is_none_is_refused(build, reseal):
    (build / "model.onnx").write_bytes(b"garbage")
    entry = {"sha256": hash_file(build / "model.onnx"), "bytes": 7}
    reseal(lambda doc: doc["files"].update({"model.onnx": entry}))
    refused(build, "cannot load the model")


def test_the_tasks_of_two_builds_may_be_exchanged_by_nobody(build):
    tasks = build / "tasks"
    shutil.copy(tasks / "topics.onnx_adapter", tasks / "movies.onnx_adapter")
    refused(build, "'movies' is not the one the manifest names")
