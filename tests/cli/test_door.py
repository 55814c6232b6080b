"""The door: help, version, and what every failure looks like from outside."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from surgeon import __version__
from surgeon.cli import explained

COMMANDS = (
    *("init", "list", "schema", "inspect", "plan", "count", "compile", "train", "fusion", "pack", "run", "verify"),
    *("import", "export"),
)


def test_the_version_is_the_packages(surgeon):
    assert surgeon("--version").out == f"surgeon {__version__}\n"


def test_no_command_at_all_is_a_call_for_help(surgeon):
    ran = surgeon()
    assert ran.code == 0
    assert all(command in ran.out for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_command_has_an_example(surgeon, command):
    shown = " ".join(surgeon(command, "--help").out.split())
    assert f"surgeon {command}" in shown.partition("Example")[2]


def test_help_loads_nothing_heavy():
    code = "import sys; from surgeon.cli import main; main(['compile', '--help']); print(sorted(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not [name for name in ("'torch'", "'transformers'", "'onnxruntime'") if name in shown]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("compil",), ("compil", "surgeon --help")),
        (("compile",), ("Missing argument", "surgeon compile --help")),
        (("compile", "spec.yaml"), ("Missing option", "--out")),
        (("plan", "spec.yaml", "--jsn"), ("--jsn", "--json")),
        (("run", "build", "text", "--threads", "many"), ("--threads", "integer")),
    ],
)  # fmt: skip
def test_a_command_typed_wrongly_is_told_what_is_wrong(refused, command, words):
    refused(2, words, *command)


def test_errors_are_json_for_machines(surgeon, tmp_path):
    ran = surgeon("plan", tmp_path / "nothing.yaml", "--json")
    told = json.loads(ran.err)
    assert (ran.code, told["exit_code"], told["error"]) == (2, 2, "SpecError")
    assert told["where"].endswith("nothing.yaml")


def test_every_mistake_of_a_spec_is_in_the_json(surgeon, write_spec):
    ran = surgeon("plan", write_spec("[lorra: {}, lora: {alfa: 1}]"), "--json")
    assert [problem["what"] for problem in json.loads(ran.err)["problems"]] == [
        "unknown technique 'lorra'",
        "'lora' has no option 'alfa'",
    ]


def test_a_traceback_is_shown_where_asked_for(surgeon, tmp_path):
    with pytest.raises(Exception, match="no such spec"):
        surgeon("--traceback", "plan", tmp_path / "nothing.yaml")


def test_a_fault_of_our_own_says_so_and_where_to_report_it():
    told = explained(KeyError("lost"), ["plan", "a spec.yaml"])
    assert told.exit_code == 3
    assert told.what == "internal error: KeyError: 'lost'"
    assert "surgeon --traceback plan 'a spec.yaml'" in told.try_


def test_what_the_system_refuses_is_no_fault_of_ours():
    told = explained(OSError(28, "No space left on device", "build/model.onnx"), [])
    assert (told.exit_code, told.where) == (1, "build/model.onnx")


def test_a_reader_that_leaves_early_is_no_error():
    command = f"{sys.executable} -m surgeon --help | head -1"
    ran = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert ran.stderr == ""
