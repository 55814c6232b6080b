"""A build that was edited or cut, and weights that do not fit, are refused before anything runs or changes."""

from __future__ import annotations

import json
import resource

import pytest
import safetensors.torch
import torch

from surgeon.runtime.document import canonical_hash


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def adapter(build):
    return next((build / "tasks").glob("mood.*.onnx_adapter"))


DAMAGES = {
    "the weights' file edited": lambda build: flip(build / "model.onnx.data"),
    "the weights' file cut": lambda build: cut(build / "model.onnx.data"),
    "the weights' file gone": lambda build: (build / "model.onnx.data").unlink(),
    "the graph edited": lambda build: flip(build / "model.onnx"),
    "a task file edited": lambda build: flip(adapter(build)),
    "a task file cut": lambda build: cut(adapter(build)),
    "a task file gone": lambda build: adapter(build).unlink(),
    "the manifest edited": lambda build: edit(build, opset=21),
    "the manifest cut": lambda build: cut(build / "manifest.json"),
    "the manifest gone": lambda build: (build / "manifest.json").unlink(),
}


def edit(build, *, seal=False, **changes):
    document = json.loads((build / "manifest.json").read_text()) | changes
    if seal:
        document["sha256"] = canonical_hash(document)
    (build / "manifest.json").write_text(json.dumps(document))


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_build_neither_runs_nor_passes(refused, build, case):
    DAMAGES[case](build)
    refused(1, (), "run", build, "--task", "mood", "text")
    refused(1, (), "verify", build)


def test_weights_for_training_that_were_edited_do_not_pass(refused, build):
    flip(next((build / "tasks").glob("mood.*.safetensors")))
    refused(1, ("mood", "hash"), "verify", build)


def test_a_build_of_a_newer_format_says_which_version_reads_it(refused, build):
    edit(build, seal=True, format=2)
    refused(1, ("format 2", "reads format 1", "newer"), "run", build, "text")
    refused(1, ("format 2",), "verify", build)


def test_what_is_no_build_is_told(refused, tmp_path):
    refused(1, ("not a build", "surgeon compile"), "run", tmp_path, "text")
    refused(1, ("not a build",), "verify", tmp_path / "nowhere")


def trained(build):
    return safetensors.torch.load_file(next((build / "tasks").glob("mood.*.safetensors")))


def without(tensors, name):
    return {key: tensor for key, tensor in tensors.items() if key != name}


QUERY = "bert.encoder.layer.0.attention.self.query.lora_A"
UNFIT = {
    "a missing tensor": (lambda t: without(t, QUERY), ("1 of 6", "missing", QUERY)),
    "an extra tensor": (lambda t: t | {"extra": torch.zeros(2)}, ("unexpected", "extra")),
    "a misshapen tensor": (lambda t: t | {QUERY: torch.zeros(31, 2)}, (QUERY, "[31, 2]", "32")),
    "a tensor of another rank than its partner": (
        lambda t: t | {QUERY: torch.zeros(32, 5)},
        (QUERY.rpartition(".")[0],),
    ),
    "a NaN": (lambda t: t | {QUERY: t[QUERY].index_fill(0, torch.tensor(3), torch.nan)}, (QUERY, "NaN", "2 of 64")),
}


@pytest.mark.parametrize("case", UNFIT)
def test_weights_that_do_not_fit_are_not_packed(refused, build, unchanged, tmp_path, case):
    change, words = UNFIT[case]
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(change(trained(build)), path)
    with unchanged(tmp_path):
        refused(1, (str(path), *words), "pack", build, "--task", "mood", path)


def test_weights_of_another_base_are_not_packed(refused, build, unchanged, tmp_path):
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(trained(build), path, metadata={"base": "0123456789abcdef" * 4})
    with unchanged(tmp_path):
        refused(1, ("another base", "0123456789abcdef"), "pack", build, "--task", "mood", path)


def test_a_file_that_holds_no_weights_is_not_packed(refused, build, unchanged, tmp_path):
    torch.save(trained(build), tmp_path / "weights.bin")
    (tmp_path / "cut.safetensors").write_bytes(next((build / "tasks").glob("mood.*.safetensors")).read_bytes()[:-9])
    with unchanged(tmp_path):
        refused(1, ("weights.bin", "pickle"), "pack", build, "--task", "mood", tmp_path / "weights.bin")
        refused(1, ("cut.safetensors",), "pack", build, "--task", "mood", tmp_path / "cut.safetensors")
        refused(1, ("nowhere.safetensors",), "pack", build, "--task", "mood", tmp_path / "nowhere.safetensors")


def test_weights_for_a_task_that_there_is_not_are_not_packed(refused, build, tmp_path):
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(trained(build), path)
    refused(2, ("no task 'moodd'", "did you mean 'mood'?"), "pack", build, "--task", "moodd", path)


def test_an_output_that_is_not_empty_or_no_folder_is_left_alone(refused, write_spec, unchanged, tmp_path):
    spec = write_spec()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    with unchanged(tmp_path):
        refused(1, ("not empty",), "compile", spec, "-o", tmp_path / "full")
        refused(1, ("not a directory",), "compile", spec, "-o", spec)
        refused(1, (), "compile", spec, "-o", spec / "build")
        refused(1, ("cannot be written",), "compile", spec, "-o", "/proc/build")


@pytest.fixture
def full_disk():
    """No file grows past 20 kB, as if the disk were full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))

    yield fill
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_leaves_no_part_of_a_build(refused, write_spec, unchanged, tmp_path, full_disk):
    spec = write_spec()
    with unchanged(tmp_path):
        full_disk()
        refused(1, (str(tmp_path / "build"), "could not be written"), "compile", spec, "-o", tmp_path / "build")


def test_a_full_disk_leaves_a_build_as_it_was(refused, build, unchanged, tmp_path, full_disk):
    wide = {
        name: torch.ones([64 if size == 2 and "lora" in name else size for size in tensor.shape])
        for name, tensor in trained(build).items()
    }
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(wide, path)
    with unchanged(tmp_path):
        full_disk()
        refused(1, ("written",), "pack", build, "--task", "mood", path)
