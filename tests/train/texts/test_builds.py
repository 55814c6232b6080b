"""A build that writes is trained over a file of rows, by one process and by two, and writes what it learned."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import surgeon
from surgeon.errors import SpecError
from surgeon.train import TrainOptions
from surgeon.train.builds import Files, train_build


@pytest.fixture(scope="module")
def built(tiny, write_tokenizer, tmp_path_factory):
    """A build that writes, over a folder with tokenizer and chat template, and rows of both sorts."""
    folder = tmp_path_factory.mktemp("writer")
    base = tiny("llama", num_hidden_layers=1, initializer_range=0.2)
    base.config.eos_token_id = base.generation_config.eos_token_id = 1
    base.save_pretrained(folder / "base")
    write_tokenizer(folder / "base")
    spec = {
        "base": {"model": str(folder / "base"), "head": "causal-lm"},
        "surgery": [{"lora": {"rank": 8, "where": ["attention", "ffn"]}}],
        "tasks": {"a": {}},
        "export": {"generate": True},
    }
    surgeon.compile(spec, out=folder / "build")
    lines = [{"prompt": f"w{i} is", "completion": f"c{i} c{i + 1}"} for i in range(4)]
    lines += [{"messages": [{"role": "user", "content": f"w{i}"}, {"role": "assistant", "content": f"c{i}"}]}
              for i in range(4)]  # fmt: skip
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def weights(build: Path) -> dict[str, torch.Tensor]:
    (path,) = (build / "tasks").glob("a.*.safetensors")
    return load_file(path)


def test_what_is_trained_is_written_by_onnx_runtime(built, tmp_path):
    build, rows = Path(shutil.copytree(built / "build", tmp_path / "build")), built / "rows.jsonl"
    options = TrainOptions(epochs=40, learning_rate=2e-2, batch_size=7, threads=1)
    said: list[str] = []
    result = train_build(build, {"a": Files(rows, rows)}, options=options, report=said.append)
    assert result.history[result.best_epoch - 1].exact_match == 1
    assert not any("cache" in step for step in said)  # what writes is not needed to train
    with surgeon.Session(build, threads=1) as session:
        talk = [{"role": "user", "content": "w3"}]
        found = session.generate(["w2 is", talk], "a")
        assert [(row.text, row.reason) for row in found] == [("c2 c3", "end"), ("c3", "end")]
    with pytest.raises(SpecError, match="loaded without what writes texts"):
        surgeon.load(build, writes=False).save(tmp_path / "again")


def test_two_processes_train_what_one_does(built, tmp_path):
    """Seven of eight rows are in one batch, which does not divide by two, and one alone in another."""
    alone, both = (Path(shutil.copytree(built / "build", tmp_path / name)) for name in ("alone", "both"))
    rows = built / "rows.jsonl"
    options = TrainOptions(epochs=4, learning_rate=5e-3, batch_size=7, threads=1)
    result = train_build(alone, {"a": Files(rows, rows)}, options=options)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "surgeon", "train", both, "--task", "a", "--data", rows, "--validation", rows]
    command += ["--epochs", "4", "--lr", "5e-3", "--batch-size", "7", "--threads", "1", "--json"]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            list(map(str, command)),
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    told = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0, 0], told
    assert told[1][0] == ""
    found = json.loads(told[0][0])
    for epoch, wanted in zip(found["history"], result.history, strict=True):
        assert flat(epoch) == pytest.approx(flat(asdict(wanted)), abs=1e-4)
    one, two = weights(alone), weights(both)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-4)


def flat(epoch: dict[str, Any]) -> dict[str, float]:
    """An epoch's figures, those of single tasks among them."""
    return {**epoch, **epoch["accuracies"], "accuracies": len(epoch["accuracies"])}
