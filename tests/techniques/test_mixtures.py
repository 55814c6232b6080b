"""What a fusion attends to, read out, drawn, and pruned by it."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

import surgeon
from surgeon.cli import main
from surgeon.compiler import Compiled
from surgeon.errors import SurgeonError
from surgeon.picture.heat import heat
from surgeon.train import build_mixtures, load_tokenizer, mixtures, prune

TEXTS = ["good film", "the great film was fine", "dull", "a bad film was a poor film"]


@pytest.fixture(scope="module")
def compiled(base_folder: Path) -> Compiled:
    """A classifier of three fused adapters, off its birth values."""
    spec = {"base": {"model": str(base_folder)}, "surgery": [{"fusion": {"of": 3, "bottleneck": 4}}]}
    made = surgeon.compile(spec | {"tasks": {"a": {"labels": 2}}})
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name in made.model("a").state_dict():
            if not name.endswith("index"):
                parameter = made.model("a").get_parameter(name)
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=noise))
    return made


@pytest.fixture
def build(compiled: Compiled, tmp_path: Path) -> Path:
    return compiled.save(tmp_path / "build")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    with (tmp_path / "texts.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text"], *([text] for text in TEXTS)])
    return tmp_path / "texts.csv"


def test_mean_weights_are_those_of_the_papers_equation_without_padding(compiled: Compiled, base_folder: Path) -> None:
    model, tokenizer = compiled.model("a").eval(), load_tokenizer(base_folder)
    (found,) = mixtures(model, tokenizer, TEXTS, batch_size=3)
    assert list(found.weights) == ["adapter 0", "adapter 1", "adapter 2"]
    assert sum(found.weights.values()) == pytest.approx(1)
    site = "bert.encoder.layer.0.output.dense.fusion"
    own = {n.removeprefix(f"{site}."): t for n, t in model.state_dict().items()}
    seen = []
    layer = compiled.base.model.bert.encoder.layer[0]
    kept = layer.output.register_forward_hook(lambda _m, _i, out: seen.append(out))
    for text in TEXTS:
        with torch.no_grad():
            compiled.base.model(**tokenizer(text, return_tensors="pt"))
    kept.remove()
    sums, count = torch.zeros(3), 0
    for u in seen:  # the base's layer gives LN(h + x), which is what the first fusion reads
        q = u @ own["query.weight"] + own["query.bias"]
        z = [
            torch.relu(u @ own["adapter.down.weight"][n] + own["adapter.down.bias"][n]) @ own["adapter.up.weight"][n]
            + own["adapter.up.bias"][n]
            for n in range(3)
        ]
        scores = torch.stack([(q * (one @ own["key.weight"] + own["key.bias"])).sum(-1) for one in z], -1)
        sums += torch.softmax(scores, -1).sum((0, 1))
        count += u.shape[1]
    assert torch.allclose(torch.tensor(list(found.weights.values())), sums / count, atol=1e-5)


def test_pruning_keeps_the_heaviest_and_is_softmax_over_those_left(compiled: Compiled, base_folder: Path) -> None:
    model, tokenizer = compiled.model("a").eval(), load_tokenizer(base_folder)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    found = mixtures(model, tokenizer, TEXTS)
    ranked = sorted(found[0].weights, key=lambda name: -found[0].weights[name])
    ids = {"input_ids": torch.tensor([[2, 4, 5, 3]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    ((_, whole),) = model.look(**ids)
    prune(model, found, 2)
    (smaller,) = mixtures(model, tokenizer, TEXTS)
    assert set(smaller.weights) == set(ranked[:2])
    left = [int(name.split()[1]) for name in smaller.weights]
    ((_, after),) = model.look(**ids)
    assert torch.allclose(after, whole[..., left] / whole[..., left].sum(-1, keepdim=True), atol=1e-6)
    with pytest.raises(SurgeonError, match="2 adapters of 2 cannot be kept"):
        prune(model, (smaller,), 2)
    with pytest.raises(SurgeonError, match="0 adapters of 2"):
        prune(model, (smaller,), 0)
    model.load_state_dict(before)


def test_layers_may_keep_different_adapters_and_run_on_one_graph(lab, tmp_path: Path) -> None:
    model = lab.base("bert", num_hidden_layers=3)
    compiled = lab.operate(model, {"fusion": {"of": 4, "bottleneck": 5}}, {"lora": {"rank": 2}})
    ours = compiled.model("a").eval()
    index = {n: t.clone() for n, t in ours.state_dict().items() if n.endswith("index")}
    lab.move(ours).load_state_dict({**ours.state_dict(), **index})
    session = surgeon.Session(compiled.save(tmp_path / "build"), threads=1)
    whole = {n: t.clone() for n, t in ours.state_dict().items()}
    kept = [[0, 3], [1], [0, 1, 2, 3]]
    tensors = dict(whole)
    for layer, entries in enumerate(kept):
        for name in whole:
            for axis, symbol in compiled.program.ledger.free(name).items():
                if f"layer.{layer}." in name and symbol.endswith("adapters"):
                    tensors[name] = tensors[name].index_select(axis, torch.tensor(entries))
    ours.load_state_dict(tensors)
    compiled.pack(tmp_path / "build", "a")
    path = tmp_path / "build" / surgeon.runtime.read_manifest(tmp_path / "build").tasks["a"].adapter
    session.add_task(path, "pruned")
    fed = lab.feed(model, 3, 9, pad=2)
    arrays = {n: t.numpy() for n, t in fed.items()}
    for _ in range(2):
        with torch.no_grad():
            assert lab.gap(torch.from_numpy(session.run(arrays, "pruned")["logits"]), ours(**fed).logits) <= 1e-4
        assert not np.allclose(session.run(arrays, "a")["logits"], session.run(arrays, "pruned")["logits"])
    assert [ours.get_parameter(n).tolist() for n in index] == kept


def test_the_command_shows_draws_and_packs(
    build: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = next((build / "tasks").glob("a.*.onnx_adapter")).stat().st_size
    picture = tmp_path / "heat.svg"
    assert main(["fusion", str(build), "-t", "a", "--data", str(data), "-o", str(picture), "--json"]) == 0
    (site,) = json.loads(capsys.readouterr().out)["sites"]
    assert site["layer"] == 0
    root = ElementTree.fromstring(picture.read_text(encoding="utf-8"))
    shown = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {*site["weights"], *(f"{share:.2f}" for share in site["weights"].values())} <= shown
    assert main(["fusion", str(build), "-t", "a", "--data", str(data), "--keep", "1"]) == 0
    heaviest = max(site["weights"], key=site["weights"].get)
    assert heaviest in capsys.readouterr().out
    assert next((build / "tasks").glob("a.*.onnx_adapter")).stat().st_size < size
    (left,) = build_mixtures(build, "a", data)
    assert dict(left.weights) == {heaviest: pytest.approx(1)}


def test_a_task_that_fuses_nothing_and_one_that_there_is_not_are_refused(
    build: Path, data: Path, base_folder: Path
) -> None:
    with pytest.raises(SurgeonError, match="no task 'b'"):
        build_mixtures(build, "b", data)
    plain = surgeon.compile({"base": {"model": str(base_folder)}, "tasks": {"a": {"labels": 2}}}).model("a")
    with pytest.raises(SurgeonError, match="fuses no adapters"):
        mixtures(plain, load_tokenizer(base_folder), TEXTS)


def test_a_heat_map_escapes_names_and_leaves_absent_cells_empty() -> None:
    drawn = heat("a < b", [("0", {"x & y": 0.25, "z": 0.75}), ("1", {"z": 1.0})])
    root = ElementTree.fromstring(drawn)
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts.count("0.25") == texts.count("0.75") == texts.count("1.00") == 1
    assert "x & y" in texts
