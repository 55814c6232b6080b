"""DoRA where PEFT has no such function: beside BitFit, on a role of a fused projection, and as it is deployed."""

from __future__ import annotations

import torch


def test_dora_leaves_a_trained_bias_alone(lab):
    """The paper's magnitude scales a weight: BitFit's bias is added behind it, whichever comes first in the spec."""
    model = lab.base("bert")
    steps = [{"lora": {"rank": 4, "alpha": 6, "dora": True}}, {"bitfit": {"where": "attention.query"}}]
    fed = lab.feed(model, 3, 9, pad=2)
    answers = []
    for surgery in (steps, steps[::-1]):
        ours = lab.operate(model, *surgery).model("a").eval()
        with torch.no_grad():
            noise = torch.Generator().manual_seed(2)
            for name in sorted(ours.state_dict()):
                ours.get_parameter(name).add_(0.2 * torch.randn(ours.get_parameter(name).shape, generator=noise))
        answers.append(ours(**fed).logits)
    weights, theirs = ours.state_dict(), lab.apart(model)
    with torch.no_grad():
        for i, layer in enumerate(theirs.bert.encoder.layer):
            for side in ("query", "value"):
                path, linear = f"bert.encoder.layer.{i}.attention.self.{side}", getattr(layer.attention.self, side)
                v = linear.weight + 1.5 * (weights[f"{path}.lora_A"] @ weights[f"{path}.lora_B"]).T
                linear.weight.copy_(v * (weights[f"{path}.lora_magnitude"] / v.norm(dim=1))[:, None])
                if side == "query":
                    linear.bias.copy_(weights[f"{path}.bitfit.bias"])
    wanted = theirs(**fed).logits
    assert max(lab.gap(answer, wanted) for answer in answers) <= 2e-6


def test_dora_on_a_role_of_a_fused_projection_scales_that_role_alone(lab):
    model = lab.base("gpt2")
    where = ["attention.query", "attention.value"]
    surgery = [{"bitfit": {"where": where}}, {"lora": {"rank": 3, "alpha": 6, "dora": True, "where": where}}]
    ours = lab.move(lab.operate(model, *surgery).model("a").eval())
    weights, theirs = ours.state_dict(), lab.apart(model)
    with torch.no_grad():
        for i, block in enumerate(theirs.transformer.h):
            for side, start in (("query", 0), ("value", 64)):
                path, fused = f"transformer.h.{i}.attn.c_attn.{side}", block.attn.c_attn
                own = slice(start, start + 32)
                v = fused.weight[:, own] + 2 * weights[f"{path}.lora_A"] @ weights[f"{path}.lora_B"]
                fused.weight[:, own] = v * weights[f"{path}.lora_magnitude"] / v.norm(dim=0)
                fused.bias[own] = weights[f"{path}.bitfit.bias"]
    fed = lab.feed(model, 3, 9, pad=2)
    assert lab.gap(model(**fed).logits, theirs(**fed).logits) > 1e-2
    assert lab.gap(ours(**fed).logits, theirs(**fed).logits) <= 2e-6


def test_dora_deploys_vectors_and_a_product_only(lab):
    ours = lab.operate(lab.base("llama"), {"lora": {"rank": 3, "dora": True, "where": "ffn"}}).model("a")
    shapes = {n.rpartition(".")[2]: tuple(t.shape) for n, t in ours.deployed().items() if "up_proj" in n}
    assert shapes == {"lora_A": (32, 3), "lora_B": (3, 64), "lora_gain": (64,)}
