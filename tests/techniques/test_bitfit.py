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
def test_gradients_and_twenty_steps_are_those_of_the_bases_biases(case, lab):
    kind, where, wanted = CASES[case]
    model = lab.base(kind)
    ours = lab.operate(model, {"bitfit": {"where": where} if where else {}}).model("a")
    theirs = lab.apart(model)
    biases = chosen_biases(theirs, wanted)
    mine = {name.replace(".bitfit.bias", ".bias"): tensor for name, tensor in lab.own(ours).items()}
    assert mine.keys() == biases.keys()
    ours(**lab.batch(model)).loss.backward()
    theirs(**lab.batch(model)).loss.backward()
    assert lab.gap({n: p.grad for n, p in mine.items()}, {n: p.grad for n, p in biases.items()}) <= 1e-6
    before = {n: p.detach().clone() for n, p in biases.items()}
    lab.train(ours, model, mine.values())
    lab.train(theirs, model, biases.values())
    assert lab.gap(before, biases) > 1e-2
    assert lab.gap(mine, biases) <= 1e-5


def test_the_query_bias_of_a_fused_projection_is_trained_alone(lab):
    """The oracle trains the whole bias with the gradient of the other two thirds cut: AdamW is element by element."""
    model = lab.base("gpt2")
    ours = lab.operate(model, {"bitfit": {"where": "attention.query"}}).model("a")
    theirs = lab.apart(model)
    biases = chosen_biases(theirs, lambda name: "c_attn" in name)
    for bias in biases.values():
        bias.register_hook(lambda grad: torch.cat([grad[:32], torch.zeros(64)]))
    lab.train(ours, model, lab.own(ours).values())
    lab.train(theirs, model, biases.values())
    queries = {name.replace("query.bitfit.", ""): tensor for name, tensor in lab.own(ours).items()}
    assert lab.gap(queries, {name: bias[:32] for name, bias in biases.items()}) <= 1e-5
    assert lab.gap(ours(**lab.batch(model)).logits, theirs(**lab.batch(model)).logits) <= 1e-5


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_base_without_biases_says_so_and_what_to_do(kind, lab):
    with pytest.raises(SelectorError, match="no biases at all") as caught:
        lab.operate(lab.base(kind), {"bitfit": {}})
    assert "lora or adapter" in str(caught.value)


def test_a_relative_position_table_named_bias_is_no_bias(lab):
    """T5's `relative_attention_bias.weight` has the word in its name, which would do for a careless match."""
    assert any("relative_attention_bias" in name for name, _ in lab.base("t5").named_parameters())
