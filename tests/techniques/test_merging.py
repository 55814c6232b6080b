"""A task merged into its base: a plain checkpoint that answers as the task does, or a refusal that says why."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from surgeon.errors import DeltaError
from surgeon.merging import merge, merge_task
from surgeon.runtime import Session

if TYPE_CHECKING:
    from techniques.conftest import Lab

LORA = {"lora": {"rank": 3, "where": ["attention.query", "attention.value", "ffn.down"]}}
LABELS = {"a": {"labels": ["bad", "fair", "good"]}}


def answer(model: torch.nn.Module, feed: Mapping[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(**feed).logits
    return logits


@pytest.mark.parametrize(
    ("kind", "surgery"),
    [
        ("bert", [LORA, {"bitfit": {}}, {"head": {}}]),
        ("bert", [{"lora": {"dora": True}}, {"ia3": {}}]),
        ("bert", [{"ia3": {}}, {"adalora": {"rank": 4, "target_rank": 2}}, {"norm_tuning": {}}]),
        ("bert", [{"vera": {"rank": 8}}, {"head": {"hidden": True}}]),
        ("bert", [{"lora": {"where": ["embedding.token"]}}, {"bitfit": {"where": ["attention.query"]}}]),
        ("albert", [LORA]),
        ("gpt2", [LORA, {"bitfit": {"where": ["attention.query"]}}]),
        ("gpt2", [{"lora": {"dora": True}}, {"ia3": {}}]),
        ("llama", [LORA, {"ia3": {}}]),
        ("t5", [LORA, {"norm_tuning": {}}]),
        ("bert", [{"full": {}}]),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(name for item in value for name in item),
)
def test_the_merged_base_answers_as_the_task_does(lab: Lab, kind: str, surgery: list[dict[str, Any]]) -> None:
    base = lab.base(kind)
    tasks = LABELS if any("head" in item for item in surgery) else {"a": {}}
    compiled = lab.operate(base, *surgery, tasks=tasks)
    model = lab.move(compiled.model("a"))
    merged = merge(compiled, "a")
    for batch, length in ((1, 7), (3, 5)):
        feed = lab.feed(base, batch, length, pad=2)
        wanted = answer(model, feed)
        assert lab.gap(answer(merged, feed), wanted) < 2e-6
        assert lab.gap(answer(base, {**feed}), wanted) > 1e-3 if "head" not in str(surgery) else True
    assert sum(p.numel() for p in merged.parameters()) == sum(p.numel() for p in base.parameters()) + (
        merged.num_labels - base.num_labels if tasks is LABELS else 0
    ) * (base.config.hidden_size + 1)


def test_the_folders_open_as_plain_models_that_know_their_labels(lab: Lab, tmp_path: Path) -> None:
    base = lab.base("bert", num_hidden_layers=1)
    compiled = lab.operate(base, LORA, {"head": {}}, tasks=LABELS)
    model = lab.move(compiled.model("a"))
    build = compiled.save(tmp_path / "build")
    feed = lab.feed(base, 2, 6)
    wanted = answer(model, feed)

    opened = AutoModelForSequenceClassification.from_pretrained(merge_task(build, "a", tmp_path / "checkpoint"))
    assert opened.config.id2label == {0: "bad", 1: "fair", 2: "good"}
    assert lab.gap(answer(opened, feed), wanted) < 2e-6

    with Session(merge_task(build, "a", tmp_path / "onnx", to="onnx")) as session:
        assert not session.manifest.deltas
        assert session.manifest.base.labels == ("bad", "fair", "good")
        found = session.run({name: tensor.numpy() for name, tensor in feed.items()})["logits"]
        assert lab.gap(torch.from_numpy(found), wanted) < 1e-5


def test_what_is_held_in_nf4_merges_as_the_numbers_it_stands_for(lab: Lab) -> None:
    base = lab.apart(lab.base("bert"))
    compiled = lab.operate(base, {"qlora": {"rank": 3}})
    model = lab.move(compiled.model("a"))
    feed = lab.feed(base, 2, 6)
    assert lab.gap(answer(merge(compiled, "a"), feed), answer(model, feed)) < 1e-5


def test_the_base_in_hand_stays_as_it_is(lab: Lab) -> None:
    base = lab.base("bert")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    compiled = lab.operate(base, LORA)
    lab.move(compiled.model("a"))
    merge(compiled, "a")
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "surgery", "says"),
    [
        ("bert", [{"adapter": {}}], "a base has no place for what adapter does"),
        ("bert", [LORA, {"prefix": {"length": 2}}], "a base has no place for what prefix does"),
        ("llama", [{"prompt": {"length": 2}}], "a base has no place for what prompt does"),
        ("llama", [{"lora": {"bias": True}}], "adds a bias, and the base has none there"),
    ],
    ids=["adapter", "prefix", "prompt", "bias"],
)
def test_what_no_base_can_hold_is_refused(lab: Lab, kind: str, surgery: list[dict[str, Any]], says: str) -> None:
    compiled = lab.operate(lab.base(kind), *surgery)
    lab.move(compiled.model("a"))
    with pytest.raises(DeltaError, match=says):
        merge(compiled, "a")


def test_a_tied_table_that_only_the_embedding_adapts_is_refused(lab: Lab) -> None:
    compiled = lab.operate(lab.base("gpt2", "causal-lm"), {"lora": {"where": ["embedding.token"]}})
    lab.move(compiled.model("a"))
    with pytest.raises(DeltaError, match="is read in several places of the base"):
        merge(compiled, "a")
