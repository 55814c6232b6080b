"""P-Tuning v2: a base's own cache, filled with the deep prompts, under a head of the task's own."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import surgeon
from surgeon.errors import CompositionError, SpecError

N = 5
DEEP = {"p_tuning_v2": {"length": N, "std": 1.0, "dropout": 0.0}}
KINDS = ("sequence-classification", "token-classification", "question-answering")


def operate(lab, head, *surgery):
    """A base with that head, deep prompts in it, and a head for the task."""
    model = lab.base("bert", head)
    if head == "question-answering":
        return model, lab.operate(model, *surgery, {"head": {}}).model("a")
    return model, lab.operate(model, *surgery, tasks={"a": {"labels": 4}}).model("a")


def by_cache(model, head, tensors, fed):
    """The base called with its own cache, then the task's head in as many words."""
    deep = [t.expand(len(fed["input_ids"]), -1, -1, -1) for name, t in tensors.items() if ".p_tuning_v2." in name]
    mask = torch.cat([torch.ones(len(fed["input_ids"]), N, dtype=torch.int64), fed["attention_mask"]], 1)
    cache = DynamicCache(list(zip(deep[::2], deep[1::2], strict=True)))
    hidden = model.bert(input_ids=fed["input_ids"], attention_mask=mask, cache=cache)
    weight, bias = (
        next(t for name, t in tensors.items() if name.endswith(f"head.{part}")) for part in ("weight", "bias")
    )
    pooled = hidden.pooler_output if head == "sequence-classification" else hidden.last_hidden_state
    return pooled @ weight + bias


def targets(head):
    match head:
        case "sequence-classification":
            return {"labels": torch.tensor([1, 3, 0])}
        case "token-classification":
            return {"labels": torch.randint(0, 4, (3, 9), generator=torch.Generator().manual_seed(0))}
        case _:
            return {"start_positions": torch.tensor([1, 2, 0]), "end_positions": torch.tensor([3, 4, 2])}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("head", KINDS)
def test_classes_of_texts_and_tokens_and_spans_are_those_of_the_bases_cache(head, side, lab):
    model, ours = operate(lab, head, DEEP)
    fed = lab.feed(model, 3, 9, pad=3, side=side)
    wanted = by_cache(model, head, lab.own(ours), fed)
    found = ours(**fed)
    logits = torch.stack([found.start_logits, found.end_logits], -1) if "question" in head else found.logits
    assert lab.gap(logits, wanted) <= 1e-6


@pytest.mark.parametrize("head", KINDS)
def test_every_head_and_prompt_learns_as_by_the_cache(head, lab):
    model, ours = operate(lab, head, DEEP)
    fed = lab.feed(model, 3, 9)
    ours(**fed, **targets(head)).loss.backward()
    grads = {name: tensor.grad.clone() for name, tensor in lab.own(ours).items()}
    ours.zero_grad()
    logits, labels = by_cache(model, head, lab.own(ours), fed), targets(head)
    entropy = torch.nn.functional.cross_entropy
    if head == "question-answering":
        spans = zip(logits.unbind(-1), labels.values(), strict=True)
        loss = sum(entropy(at, position) for at, position in spans) / 2
    else:
        loss = entropy(logits.flatten(0, -2), labels["labels"].flatten())
    loss.backward()
    assert lab.gap(grads, {name: tensor.grad for name, tensor in lab.own(ours).items()}) <= 1e-6


def test_the_reparametrisation_is_two_layers_with_a_tanh(lab):
    model = lab.base("bert")
    ours = lab.operate(model, {"p_tuning_v2": {"length": N, "hidden": 7}}).model("a")
    t = {name.rpartition("p_tuning_v2.")[2]: tensor for name, tensor in ours.state_dict().items()}
    rows = torch.tanh(t["embedding"] @ t["down.weight"] + t["down.bias"]) @ t["up.weight"] + t["up.bias"]
    viewed = rows.view(N, 4, 4, 8).permute(1, 2, 0, 3)  # as the authors': 2·layers, heads, n, head dim
    assert lab.gap(torch.stack(list(ours.deployed().values())), viewed) <= 1e-6


SLOW = [pytest.param(kind, marks=pytest.mark.sweep) for kind in ("llama", "gpt2", "t5")]


@pytest.mark.parametrize("kind", ["bert", *SLOW])
def test_with_lora_and_bitfit_every_length_runs_in_onnx_runtime(kind, lab, tmp_path):
    model = lab.base(kind)
    others = [{"lora": {"rank": 2}}, *([] if kind in ("llama", "t5") else [{"bitfit": {"where": "ffn"}}])]
    labels = ({"labels": 3}, {"labels": 5}) if kind == "bert" else ({}, {})
    compiled = lab.operate(model, *others, {"p_tuning_v2": {"length": N}}, tasks=dict(zip("ab", labels, strict=True)))
    lab.resize(compiled.model("b"), length=9)
    lab.move(compiled.model("a"))
    feeds = [lab.feed(model, *sizes, pad=pad) for *sizes, pad in ((3, 11, 4), (1, 5, 0))]
    assert lab.served(compiled, tmp_path, feeds) <= 1e-4


@pytest.mark.parametrize("head", KINDS[1:])
def test_classes_of_tokens_and_spans_run_in_onnx_runtime(head, lab, tmp_path):
    model = lab.base("bert", head)
    spans = head == "question-answering"
    tasks = {"a": {}, "b": {}} if spans else {"a": {"labels": 3}, "b": {"labels": ["in", "out"]}}
    compiled = lab.operate(model, DEEP, *([{"head": {}}] if spans else []), tasks=tasks)
    lab.resize(compiled.model("b"), length=2)
    assert lab.served(compiled, tmp_path, [lab.feed(model, 3, 11, pad=4), lab.feed(model, 1, 6)]) <= 1e-4


@pytest.mark.sweep  # `surgeon count` has the number, from two layers, in every run
def test_the_count_is_that_of_the_authors_code():
    """n·d + 512·d + 512 + 513·2·L·d: 9,860,105 with a head of 9 labels; plain it is 2·n·L·d."""
    options = {"length": 5, "hidden": 512}
    spec = {"base": {"config": {"model_type": "bert"}}, "surgery": [{"p_tuning_v2": options}], "tasks": {"a": {}}}
    plan = surgeon.compile(spec, weights=False).plan
    assert plan.parameters + 769 * 9 == 9_860_105
    assert plan.bytes == 4 * 2 * 5 * 12 * 768


def test_labels_of_spans_and_a_second_prefix_are_errors(lab):
    spans = lab.base("bert", "question-answering")
    with pytest.raises(SpecError, match="task 'a' has labels, and what the base's head answers are no classes"):
        lab.operate(spans, DEEP, tasks={"a": {"labels": 3}})
    with pytest.raises(SpecError, match="a span is a start and an end, not classes"):
        lab.operate(spans, {"head": {"labels": 3}})
    with pytest.raises(CompositionError, match="'prefix' and 'p_tuning_v2' would both put a prefix"):
        lab.operate(lab.base("bert"), DEEP, {"prefix": {"length": 3}})
