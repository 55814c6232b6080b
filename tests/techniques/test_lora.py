"""LoRA is PEFT's LoRA, number for number, wherever PEFT has the same function."""

from __future__ import annotations

import warnings

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft import LoraConfig, get_peft_model

QV = ["attention.query", "attention.value"]
T5_QV = [*QV, "cross_attention.query", "cross_attention.value"]
# base, our `where`, PEFT's targets
PEERS = {
    "post_norm": ("bert", QV, ["query", "value"]),
    "pre_norm": ("llama", QV, ["q_proj", "v_proj"]),
    "every_linear": (
        "llama",
        ["attention", "ffn"],
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    ),
    "weights_in_first": ("gpt2", ["attention.output", "ffn"], ["c_proj", "c_fc"]),
    "encoder_decoder": ("t5", T5_QV, ["q", "v"]),
    "shared_layer": ("albert", QV, ["query", "value"]),
}


def peer(model, targets, seed=3, **options):
    """PEFT's LoRA on a copy, off its birth values; base parameters are frozen by PEFT."""
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)  # PEFT draws from the global generator, whose state depends on which tests ran before
        wrapped = get_peft_model(model, LoraConfig(target_modules=targets, **options)).eval()
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=noise))
    return wrapped


def by_our_names(wrapped, read=lambda p: p.detach()):
    """PEFT's tensors under our names, turned the way we multiply."""
    named = wrapped.named_parameters()
    found = {n: read(p) for n, p in named if ".lora_A." in n or ".lora_B." in n}
    return {n.removeprefix("base_model.model.").replace(".default.weight", ""): t.T for n, t in found.items()}


@pytest.fixture
def pair(lab):
    """Ours and PEFT's with the same weights."""

    def make(kind, where, targets, ours=None, **theirs):
        model = lab.base(kind)
        wrapped = peer(lab.apart(model), targets, **{"r": 4, "lora_alpha": 6, **theirs})
        ours = lab.operate(model, {"lora": {"rank": 4, "alpha": 6, "where": where, **(ours or {})}}).model("a")
        ours.load_state_dict(by_our_names(wrapped))
        return ours.eval(), wrapped

    return make


def both_answer(ours, theirs, fed):
    """Outputs and gradients by name of ours, then of PEFT's."""
    for model in (ours, theirs):
        model.zero_grad()
    found, wanted = ours(**fed), theirs(**fed)
    found.loss.backward()
    wanted.loss.backward()
    grads = by_our_names(theirs, lambda p: p.grad)
    return (found, {n: ours.get_parameter(n).grad for n in grads}), (wanted, grads)


@pytest.mark.parametrize("anatomy", PEERS)
def test_lora_equals_peft_with_copied_weights(anatomy, pair, lab):
    kind, where, targets = PEERS[anatomy]
    model = lab.base(kind)
    ours, theirs = pair(kind, where, targets)
    for training in (False, True):
        fed = lab.batch(model)
        (found, grads), (wanted, peft_grads) = both_answer(ours.train(training), theirs.train(training), fed)
        assert lab.gap(model(**fed).logits, wanted.logits) > 1e-3
        assert lab.gap(found.logits, wanted.logits) <= 1e-6
        assert lab.gap(grads, peft_grads) <= 2e-6  # rounding: in double precision, below, it is 1e-11


@pytest.mark.parametrize("anatomy", ["post_norm", "pre_norm", "weights_in_first", "encoder_decoder"])
def test_twenty_steps_of_training_end_where_pefts_do(anatomy, pair, lab):
    kind, where, targets = PEERS[anatomy]
    ours, theirs = pair(kind, where, targets)
    start = by_our_names(theirs, lambda p: p.detach().clone())
    for model in (ours, theirs):
        lab.train(model, lab.base(kind), [p for p in model.parameters() if p.requires_grad])
    assert lab.gap(start, by_our_names(theirs)) > 1e-2
    assert lab.gap(ours.state_dict(), by_our_names(theirs)) <= 1e-5


