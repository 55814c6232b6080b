"""BitFit: training our bias deltas is training the base's own biases."""

from __future__ import annotations

import pytest
import torch

import surgeon
from surgeon.errors import CompositionError, SelectorError

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
    "output": (
        "bert",
        ["attention.output", "ffn.down"],
        lambda name: name.endswith("output.dense.bias"),
    ),
    "pooler": ("bert", ["head.dense"], lambda name: "pooler" in name),
    "decoder_alone": (
        "bart",
        ["decoder/attention", "decoder/ffn", "decoder/norm"],
        lambda name: ("decoder.layers" in name and "encoder_attn." not in name) or "decoder.layernorm_emb" in name,
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


def test_the_classifiers_own_bias_can_be_chosen_where_the_task_keeps_the_bases_head(lab):
    model = lab.base("bert")
    ours = lab.operate(model, {"bitfit": {"where": ["head.dense", "head.out"]}}).model("a")
    theirs = lab.apart(model)
    assert set(ours.state_dict()) == {"bert.pooler.dense.bitfit.bias", "classifier.bitfit.bias"}
    lab.train(ours, model, lab.own(ours).values())
    lab.train(theirs, model, [theirs.bert.pooler.dense.bias, theirs.classifier.bias])
    assert lab.gap(ours.get_parameter("classifier.bitfit.bias"), theirs.classifier.bias) <= 1e-5
    with pytest.raises(CompositionError, match="what 'bitfit' does at classifier has no effect any more"):
        lab.operate(model, {"bitfit": {"where": "head.out"}}, tasks={"a": {"labels": 3}})


def test_a_selector_without_a_bias_among_others_that_have_one_is_an_error(lab):
    model = lab.base("bert")
    with pytest.raises(SelectorError, match=r"'residual\.ffn' selects no site that has a bias"):
        lab.operate(model, {"bitfit": {"where": ["attention.query", "residual.ffn"]}})


def test_counts_of_a_bert_are_the_papers():
    """102,912 with the embeddings' norm and the pooler, 0.09 %; queries and intermediate 46,080, 0.04 %."""
    spec = {"base": {"config": {"model_type": "bert", "vocab_size": 28996}}, "surgery": [{"bitfit": {}}]}
    plan = surgeon.compile({**spec, "tasks": {"a": {}}}, weights=False).plan
    by_role = dict.fromkeys((row.role for row in plan.rows), 0)
    for row in plan.rows:
        by_role[row.role] += row.parameters
    assert plan.parameters == 102_912
    assert by_role["attention.query"] == by_role["attention.key"] == by_role["attention.value"] == 9_216
    assert by_role["attention.query"] + by_role["ffn.up"] == 46_080
    assert by_role["attention.output"] + by_role["ffn.down"] == 18_432
    assert by_role["head.dense"] == by_role["norm.embedding"] == 768
    assert by_role["norm.post"] == 18_432
    bert_base_cased = 108_310_272  # without the classifier
    assert round(100 * plan.parameters / bert_base_cased, 3) == 0.095
    assert round(100 * 46_080 / bert_base_cased, 4) == 0.0425
