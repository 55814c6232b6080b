"""`export.weights`: the base's weights stay in the checkpoint's own files, linked into the build or where they are."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import surgeon
from surgeon.audit import audit
from surgeon.base import Checkpoint
from surgeon.errors import BuildError, SpecError
from surgeon.runtime.document import parse_manifest, read_manifest, seal
from surgeon.spec import read_spec

SURGERY = [{"lora": {"rank": 2}}]
IDS = {"input_ids": [[5, 6, 7, 8], [9, 5, 6, 7]]}


def compile_spec(folder: Path, out: Path, weights: str, *surgery: Any, **more: Any) -> Path:
    """A build of two tasks, the second moved off its birth values."""
    base = {"model": str(folder), **more.pop("base", {})}
    export = {"weights": weights, **more}
    tasks: dict[str, Any] = {"a": {"labels": 3}, "b": {"labels": 2}}
    compiled = surgeon.compile({"base": base, "surgery": [*surgery] or SURGERY, "tasks": tasks, "export": export})
    noise = torch.Generator().manual_seed(0)
    model = compiled.model("b")
    with torch.no_grad():
        for name in model.state_dict():
            parameter = model.get_parameter(name)
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=noise).to(parameter.dtype))
    return compiled.save(out)


def answers(build: Path, **options: Any) -> list[np.ndarray[Any, Any]]:
    with surgeon.Session(build, threads=1, **options) as session:
        return [session.run(IDS, task)["logits"] for task in ("a", None, "b", "a")]


def same(one: list[np.ndarray[Any, Any]], other: list[np.ndarray[Any, Any]]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def own_bytes(build: Path) -> int:
    path = build / "model.onnx.data"
    return path.stat().st_size if path.exists() else 0


@pytest.fixture(scope="module")
def sharded(tiny, tmp_path_factory) -> Path:
    """A checkpoint of several files, each a symbolic link, as the hub's cache has them."""
    root = tmp_path_factory.mktemp("sharded")
    tiny("bert", num_hidden_layers=1, initializer_range=0.3).save_pretrained(root / "blobs", max_shard_size="20KB")
    assert len(list((root / "blobs").glob("*.safetensors"))) > 1
    (root / "snapshot").mkdir()
    for path in (root / "blobs").iterdir():
        (root / "snapshot" / path.name).symlink_to(path)
    return root / "snapshot"


@pytest.fixture(scope="module")
def builds(sharded, tmp_path_factory) -> dict[str, Path]:
    """The same spec in every form."""
    root = tmp_path_factory.mktemp("builds")
    return {w: compile_spec(sharded, root / w, w) for w in ("copy", "link", "reference")}


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("weights", ["link", "reference"])
def test_answers_are_those_of_a_copy_bit_for_bit(weights, verify, builds):
    found = answers(builds["copy"])
    assert same(answers(builds[weights], verify=verify), found)
    assert not np.array_equal(found[0][:, :2], found[2])


def test_the_base_is_written_once_or_not_at_all(builds, sharded):
    files = {path.name for path in sharded.glob("*.safetensors")}
    assert own_bytes(builds["copy"]) > 5 * own_bytes(builds["link"]) == 5 * own_bytes(builds["reference"])
    assert {path.name for path in builds["link"].glob("*.safetensors")} == files
    assert all((builds["link"] / name).samefile(sharded / name) for name in files)
    assert not any(path.is_symlink() for path in builds["link"].iterdir())
    assert not list(builds["reference"].glob("*.safetensors"))
    manifest = read_manifest(builds["reference"])
    assert manifest.checkpoint is not None
    assert (manifest.checkpoint.folder, set(manifest.checkpoint.files)) == (str(sharded), files)
    assert read_manifest(builds["link"]).checkpoint is None
    for weights, build in builds.items():
        assert read_manifest(build).weights == read_spec(build / "spec.yaml").export.weights == weights


def test_any_program_on_onnx_runtime_loads_a_linked_build(builds):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    plain = onnxruntime.InferenceSession(str(builds["link"] / "model.onnx"), options)
    ids = np.array(IDS["input_ids"])
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    [found] = plain.run(["logits"], feed)
    assert np.array_equal(found, answers(builds["copy"])[1])


def test_the_command_that_checks_a_build_says_where_its_weights_are(builds, sharded, capsys):
    from surgeon.cli import building

    for weights, said in (("link", "under the checkpoint's own names"), ("reference", str(sharded))):
        building.verify(builds[weights], torch=True)
        told = capsys.readouterr()
        assert said in " ".join((told.out + told.err).split())
    assert audit(builds["reference"], compare=False).checkpoint == str(sharded)


