"""Adapters trained together with their base: the new base, its build, and a fusion of its tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import surgeon
from surgeon.audit import audit
from surgeon.cli import main
from surgeon.compiler import Compiled
from surgeon.errors import BuildError, DeltaError
from surgeon.train import TrainOptions
from surgeon.train.builds import CHECKPOINTS, Files, train_build

ADAPTER = {"adapter": {"placement": "pfeiffer", "activation": "relu", "bottleneck": 4}}
TASKS = {"mood": {"labels": ["good", "bad"]}, "size": {"labels": 3}, "idle": {"labels": 2}}
OPTIONS = TrainOptions(epochs=2, batch_size=4, learning_rate=1e-2, base_learning_rate=1e-2, threads=1)
TEXTS = ["the film was good", "a dull film", "poor", "was the film great a fine film"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Files]:
    """Rows of two tasks of different size."""
    folder = tmp_path_factory.mktemp("data")
    words = {"good": ("good", "fine", "great"), "bad": ("bad", "poor", "dull")}
    mood = [f"the film was {word},{label}" for label, some in words.items() for word in some for _ in range(4)]
    size = [f"{' '.join(['film'] * (i + 1))},{i}" for i in range(3)]
    for name, lines in {"mood": mood, "size": size}.items():
        (folder / f"{name}.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    return {name: Files(folder / f"{name}.csv", folder / f"{name}.csv") for name in ("mood", "size")}


@pytest.fixture(scope="module")
def build(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fresh adapters of three tasks; to read only."""
    out = tmp_path_factory.mktemp("old") / "build"
    surgeon.compile({"base": {"model": str(base_folder)}, "surgery": [ADAPTER], "tasks": TASKS}, out=out)
    return out


@pytest.fixture(scope="module")
def moved(build: Path, files: dict[str, Files]) -> Path:
    """The same, two of the tasks and the base trained together."""
    before = {path: path.read_bytes() for path in build.rglob("*") if path.is_file()}
    train_build(build, files, train_base=build.parent / "moved", options=OPTIONS)
    assert {path: path.read_bytes() for path in build.rglob("*") if path.is_file()} == before
    return build.parent / "moved"


@pytest.fixture(scope="module")
def opened(moved: Path) -> Compiled:
    """The new build; to read only."""
    return surgeon.load(moved)


def gap(folder: Path, compiled: Compiled) -> float:
    """The largest difference between the opened build in PyTorch and ONNX Runtime, tasks swapped back and forth."""
    gaps = []
    with surgeon.Session(folder, threads=1) as session, torch.no_grad():
        inputs = session.encode(TEXTS)
        fed = {name: torch.from_numpy(array) for name, array in inputs.items()}
        for task in (*compiled.tasks, None, *reversed(compiled.tasks)):
            model: Any = compiled.base.model if task is None else compiled.model(task).eval()
            found = torch.from_numpy(session.run(inputs, task=task)["logits"])
            gaps.append(float((found - model(**fed).logits).abs().max()))
    return max(gaps)


def test_a_build_over_the_new_base_runs_as_it_was_trained(moved: Path, opened: Compiled, base_folder: Path) -> None:
    assert gap(moved, opened) < 1e-5
    assert opened.tasks == ("mood", "size")
    assert audit(moved).compared
    old, new = (load_file(folder / "model.safetensors") for folder in (base_folder, moved / "base"))
    assert new.keys() == old.keys()
    assert [n for n in new if torch.equal(new[n], old[n])] == ["classifier.bias", "classifier.weight"]
    theirs = AutoModelForSequenceClassification.from_pretrained(moved / "base")
    assert all(torch.equal(new[name], tensor) for name, tensor in theirs.state_dict().items() if name in new)
    tokenizer = (base_folder / "tokenizer.json").read_bytes()
    assert (moved / "base" / "tokenizer.json").read_bytes() == (moved / "tokenizer.json").read_bytes() == tokenizer