@pytest.mark.parametrize("anatomy", ["post_norm", "weights_in_first"])
def test_in_double_precision_nothing_is_left_of_the_difference(anatomy, lab):
    """So what single precision shows is rounding. (RMS norms of transformers compute in single precision always.)"""
    kind, where, targets = PEERS[anatomy]
    model = lab.apart(lab.base(kind)).double()
    theirs = peer(lab.apart(model), targets, r=4, lora_alpha=6)
    ours = lab.operate(model, {"lora": {"rank": 4, "alpha": 6, "where": where}}).model("a")
    ours.load_state_dict(by_our_names(theirs))
    (found, grads), (wanted, peft_grads) = both_answer(ours, theirs, lab.batch(model))
    assert lab.gap(found.logits, wanted.logits) <= 1e-13
    for name, grad in peft_grads.items():
        assert lab.gap(grads[name], grad) <= 1e-11


def test_rank_stabilised_scale_is_pefts(pair, lab):
    ours, theirs = pair("bert", QV, ["query", "value"], {"rslora": True}, use_rslora=True)
    fed = lab.feed(lab.base("bert"), 2, 7)
    assert lab.gap(ours(**fed).logits, theirs(**fed).logits) <= 1e-6


def test_ranks_of_single_layers_are_pefts_rank_pattern(pair, lab):
    pattern = {"layer.1.attention.self.query": 2, "layer.0.attention.self.value": 1}
    ranks = {"attention.query@1": 2, "attention.value@0": 1}
    ours, theirs = pair("bert", QV, ["query", "value"], {"ranks": ranks}, rank_pattern=pattern)
    assert ours.get_parameter("bert.encoder.layer.1.attention.self.query.lora_A").shape == (32, 2)
    fed = lab.feed(lab.base("bert"), 2, 7)
    assert lab.gap(ours(**fed).logits, theirs(**fed).logits) <= 1e-6


def test_dropout_is_on_the_input_of_the_product_alone(pair, lab):
    """The base has none here, so with the same seed both draw the same masks, in the same order."""
    ours, theirs = pair("llama", QV, ["q_proj", "v_proj"], {"dropout": 0.5}, lora_dropout=0.5)
    fed = lab.feed(lab.base("llama"), 2, 7)
    answers = []
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(11)
        answers.append(model(**fed).logits)
    assert lab.gap(*answers) <= 1e-6
    assert lab.gap(ours.eval()(**fed).logits, answers[0]) > 1e-2


def beside(linear, width, products):
    """Add `s · x·A·B` to the given columns of a projection's output."""

    def added(_module, inputs, output):
        extra = torch.zeros(*output.shape[:-1], width)
        for start, a, b, scale in products:
            extra[..., start : start + b.shape[1]] = inputs[0] @ a @ (b * scale)
        return output + extra

    linear.register_forward_hook(added)


@pytest.mark.parametrize("sides", [("query",), ("query", "key", "value")])
def test_each_role_of_a_fused_projection_gets_a_product_of_its_own(sides, lab):
    """As in the authors' `MergedLinear`. PEFT gives the fused projection one A and adapts all of it."""
    model = lab.base("gpt2")
    where = [f"attention.{side}" for side in sides]
    ours = lab.operate(model, {"lora": {"rank": 3, "alpha": 5, "where": where}}).model("a")
    lab.move(ours)
    weights, theirs = ours.state_dict(), lab.apart(model)
    for i, block in enumerate(theirs.transformer.h):
        own = {side: [weights[f"transformer.h.{i}.attn.c_attn.{side}.lora_{x}"] for x in "AB"] for side in sides}
        beside(block.attn.c_attn, 96, [(32 * column, a, b, 5 / 3) for column, (a, b) in enumerate(own.values())])
    assert {tuple(t.shape) for t in weights.values()} == {(32, 3), (3, 32)}
    fed = lab.feed(model, 3, 9, pad=2)
    assert lab.gap(model(**fed).logits, theirs(**fed).logits) > 1e-2
    assert lab.gap(ours(**fed).logits, theirs(**fed).logits) <= 1e-6
