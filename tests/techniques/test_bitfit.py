"""BitFit: training our bias deltas is training the base's own biases."""

from __future__ import annotations

import pytest
import torch

from surgeon.errors import SelectorError

CLASSIFIER = ("classifier.", "score.", "lm_head.")


def chosen_biases(model, wanted):
    """Freeze all of an oracle but the 1-D biases whose name `wanted` accepts."""
    own = {}
    for name, parameter in model.named_parameters():
        is_bias = name.rpartition(".")[2] == "bias" and parameter.dim() == 1
        parameter.requires_grad_(is_bias and not name.startswith(CLASSIFIER) and wanted(name))
        if parameter.requires_grad:
            own[name] = parameter
    return own


def ours_by_base_name(model):
    """Our deltas under the base's names: `x.bitfit.bias` stands for `x.bias`."""
    return {name.replace(".bitfit.bias", ".bias"): model.get_parameter(name) for name in model.state_dict()}


CASES = {
    "post_norm": ("bert", None, lambda name: True),
    "fused_qkv": ("gpt2", None, lambda name: True),
    "encoder_decoder": ("bart", None, lambda name: True),
    "shared_layers": ("albert", None, lambda name: True),
    "queries_and_intermediate": (
        "bert",
        ["attention.query", "ffn.up"],
        lambda name: name.endswith(("query.bias", "intermediate.dense.bias")),
    ),
    "norms": ("bert", ["norm"], lambda name: "LayerNorm" in name),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_and_twenty_steps_are_those_of_the_bases_biases(
    case, base, operate, apart, feed, labels_for, gap, train
):
    kind, where, wanted = CASES[case]
    model = base(kind)
    ours = operate(model, {"bitfit": {"where": where} if where else {}}).model("a").train()
    theirs = apart(model).train()
    biases = chosen_biases(theirs, wanted)
    mine = ours_by_base_name(ours)
    assert mine.keys() == biases.keys()

    def batch(step):
        fed = feed(model, 3, 9, pad=2, seed=step)
        return {**fed, "labels": labels_for(model, fed)}

    ours(**batch(0)).loss.backward()
    theirs(**batch(0)).loss.backward()
    assert gap({n: p.grad for n, p in mine.items()}, {n: p.grad for n, p in biases.items()}) <= 1e-6
    before = {n: p.detach().clone() for n, p in biases.items()}
    train(ours, batch, mine.values(), 20)
    train(theirs, batch, biases.values(), 20)
    print(case, gap(mine, biases), gap(before, biases))
    assert gap(before, biases) > 1e-2
    assert gap(mine, biases) <= 1e-5


def test_the_query_bias_of_a_fused_projection_is_trained_alone(base, operate, apart, feed, labels_for, gap, train):
    """The oracle trains the whole bias with the gradient of the other two thirds cut: AdamW is element by element."""
    model = base("gpt2")
    ours = operate(model, {"bitfit": {"where": "attention.query"}}).model("a").train()
    theirs = apart(model).train()
    biases = chosen_biases(theirs, lambda name: "c_attn" in name)
    for bias in biases.values():
        bias.register_hook(lambda grad: torch.cat([grad[:32], torch.zeros(64)]))
    assert {tuple(t.shape) for t in ours.state_dict().values()} == {(32,)}

    def batch(step):
        fed = feed(model, 3, 9, pad=2, seed=step)
        return {**fed, "labels": labels_for(model, fed)}

    train(ours, batch, [p for p in ours.parameters() if p.requires_grad], 20)
    train(theirs, batch, biases.values(), 20)
    for i in range(2):
        mine = ours.get_parameter(f"transformer.h.{i}.attn.c_attn.query.bitfit.bias")
        assert gap(mine, biases[f"transformer.h.{i}.attn.c_attn.bias"][:32]) <= 1e-5
    assert gap(ours(**batch(0)).logits, theirs(**batch(0)).logits) <= 1e-5


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_base_without_biases_says_so_and_what_to_do(kind, base, operate):
    with pytest.raises(SelectorError, match="no biases at all") as caught:
        operate(base(kind), {"bitfit": {}})
    assert "lora or adapter" in str(caught.value)


def test_a_relative_position_table_named_bias_is_no_bias(base):
    """T5's `relative_attention_bias.weight` has the word in its name, which would do for a careless match."""
    assert any("relative_attention_bias" in name for name, _ in base("t5").named_parameters())
