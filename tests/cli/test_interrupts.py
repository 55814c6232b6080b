"""An interrupt at any moment ends a command with 130 and leaves nothing half done."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import threading

import pytest


class Trigger(io.StringIO):
    """A stderr that interrupts this process as soon as `marker` is said.

    Not some time later: within a callback of the interpreter's own, an interrupt is dropped.
    """

    def __init__(self, marker, number=signal.SIGINT):
        super().__init__()
        self.marker, self.number, self.done = marker, number, False

    def write(self, text):
        if self.marker in text and not self.done:
            self.done = True
            signal.raise_signal(self.number)
        return super().write(text)


STEPS = ("reading the base", "tracing", "operating", "converting to ONNX", "writing the build")


@pytest.fixture(autouse=True)
def interruptible(built):
    """What runs in a shell's background ignores SIGINT, and so would all that it starts.

    `built` comes first: an import of torch's that is interrupted halfway would spoil it for all later tests.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("marker", STEPS)
def test_an_interrupted_compile_leaves_nothing(surgeon, write_spec, unchanged, tmp_path, marker):
    spec = write_spec("[lora: {rank: 2, where: [ffn.up]}]", "{mood: {labels: [good, bad]}, topic: {labels: 3}}")
    with unchanged(tmp_path):
        ran = surgeon("compile", spec, "-o", tmp_path / "build", err=Trigger(marker))
    assert ran.code == 130
    assert "interrupted" in ran.err
    assert "Traceback" not in ran.err


def test_a_polite_kill_cleans_up_as_an_interrupt_does(surgeon, write_spec, unchanged, tmp_path):
    spec = write_spec()
    with unchanged(tmp_path), pytest.raises(SystemExit) as ended:
        surgeon("compile", spec, "-o", tmp_path / "build", err=Trigger("writing the build", signal.SIGTERM))
    assert ended.value.code == 128 + signal.SIGTERM


def test_an_interrupted_process_ends_with_130(write_spec, unchanged, tmp_path):
    command = [sys.executable, "-m", "surgeon", "compile", write_spec(), "-o", tmp_path / "build"]
    with unchanged(tmp_path), subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert "Traceback" not in process.stderr.read()


@contextlib.contextmanager
def interrupt_at_checkpoint(build):
    """Interrupt this process as soon as there is a checkpoint."""
    over = threading.Event()

    def watch():
        while not over.wait(0.01):
            if any((build / ".training").rglob("*.safetensors")):
                os.kill(os.getpid(), signal.SIGINT)
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def test_an_interrupted_training_leaves_the_build_and_goes_on_where_it_was(surgeon, build, rows, unchanged):
    command = ("train", build, "-t", "mood", "--data", rows, "--epochs", 4, "--batch-size", 2, "--checkpoint-steps", 1)
    with unchanged(build / "tasks"), interrupt_at_checkpoint(build):
        ran = surgeon(*command)
    assert ran.code == 130, ran.err
    assert surgeon("verify", build, "--no-torch").code == 0
    again = surgeon(*command)
    assert again.code == 0, again.err
    assert "went on from step" in again.err
    assert "packed 'mood'" in again.out
    assert not (build / ".training").exists()


def test_an_interrupted_training_is_forgotten_where_asked_for(surgeon, refused, build, rows):
    command = ("train", build, "-t", "mood", "--data", rows, "--checkpoint-steps", 1)
    with interrupt_at_checkpoint(build):
        assert surgeon(*command, "--epochs", 40).code == 130
    refused(1, ("another run", "epochs", "--fresh"), *command, "--epochs", 1)
    ran = surgeon(*command, "--epochs", 1, "--fresh", "--validation", rows)
    assert ran.code == 0, ran.err
    assert "accuracy" in ran.out
    assert "exact match" not in ran.out  # of classes it is the accuracy


@pytest.mark.parametrize("marker", ["operating", "training"])
def test_a_training_interrupted_before_or_after_leaves_the_build_whole(surgeon, build, rows, unchanged, marker):
    with unchanged(build / "tasks"):
        ran = surgeon("train", build, "-t", "mood", "--data", rows, "--epochs", 1, err=Trigger(f"  {marker}"))
    assert ran.code == 130, ran.err
    assert surgeon("verify", build, "--no-torch").code == 0