def test_a_changed_checkpoint_is_refused_by_its_hash(builds, sharded):
    path = next(iter(sharded.glob("*.safetensors")))
    data = path.read_bytes()
    try:
        path.write_bytes(bytes([*data[:-1], data[-1] ^ 1]))
        said = r"(?s)not the one that the build was made from.*hash differs.*compile again"
        with pytest.raises(BuildError, match=said):
            answers(builds["reference"])
        with pytest.raises(BuildError, match=r"safetensors has other content"):
            answers(builds["link"])
        answers(builds["reference"], verify=False)
        path.write_bytes(data[:-8])
        with pytest.raises(BuildError, match=r"(?s)not the one that the build was made from.*bytes instead of"):
            answers(builds["reference"], verify=False)
    finally:
        path.write_bytes(data)
    answers(builds["reference"])


def test_a_moved_checkpoint_is_refused_and_found_again_by_a_link(builds, sharded):
    before, elsewhere = answers(builds["reference"]), sharded.with_name("elsewhere")
    sharded.rename(elsewhere)
    try:
        with pytest.raises(BuildError, match=r"(?s)not where it was.*try: put it back, or a symbolic link"):
            answers(builds["reference"])
        sharded.symlink_to(elsewhere)
        assert same(answers(builds["reference"]), before)
        assert same(answers(builds["link"]), before)
    finally:
        sharded.unlink(missing_ok=True)
        elsewhere.rename(sharded)


@pytest.mark.sweep
def test_what_surgery_changed_and_what_no_checkpoint_has_is_in_the_data_file(sharded, builds, tmp_path):
    """Both graphs of a build read the checkpoint, and each other's data."""
    surgery, modes = {"qlora": {"rank": 2, "quantise": "ffn"}}, ["switch", "mixed"]
    copy, stays = (compile_spec(sharded, tmp_path / w, w, surgery, modes=modes) for w in ("copy", "reference"))
    assert same(answers(stays), answers(copy))
    model = onnx.load(stays / "model.onnx", load_external_data=False)
    places = {t.name: {e.key: e.value for e in t.external_data} for t in model.graph.initializer}
    packed = [node.input[1] for node in model.graph.node if node.op_type == "MatMulBnb4"]
    assert {places[name]["location"] for name in packed} == {"model.onnx.data"}
    assert own_bytes(stays) > own_bytes(builds["reference"])
    with surgeon.Session(stays, threads=1) as one, surgeon.Session(copy, threads=1) as other:
        rows = [s.run(IDS, ["b", None]) for s in (one, other)]
    assert all(np.array_equal(a["logits"], b["logits"]) for a, b in zip(*rows, strict=True))
    assert (stays / "mixed.onnx").stat().st_size < 2e5
    assert not list(stays.glob("*.safetensors"))


def test_a_base_in_hand_is_read_from_the_copy_that_the_build_keeps(tiny, tmp_path):
    spec = {"surgery": SURGERY, "tasks": {"a": {"labels": 3}}, "export": {"weights": "link"}}
    model = tiny("gpt2", head="sequence-classification", n_layer=1)
    build = surgeon.compile(spec, model).save(tmp_path / "build")
    assert own_bytes(build) < 0.2 * (build / "base/model.safetensors").stat().st_size
    assert "base/model.safetensors" in read_manifest(build).external
    assert surgeon.load(build).program.fingerprint
    moved = shutil.copytree(build, tmp_path / "moved")
    shutil.rmtree(build)
    with surgeon.Session(moved, threads=1) as session, torch.no_grad():
        found = session.run(IDS)["logits"]
        wanted = model(torch.tensor(IDS["input_ids"])).logits.numpy()
    assert np.abs(found - wanted).max() < 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.sweep)])
def test_half_precision_stays_so_in_the_build(dtype, tiny, tmp_path):
    """Its numbers are computed with in fp32, which holds them exactly: bit for bit the answers of an fp32 copy."""
    folder = tmp_path / "base"
    tiny("bert", num_hidden_layers=1).to(getattr(torch, dtype)).save_pretrained(folder)
    found = {w: compile_spec(folder, tmp_path / w, w) for w in ("float32", "copy", "link", "reference")}
    wanted = answers(found["float32"])
    assert all(same(answers(build), wanted) for build in found.values())
    assert own_bytes(found["copy"]) < 0.6 * own_bytes(found["float32"])
    assert own_bytes(found["link"]) == own_bytes(found["reference"]) < 0.2 * own_bytes(found["copy"])
    model = onnx.load(found["copy"] / "model.onnx", load_external_data=False)
    kinds = {t.data_type for t in model.graph.initializer if t.external_data and t.name.endswith(".half")}
    assert kinds == {getattr(onnx.TensorProto, dtype.upper())}
    assert audit(found["link"]).tolerance == 1e-4


