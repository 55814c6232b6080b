"""A run that was killed ends where one that was not would have; what is damaged or of another run is refused."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from surgeon.errors import BuildError, DataError
from surgeon.train import (
    DivergedError,
    TrainOptions,
    clear_checkpoints,
    train_task,
)
from surgeon.train.checkpoint import newest_checkpoint

OPTIONS = TrainOptions(epochs=2, learning_rate=2e-2, batch_size=8, max_length=12, seed=3, threads=1)

CONFTEST = str(Path(__file__).with_name("conftest.py"))


def test_a_killed_run_resumed_ends_where_an_unbroken_one_does(
    model, tokenizer, tmp_path, tiny_rows, weights, assert_equal
):
    fresh, rows = weights(model), tiny_rows(60, 1)
    unbroken = train_task(model, tokenizer, rows, None, OPTIONS)
    wanted = weights(model)
    code = f"import runpy, pathlib; runpy.run_path({CONFTEST!r})['train_and_hang'](pathlib.Path({str(tmp_path)!r}), 11)"
    one = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=one
    ) as child:
        assert child.stdout.readline() == b"hanging\n"
        child.send_signal(signal.SIGKILL)
    checkpoints = tmp_path / "checkpoints"
    assert [p.name for p in checkpoints.iterdir()] == ["step-00000010.safetensors"]
    model.load_state_dict(fresh)
    resumed = train_task(model, tokenizer, rows, None, OPTIONS, checkpoint_dir=checkpoints)
    assert (resumed.resumed_from, resumed.steps) == (10, unbroken.steps)
    assert_equal(weights(model), wanted, 1e-6)
    assert [e.loss for e in resumed.history] == pytest.approx([e.loss for e in unbroken.history], abs=1e-6)


def test_a_finished_run_is_not_run_again(model, tokenizer, tmp_path, tiny_rows, weights, assert_equal):
    fresh, folder = weights(model), tmp_path / "checkpoints"
    train_task(model, tokenizer, tiny_rows(16, 1), None, OPTIONS, checkpoint_dir=folder)
    wanted = weights(model)
    model.load_state_dict(fresh)
    again = train_task(model, tokenizer, tiny_rows(16, 1), None, OPTIONS, checkpoint_dir=folder)
    assert again.resumed_from == again.steps == 4
    assert_equal(weights(model), wanted, 0)
    (folder / "mine.txt").touch()
    clear_checkpoints(folder)
    assert [p.name for p in folder.iterdir()] == ["mine.txt"]


def test_an_interrupt_leaves_the_last_checkpoint_and_the_model_as_it_was(
    model, tokenizer, tmp_path, tiny_rows, weights, assert_equal
):
    fresh = weights(model)

    def interrupt(now):
        if now.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_task(model, tokenizer, tiny_rows(16, 1), None, OPTIONS, checkpoint_dir=tmp_path, progress=interrupt)
    assert newest_checkpoint(tmp_path).step == 2
    assert_equal(weights(model), fresh, 0)
    assert train_task(model, tokenizer, tiny_rows(16, 1), None, OPTIONS, checkpoint_dir=tmp_path).resumed_from == 2


def test_a_checkpoint_of_another_run_is_not_taken_up(model, tokenizer, tmp_path, tiny_rows, weights, assert_equal):
    fresh = weights(model)
    train_task(model, tokenizer, tiny_rows(16, 1), None, OPTIONS, checkpoint_dir=tmp_path)
    model.load_state_dict(fresh)
    other = OPTIONS.model_copy(update={"learning_rate": 0.5})
    with pytest.raises(
        DataError, match=r"training rows, learning_rate \(0.02 there, 0.5 here\)|learning_rate .*training"
    ):
        train_task(model, tokenizer, tiny_rows(24, 1), None, other, checkpoint_dir=tmp_path)
    assert_equal(weights(model), fresh, 0)


def test_a_checkpoint_is_tensors_and_json_and_a_damaged_one_is_refused(model, tokenizer, tmp_path, tiny_rows):
    folder = tmp_path / "checkpoints"
    train_task(model, tokenizer, tiny_rows(16, 1), None, OPTIONS, checkpoint_dir=folder)
    (path,) = folder.iterdir()
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["state"])["best_epoch"] == 2
    (folder / "step-00000099.safetensors.partial").write_bytes(b"cut off")
    assert newest_checkpoint(folder).step == 4
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataError, match="the checkpoint is damaged"):
        newest_checkpoint(folder)


def test_a_checkpoint_that_cannot_be_written_ends_the_run(model, tokenizer, tmp_path, tiny_rows, weights, assert_equal):
    fresh, taken = weights(model), tmp_path / "a-file"
    taken.touch()
    with pytest.raises(BuildError, match="the checkpoint could not be written"):
        train_task(model, tokenizer, tiny_rows(16, 1), None, OPTIONS, checkpoint_dir=taken)
    assert_equal(weights(model), fresh, 0)


def test_a_loss_that_is_not_finite_ends_the_run_and_leaves_nothing(
    model, tokenizer, tmp_path, tiny_rows, weights, assert_equal
):
    fresh, folder = weights(model), tmp_path / "checkpoints"
    options = OPTIONS.model_copy(
        update={"learning_rate": 1e30, "checkpoint_steps": 1, "grad_clip": None, "warmup": 0.0}
    )
    with pytest.raises(DivergedError, match=r"at step \d+ of 4\n.*last finite loss: .* at step \d") as caught:
        train_task(model, tokenizer, tiny_rows(16, 1), None, options, checkpoint_dir=folder)
    assert caught.value.exit_code == 1
    assert not folder.exists()
    assert_equal(weights(model), fresh, 0)
