"""How LoRA begins: as the base, with the starts of its papers, and with the rates of LoRA+."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.parametrize(
    "options",
    [
        {"dora": True, "where": ["attention", "ffn"]},
        {"start": "orthogonal"},
        {"start": "orthogonal", "dora": True},
        {"start": "gaussian", "bias": True},
        {"where": ["embedding.token", "attention.query"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2", "t5"])
def test_a_fresh_task_is_the_base_and_all_of_it_learns(kind, options, lab):
    model = lab.base(kind)
    compiled = lab.operate(model, {"lora": {"rank": 4, **options}})
    ours, fed = compiled.model("a"), lab.batch(model)
    assert lab.gap(ours.eval()(**fed).logits, model(**fed).logits) <= 1e-6
    lab.move(ours).train()(**fed).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in lab.own(ours).values())
    assert all(p.grad is None for n, p in ours.named_parameters() if n not in ours.state_dict())


def test_starts_are_what_they_say(lab):
    def fresh(start, rank=8):
        model = lab.operate(lab.base("bert"), {"lora": {"rank": rank, "start": start, "where": "attention"}}).model("a")
        tensors = model.state_dict()
        return [torch.stack([t for n, t in tensors.items() if n.endswith(f"lora_{x}")]) for x in "AB"]

    a, b = fresh("gaussian")
    assert a.std().item() == pytest.approx(1 / 8, rel=0.05)
    assert not b.any()
    a, b = fresh("orthogonal")
    assert not (a @ b).any()
    assert a[..., :4].std().item() == pytest.approx(0.1, rel=0.05)
    assert b[..., 4:, :].std().item() == pytest.approx(0.1, rel=0.05)
    assert not a[..., 4:].any()
    a, b = fresh("orthogonal", 1)
    assert a.any()
    assert not b.any()


def test_lora_plus_is_a_faster_learning_rate_of_b(lab):
    model = lab.operate(lab.base("bert"), {"lora": {"rank": 2, "plus": 16, "bias": True}}).model("a")
    slow, fast = sorted(model.parameter_groups(1e-3), key=lambda group: group["lr"])
    assert (slow["lr"], fast["lr"]) == (1e-3, 16e-3)
    assert {tuple(p.shape) for p in slow["params"]} == {(32, 2)}
    assert {tuple(p.shape) for p in fast["params"]} == {(2, 32), (32,)}