def test_what_has_no_checkpoint_or_cannot_be_linked_is_told(sharded, tmp_path, monkeypatch):
    config = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config |= {"intermediate_size": 64, "vocab_size": 100, "max_position_embeddings": 64}
    path = tmp_path / "spec.yaml"
    path.write_text(f"base:\n  config: {json.dumps(config)}\ntasks: {{a: {{}}}}\nexport:\n  weights: link\n")
    with pytest.raises(SpecError, match=r"(?s)spec.yaml:5:12.*its checkpoint, and this base has none.*weights: copy"):
        surgeon.compile(path)
    surgeon.compile(path, weights=False)

    def refuse(*_: Any) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(BuildError, match=r"(?s)cannot be linked into the build.*same file system.*weights: reference"):
        compile_spec(sharded, tmp_path / "build", "link")
    assert not (tmp_path / "build").exists()


def edited(build: Path, key: str, value: Any) -> dict[str, Any]:
    document = json.loads((build / "manifest.json").read_text())
    document[key] = value(document[key])
    return seal(document)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("external", lambda _: ["other.data"], "'external'.*a list of files"),
        ("checkpoint", lambda found: {**found, "folder": 3}, "'checkpoint.folder'"),
        ("checkpoint", lambda found: {**found, "files": {}}, r"file' is missing or is not a file of the checkpoint"),
        ("checkpoint", lambda found: {**found, "files": {"../x": {"sha256": "", "bytes": 1}}}, "outside the build"),
        ("checkpoint", lambda f: {**f, "tensors": {"model.onnx": {"w": {"file": next(iter(f["files"])), "offset": 0,
                                                                        "dtype": "object", "shape": [1]}}}}, "dtype"),
        ("checkpoint", lambda f: {**f, "tensors": {"model.onnx": {"w": {"file": next(iter(f["files"])), "offset": 0,
                                                                        "dtype": "float", "shape": [-1]}}}}, "shape"),
    ],
)  # fmt: skip
def test_a_record_that_makes_no_sense_is_refused(key, value, said, builds):
    with pytest.raises(BuildError, match=said):
        parse_manifest(edited(builds["reference"], key, value), "manifest.json")


def test_a_place_past_the_end_of_a_file_is_refused(builds, tmp_path):
    build = shutil.copytree(builds["reference"], tmp_path / "build")

    def behind(found: dict[str, Any]) -> dict[str, Any]:
        for tensor in found["tensors"]["model.onnx"].values():
            tensor["offset"] = found["files"][tensor["file"]]["bytes"] - 1
        return found

    (build / "manifest.json").write_text(json.dumps(edited(build, "checkpoint", behind)))
    with pytest.raises(BuildError, match="past the end"):
        answers(build)


def test_where_tensors_lie_is_read_from_the_files_themselves(sharded):
    checkpoint = Checkpoint(sharded, tuple(sorted(path.name for path in sharded.glob("*.safetensors"))))
    from safetensors.torch import load_file

    for file in checkpoint.files:
        data, tensors = (sharded / file).read_bytes(), load_file(sharded / file)
        for place in (p for p in checkpoint.tensors() if p.file == file):
            wanted = tensors.pop(place.name)
            assert data[place.offset : place.offset + place.length] == wanted.numpy().tobytes()
        assert not tensors
    assert checkpoint.dtypes == {"F32"}
    assert checkpoint.layout != Checkpoint(sharded, checkpoint.files[:1]).layout


@pytest.mark.sweep
@pytest.mark.parametrize(("kind", "bar"), [("bert", 2e-3), ("llama", 4e-3), ("gpt2", 4e-3), ("t5", 1e-2)])
def test_a_graph_in_half_precision_runs_and_is_as_near_as_that_allows(kind, bar, tiny, tmp_path, lab):
    """fp16 on the CPU provider, by casts of its own around every product."""
    head = {"bert": "sequence-classification", "t5": "seq2seq-lm"}.get(kind, "causal-lm")
    tiny(kind).half().save_pretrained(tmp_path / "base")
    base = {"model": str(tmp_path / "base"), "head": head, "dtype": "float16"}
    for weights in ("copy", "link"):
        spec = {"base": base, "surgery": SURGERY, "tasks": {"a": {}}, "export": {"weights": weights}}
        compiled = surgeon.compile(spec)
        lab.move(compiled.model("a").eval())
        fed = lab.feed(compiled.base.model, 2, 9)
        assert lab.served(compiled, tmp_path / weights, [fed]) < bar


def test_a_graph_in_bfloat16_is_refused_and_its_weights_are_not(tiny, tmp_path):
    tiny("bert", num_hidden_layers=1).bfloat16().save_pretrained(tmp_path / "base")
    path = tmp_path / "spec.yaml"
    path.write_text(f"base:\n  model: {tmp_path / 'base'}\n  dtype: bfloat16\ntasks: {{a: {{}}}}\n")
    with pytest.raises(SpecError, match=r"(?s)spec.yaml:3:10.*in bfloat16.*dtype: float32"):
        surgeon.compile(path, out=tmp_path / "build")
    assert not (tmp_path / "build").exists()