def test_its_adapters_are_fused_over_it_and_over_no_other_base(
    moved: Path, opened: Compiled, base_folder: Path, tmp_path: Path
) -> None:
    fused = {"surgery": [{"fusion": {"of": ["mood", "size"], "build": str(moved)}}], "tasks": {"new": {"labels": 2}}}
    compiled = surgeon.compile({"base": {"model": str(moved / "base")}, **fused})
    own = compiled.model("new").state_dict()
    trained = opened.model("size").state_dict()
    (down,) = [n for n in trained if n.endswith("adapter.down.weight")]
    (stacked,) = [n for n in own if n.endswith("fusion.adapter.down.weight")]
    assert torch.equal(own[stacked][1], trained[down])
    compiled.save(tmp_path / "fused")
    assert gap(tmp_path / "fused", surgeon.load(tmp_path / "fused")) < 1e-5
    with pytest.raises(DeltaError, match="trained on another base"):
        surgeon.compile({"base": {"model": str(base_folder)}, **fused})


def test_a_killed_run_is_gone_on_from_and_ends_with_the_same_bytes(
    build: Path, moved: Path, files: dict[str, Files], tmp_path: Path
) -> None:
    def interrupt(now: Any) -> None:
        if now.step == now.steps - 1:
            raise KeyboardInterrupt

    out = tmp_path / "moved"
    with pytest.raises(KeyboardInterrupt):
        train_build(build, files, train_base=out, options=OPTIONS, progress=interrupt)
    assert not out.exists()
    assert [path.name for path in (build / CHECKPOINTS).iterdir()] == ["mood+size"]
    result = train_build(build, files, train_base=out, options=OPTIONS)
    assert result.resumed_from
    assert not (build / CHECKPOINTS).exists()
    names = {str(path.relative_to(moved)) for path in moved.rglob("*") if path.is_file()}
    assert names == {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert [name for name in sorted(names) if (moved / name).read_bytes() != (out / name).read_bytes()] == []


def test_an_output_that_is_there_is_refused_before_the_training(
    build: Path, moved: Path, files: dict[str, Files]
) -> None:
    told: list[str] = []
    with pytest.raises(BuildError, match="not empty"):
        train_build(build, files, train_base=moved, options=OPTIONS, report=told.append)
    assert told == []


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_techniques_that_read_the_base_follow_it(kind: str, lab: Any, tmp_path: Path) -> None:
    """Magnitudes of DoRA, biases of one role of a fused projection: they start from the base, and it moves."""
    model = lab.apart(lab.base(kind, **{"n_layer" if kind == "gpt2" else "num_hidden_layers": 1}))
    surgery = [{"lora": {"rank": 2, "dora": True}}, ADAPTER, {"bitfit": {"where": "attention.query"}}]
    compiled = surgeon.compile({"surgery": surgery, "tasks": {"a": {}, "b": {}}}, base=model)
    trained = lab.move(compiled.model("a"), 0.05, 1).eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trained.base_parameters().values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    compiled.renew(["a"])
    assert compiled.tasks == ("a",)
    fed = lab.feed(model, 3, 9, pad=2)
    assert lab.served(compiled, tmp_path, [fed]) < 1e-5
    with torch.no_grad():
        wanted = trained(**fed).logits
        for same in (compiled, surgeon.load(tmp_path / "build")):
            assert lab.gap(same.model("a").eval()(**fed).logits, wanted) < 1e-6


def test_the_command_trains_several_tasks_and_a_base(
    build: Path, files: dict[str, Files], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mood, size = str(files["mood"].data), str(files["size"].data)
    given = ["train", str(build), "-t", "mood", "--data", mood, "-t", "size", "--data", size, "--epochs", "1"]
    out = str(tmp_path / "out")
    assert main([*given, "--validation", mood, "--validation", size, "--train-base", out, "--sampling", "0.5"]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("mood", "size", f"packed 'mood', 'size' into {out}", f"{out}/base"))
    for extra, words in {
        (): "",
        ("--data", mood): "--data is given 3 times, and there are 2 tasks",
        ("--validation", mood): "--validation is given 1 times",
        ("--base-learning-rate", "1e-4"): "--base-learning-rate is for --train-base OUT",
        ("-t", "mood"): "--task names mood twice",
        ("--sampling", "2"): "--sampling: ",
        ("--train-base", out): "not empty",
    }.items():
        if extra:
            assert main([*given, *extra]) in (1, 2)
            assert words in capsys.readouterr().err
