"""Full fine-tuning is training the base itself, tied weights once, the classifier left to the head."""

from __future__ import annotations

import pytest
import torch

from surgeon.errors import CompositionError, SelectorError

KINDS = ["bert", "albert", "gpt2", "llama", "t5"]


def named(trained):
    """Our tensors by the base's own names."""
    return {name.replace(".full.", "."): tensor for name, tensor in trained.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_and_twenty_steps_are_those_of_the_base_itself(kind, lab):
    model = lab.base(kind)
    ours = lab.operate(model, {"full": {}}).model("a")
    theirs = lab.apart(model)
    head = {"bert": "classifier.", "albert": "classifier."}.get(kind, "no head")
    reference = {n: p for n, p in theirs.named_parameters() if not n.startswith(head)}
    mine = named(lab.own(ours))
    assert mine.keys() == reference.keys()
    assert all(torch.equal(mine[n], p) for n, p in reference.items())
    ours(**lab.batch(model)).loss.backward()
    theirs(**lab.batch(model)).loss.backward()
    assert lab.gap({n: p.grad for n, p in mine.items()}, {n: p.grad for n, p in reference.items()}) <= 1e-6
    lab.train(theirs, model, reference.values())
    lab.train(ours, model, mine.values())
    assert lab.gap(mine, reference) < 1e-5


def test_only_what_is_selected_is_trained(lab):
    ours = lab.operate(lab.base("bert"), {"full": {"where": ["ffn@1", "norm@1", "embedding.position"]}}).model("a")
    layer = "bert.encoder.layer.1"
    norms = (f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm")
    linears = (f"{layer}.intermediate.dense", f"{layer}.output.dense")
    wanted = {f"{site}.{part}" for site in (*norms, *linears) for part in ("weight", "bias")}
    assert named(ours.state_dict()).keys() == wanted | {"bert.embeddings.position_embeddings.weight"}


def test_a_fused_weight_is_selected_whole_or_refused(lab):
    ours = lab.operate(lab.base("gpt2"), {"full": {"where": "attention.*@0"}}).model("a")
    attention = "transformer.h.0.attn"
    assert named(ours.state_dict()).keys() == {
        f"{attention}.{m}.{p}" for m in ("c_attn", "c_proj") for p in ("weight", "bias")
    }
    with pytest.raises(SelectorError, match=r"c_attn\.weight is one tensor of several roles") as caught:
        lab.operate(lab.base("gpt2"), {"full": {"where": "attention.query"}})
    assert "left out: attention.key, attention.value" in str(caught.value)


def test_what_has_no_parameters_is_refused(lab):
    with pytest.raises(SelectorError, match="nothing that was selected has parameters"):
        lab.operate(lab.base("bert"), {"full": {"where": "residual.ffn"}})


def test_a_tensor_is_not_trained_by_two(lab):
    with pytest.raises(CompositionError, match="which 'full' trains already"):
        lab.operate(lab.base("bert"), {"full": {}}, {"bitfit": {}})


def test_a_task_in_onnx_runtime_is_the_trained_model_and_the_base_comes_back(lab, tmp_path):
    """With LoRA and a head of its own; two tasks, swapped back and forth."""
    model = lab.base("bert")
    tasks = {"a": {"labels": 2}, "b": {"labels": 4}}
    compiled = lab.operate(model, {"full": {}}, {"lora": {"rank": 3}}, {"head": {}}, tasks=tasks)
    for seed, task in enumerate(tasks):
        lab.move(compiled.model(task), 0.05, seed)
    feeds = [lab.feed(model, *sizes, pad=pad) for *sizes, pad in ((3, 11, 4), (1, 5, 0))]
    assert lab.served(compiled, tmp_path, feeds) <= 1e-4
