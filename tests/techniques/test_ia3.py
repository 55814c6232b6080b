"""IA3 is PEFT's IA3, and a slice of a fused projection is scaled alone."""

from __future__ import annotations

import warnings

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft import IA3Config, get_peft_model

TARGETS = {
    "bert": (r".*(key|value|layer\.\d+\.output\.dense)", r".*layer\.\d+\.output\.dense"),
    "llama": (r".*(k_proj|v_proj|down_proj)", r".*down_proj"),
    "t5": (r".*\.(k|v|wo)", r".*\.wo"),
}


@pytest.mark.parametrize("kind", list(TARGETS))
def test_ia3_equals_peft_with_copied_vectors(kind, lab):
    model = lab.base(kind)
    targets, inward = TARGETS[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = IA3Config(target_modules=targets, feedforward_modules=inward)
        theirs = get_peft_model(lab.apart(model), config).eval()
    noise = torch.Generator().manual_seed(3)
    vectors = {}
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "ia3_l" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=noise))
                vectors[name.removeprefix("base_model.model.").replace(".default", "")] = parameter.flatten()
    ours = lab.operate(model, {"ia3": {}}).model("a").eval()
    ours.load_state_dict(vectors)
    fed = lab.batch(model)
    found, wanted = ours(**fed), theirs(**fed)
    assert lab.gap(found.logits, wanted.logits) < 1e-6
    found.loss.backward()
    wanted.loss.backward()
    grads = {
        n.removeprefix("base_model.model.").replace(".default", ""): p.grad.flatten()
        for n, p in theirs.named_parameters()
        if "ia3_l" in n
    }
    assert lab.gap({n: p.grad for n, p in lab.own(ours).items()}, grads) < 1e-5


def test_the_values_of_a_fused_projection_are_scaled_alone(lab):
    model = lab.base("gpt2")
    ours = lab.operate(model, {"ia3": {"where": ["attention.value"]}}).model("a").eval()
    lab.move(ours)
    changed = lab.apart(model)
    width = model.config.n_embd
    with torch.no_grad():
        for index, block in enumerate(changed.transformer.h):
            scale = ours.get_parameter(f"transformer.h.{index}.attn.c_attn.value.ia3_l")
            block.attn.c_attn.weight[:, 2 * width :] *= scale
            block.attn.c_attn.bias[2 * width :] *= scale
    fed = lab.feed(model, 3, 9)
    assert lab.gap(ours(**fed).logits, changed(**fed).logits) < 1e-6
