"""`surgeon import` and `surgeon export` from outside: answers, exit codes, and builds that stay as they were."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

import surgeon

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft import LoraConfig

CLASSIFIER = "sequence-classification"


@pytest.fixture(scope="module")
def base(foundry):
    return foundry.base("bert", CLASSIFIER)


@pytest.fixture(scope="module")
def folder(foundry, base, tmp_path_factory):
    config = LoraConfig(r=2, lora_alpha=4, task_type="SEQ_CLS", target_modules=["query", "key"])
    return foundry.peft(base, CLASSIFIER, config, tmp_path_factory.mktemp("commands") / "mood").path


@pytest.fixture(scope="module")
def build(base, tmp_path_factory):
    """Of queries and values, so that the folder's keys have no place; one task keeps the base's head."""
    out = tmp_path_factory.mktemp("built") / "build"
    tasks = {"mood": {"labels": 2}, "topic": {"labels": 3}, "own": {}}
    surgeon.compile({"base": {"model": str(base)}, "surgery": [{"lora": {"rank": 2}}], "tasks": tasks}, out=out)
    return out


def content(folder):
    return {p: p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def test_a_build_is_made_and_told_as_json(surgeon_cli, folder, base, tmp_path):
    ran = surgeon_cli("import", folder, f"again={folder}", "--base", base, "-o", tmp_path / "build", "--json")
    assert ran.code == 0, ran.err
    told = json.loads(ran.out)
    assert [(one["task"], one["method"]) for one in told["tasks"]] == [("mood", "LORA"), ("again", "LORA")]
    ran = surgeon_cli("verify", tmp_path / "build", "--json")
    assert ran.code == 0, ran.err


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        ((), 2, "--build BUILD, or --base BASE"),
        (("--base", "{base}"), 2, "--build BUILD, or --base BASE"),
        (("--build", "{build}", "--base", "{base}", "-o", "{out}"), 2, "--build BUILD, or --base BASE"),
        (("--build", "{build}", "--task", "moodd"), 2, "did you mean 'mood'?"),
        (("{folder}", "--build", "{build}"), 2, "two folders are one task 'mood'"),
        (("other={folder}", "--build", "{build}", "--task", "mood"), 2, "--task names the task of one folder"),
        (("--base", "{base}", "-o", "{out}", "--head", "classification"), 2, "there is no head"),
        (("--base", "{base}", "-o", "{build}"), 1, "not empty"),
        (("--build", "{build}"), 1, "the build has no `lora` for attention.key"),
        (("--build", "{folder}"), 1, "not a build"),
        (("a b={folder}", "--base", "{base}", "-o", "{out}"), 2, "write a-b=FOLDER"),
    ],
)
def test_what_is_wrong_is_told_and_nothing_written(args, code, words, surgeon_cli, folder, base, build, tmp_path):
    named = {"base": base, "build": build, "folder": folder, "out": tmp_path / "out"}
    before = content(build)
    ran = surgeon_cli("import", folder, *(arg.format(**named) for arg in args))
    assert (ran.code, ran.out) == (code, ""), ran.err
    assert words in ran.err
    assert content(build) == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("task", "words"), [("topic", "[32, 2]"), ("own", "keeps the base's own")])
def test_a_task_of_other_labels_stays_as_it_is(task, words, surgeon_cli, foundry, base, build, tmp_path):
    config = LoraConfig(r=2, lora_alpha=4, task_type="SEQ_CLS", target_modules=["query", "value"])
    path = foundry.peft(base, CLASSIFIER, config, tmp_path / task).path
    before = content(build)
    ran = surgeon_cli("import", path, "--build", build)
    assert ran.code == 1
    assert words in ran.err
    assert content(build) == before


def test_export_refuses_what_it_must(surgeon_cli, build, tmp_path):
    assert surgeon_cli("export", build, "--task", "nobody", "-o", tmp_path / "x").code == 2
    assert surgeon_cli("export", build, "--task", "mood", "-o", tmp_path / "x", "--to", "nemo").code == 2
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine").touch()
    assert surgeon_cli("export", build, "--task", "mood", "-o", tmp_path / "x").code == 1
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["mine"]
