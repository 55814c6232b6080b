"""A base that is missing, damaged or another one is told, and nothing is written."""

from __future__ import annotations

import json
import shutil

import pytest
import torch


@pytest.fixture
def folder(base_folder, tmp_path):
    """The tiny base, to damage."""
    return shutil.copytree(base_folder, tmp_path / "base")


def cut(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def pickle(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"weight": torch.zeros(2)}, folder / "pytorch_model.bin")


def lose(folder):
    (folder / "model.safetensors").unlink()


def widen(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))


def rename(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "bertt"}))


DAMAGES = {
    "truncated": (cut, ("model.safetensors", "truncated")),
    "a pickle": (pickle, ("pytorch_model.bin", "pickle", "weights_only=True")),
    "without weights": (lose, ("weights are missing",)),
    "of another shape than it says": (widen, ("intermediate",)),
    "of an architecture that is not known": (rename, ("bertt", "did you mean 'bert'?")),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_base_is_refused(refused, write_spec, unchanged, folder, tmp_path, case):
    damage, words = DAMAGES[case]
    damage(folder)
    spec = write_spec(base=f"{{model: {folder}}}")
    with unchanged(tmp_path):
        refused(1, words, "compile", spec, "-o", tmp_path / "build")


@pytest.mark.parametrize(
    ("base", "code", "words"),
    [
        ("{model: ./nowhere}", 1, ("./nowhere", "no such folder")),
        ("{model: 'package:no_such_package/model'}", 1, ("no_such_package", "pip")),
        ("{model: someone/something}", 1, ("someone/something",)),
        ("{config: {model_type: bertt}}", 2, ("bertt", "did you mean 'bert'?")),
        ("{config: {model_type: bert, hidden: 32}}", 2, ("no 'hidden'",)),
        ("{}", 2, ("`model` or `config`",)),
    ],
)
def test_a_base_that_is_not_there_is_told(refused, write_spec, base, code, words):
    refused(code, words, "plan", write_spec(base=base))


def test_a_head_that_the_base_cannot_have_is_told(refused, write_spec, base_folder):
    refused(1, ("seq2seq-lm", "sequence-classification"), "inspect", base_folder, "--head", "seq2seq-lm")
    refused(2, ("did you mean 'causal-lm'?",), "inspect", base_folder, "--head", "causal-ml")


def test_a_build_is_not_trained_on_another_base_than_its_own(
    refused, surgeon, write_spec, folder, tiny, unchanged, tmp_path, rows
):
    assert surgeon("compile", write_spec(base=f"{{model: {folder}}}"), "-o", tmp_path / "build").code == 0
    tiny("bert", seed=1).save_pretrained(folder)
    with unchanged(tmp_path):
        refused(1, ("not the one this build was made from",), "train", tmp_path / "build", "-t", "mood", "--data", rows)
