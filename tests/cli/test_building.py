"""compile, pack, train, run, verify: the way of a build."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import safetensors.torch
import torch

from surgeon.cli import EXTRAS
from surgeon.train import TrainOptions

WITHOUT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {absent}:
            raise ModuleNotFoundError(f"No module named '{{name}}'", name=name)
sys.meta_path.insert(0, Absent())
from surgeon.cli import main
sys.exit(main(sys.argv[1:]))
"""


def without_extras(*args):
    """Run a command in a fresh interpreter that has the base install's packages only."""
    code = WITHOUT.format(absent=set(EXTRAS))
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def packed(build):
    manifest = json.loads((build / "manifest.json").read_text())
    return {name: safetensors.torch.load_file(build / task["weights"]) for name, task in manifest["tasks"].items()}


def test_compile_says_what_it_made_and_what_is_next(surgeon, write_spec, tmp_path):
    ran = surgeon("compile", write_spec(), "-o", tmp_path / "deep" / "build")
    assert ran.code == 0
    assert "surgeon train" in ran.out
    assert "converting to ONNX" in ran.err
    assert (tmp_path / "deep" / "build" / "manifest.json").exists()


def test_compile_answers_machines_with_json_alone(surgeon, write_spec, tmp_path):
    ran = surgeon("compile", write_spec(), "-o", tmp_path / "build", "--json")
    assert ran.json["tasks"] == ["mood"]
    assert ran.err == ""


def test_run_answers_with_the_tasks_labels(surgeon, built):
    answers = surgeon("run", built, "--task", "mood", "good film", "bad film", "--json").json
    assert [answer["text"] for answer in answers] == ["good film", "bad film"]
    assert all(set(answer["scores"]) == {"good", "bad"} for answer in answers)
    assert "good film" in surgeon("run", built, "-t", "topic", "good film").out


def test_run_needs_the_base_install_only(built):
    ran = without_extras("run", built, "--task", "mood", "a good film", "--json")
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)[0]["label"] in ("good", "bad")


@pytest.mark.parametrize(
    "command", [("compile", "spec.yaml", "-o", "build"), ("list",), ("train", "b", "--task", "t", "--data", "d.csv")]
)
def test_a_command_whose_extra_is_missing_says_which_to_install(command):
    ran = without_extras(*command)
    assert ran.returncode == 2
    assert "pip install 'modelsurgeon[compile]'" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_run_names_the_tasks_there_are(refused, built):
    refused(2, ("there is no task 'mod'", "mood, topic", "did you mean 'mood'?"), "run", built, "-t", "mod", "text")


def test_verify_compares_every_task_and_the_base_with_pytorch(surgeon, built):
    found = surgeon("verify", built, "--json").json
    assert [task["name"] for task in found["tasks"]] == [None, "mood", "topic"]
    assert all(task["difference"] < 1e-5 for task in found["tasks"])
    assert surgeon("verify", built).code == 0


def test_verify_without_torch_checks_files_and_tasks(built):
    ran = without_extras("verify", built, "--json")
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["compared"] is False


def test_training_learns_and_packs_one_task_and_leaves_the_other(surgeon, build, rows):
    before = packed(build)
    ran = surgeon(
        "train", build, "--task", "mood", "--data", rows, "--validation", rows, "--epochs", 12, "--lr", 0.05,
        "--batch-size", 14, "--json",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert ran.json["best_accuracy"] == 1.0
    after = packed(build)
    assert all(torch.equal(after["topic"][name], tensor) for name, tensor in before["topic"].items())
    assert any(not torch.equal(after["mood"][name], tensor) for name, tensor in before["mood"].items())
    answers = surgeon("run", build, "-t", "mood", "the film was great", "the film was poor", "--json").json
    assert [answer["label"] for answer in answers] == ["good", "bad"]
    assert surgeon("verify", build).code == 0
    assert not (build / ".training").exists()


def test_the_options_of_training_are_those_of_python(surgeon):
    shown = surgeon("train", "--help").out
    for name, field in TrainOptions.model_fields.items():
        assert f"--{name.replace('_', '-')}" in shown
        if field.default is not None:
            assert f"[{field.default:g}]" if isinstance(field.default, float | int) else f"[{field.default}]" in shown


def test_packing_puts_weights_in_that_were_trained_elsewhere_with_another_rank(surgeon, build, tmp_path):
    wide = {
        name: torch.full([5 if size == 2 and "lora" in name else size for size in tensor.shape], 0.25)
        for name, tensor in packed(build)["mood"].items()
    }
    safetensors.torch.save_file(wide, tmp_path / "mood.safetensors")
    ran = surgeon("pack", build, "--task", "mood", tmp_path / "mood.safetensors", "--json")
    assert ran.code == 0, ran.err
    assert all(torch.equal(packed(build)["mood"][name], tensor) for name, tensor in wide.items())
    assert len(list((build / "tasks").iterdir())) == 4
    assert surgeon("verify", build).code == 0


def test_a_base_in_fewer_bits_is_said_to_be_another(surgeon, write_spec, tmp_path):
    spec = write_spec(export="{weights: int8}")
    assert "matrices in int8: another base" in surgeon("plan", spec).out
    assert surgeon("compile", spec, "-o", tmp_path / "build").code == 0
    ran = surgeon("verify", tmp_path / "build")
    assert ran.code == 0, ran.err
    assert "holds the base in int8" in ran.out
