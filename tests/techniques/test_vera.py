"""VeRA is PEFT's VeRA, random matrices included; a role of a fused projection has its own columns of them."""

from __future__ import annotations

import warnings

import pytest
import torch

import surgeon
from surgeon.errors import CompositionError, SpecError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft import VeraConfig, get_peft_model

T5_QV = ["attention.query", "attention.value", "cross_attention.query", "cross_attention.value"]
# base, our `where`, PEFT's targets
PEERS = {
    "post_norm": (
        "bert",
        ["attention.query", "ffn"],
        [r"query", r"intermediate.dense", "0.output.dense", "1.output.dense"],
    ),
    "pre_norm": ("llama", ["attention.query", "attention.value", "ffn.down"], ["q_proj", "v_proj", "down_proj"]),
    "weights_in_first": ("gpt2", ["attention.output", "ffn"], ["c_proj", "c_fc"]),
    "encoder_decoder": ("t5", T5_QV, ["q", "v"]),
    "shared_layer": ("albert", ["attention.query", "attention.value"], ["query", "value"]),
}


def by_our_names(wrapped, read=lambda p: p.detach()):
    """PEFT's vectors under our names."""
    named = wrapped.named_parameters()
    found = {n.removeprefix("base_model.model."): read(p) for n, p in named if ".vera_lambda_" in n}
    return {n.removesuffix(".default"): tensor for n, tensor in found.items()}


@pytest.fixture
def pair(lab):
    """Ours and PEFT's with the same vectors; the matrices are each one's own."""

    def make(kind, where, targets, ours=None, **theirs):
        model = lab.base(kind)
        config = VeraConfig(target_modules=targets, **{"r": 40, "projection_prng_key": 7, **theirs})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = get_peft_model(lab.apart(model), config).eval()
        noise = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=noise))
        options = {"rank": 40, "projection_key": 7, "where": where, **(ours or {})}
        mine = lab.operate(model, {"vera": options}).model("a")
        mine.load_state_dict(by_our_names(wrapped))
        return mine.eval(), wrapped

    return make


@pytest.mark.parametrize("anatomy", PEERS)
def test_vera_equals_peft_with_copied_vectors(anatomy, pair, lab):
    kind, where, targets = PEERS[anatomy]
    ours, theirs = pair(kind, where, targets)
    model, fed = lab.base(kind), lab.batch(lab.base(kind))
    found, wanted = ours(**fed), theirs(**fed)
    assert lab.gap(model(**fed).logits, wanted.logits) > 1e-2
    assert lab.gap(found.logits, wanted.logits) <= 1e-6
    for answer in (found, wanted):
        answer.loss.backward()
    grads = by_our_names(theirs, lambda p: p.grad)
    assert lab.gap({n: p.grad for n, p in lab.own(ours).items()}, grads) <= 3e-6


@pytest.mark.parametrize("anatomy", ["post_norm", "pre_norm", "weights_in_first", "encoder_decoder"])
def test_twenty_steps_of_training_end_where_pefts_do(anatomy, pair, lab):
    kind, where, targets = PEERS[anatomy]
    ours, theirs = pair(kind, where, targets)
    start = by_our_names(theirs, lambda p: p.detach().clone())
    for model in (ours, theirs):
        lab.train(model, lab.base(kind), [p for p in model.parameters() if p.requires_grad])
    assert lab.gap(start, by_our_names(theirs)) > 5e-3
    assert lab.gap(ours.state_dict(), by_our_names(theirs)) <= 1e-5


def test_the_matrices_are_pefts_to_the_last_bit(pair, lab):
    _, theirs = pair(*PEERS["pre_norm"])
    program = lab.operate(
        lab.base("llama"), {"vera": {"rank": 40, "projection_key": 7, "where": PEERS["pre_norm"][1]}}
    ).program
    a, b = program.constants.values()
    assert torch.equal(a.T, theirs.base_model.vera_A["default"])
    assert torch.equal(b.T, theirs.base_model.vera_B["default"])
    assert (tuple(a.shape), tuple(b.shape)) == ((64, 40), (40, 32))


def test_dropout_is_on_the_input_of_the_product_alone(pair, lab):
    ours, theirs = pair(*PEERS["pre_norm"], {"dropout": 0.5}, vera_dropout=0.5)
    answers = []
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(11)
        answers.append(model(**lab.feed(lab.base("llama"), 2, 7)).logits)
    assert lab.gap(*answers) <= 1e-6


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2", "t5"])
def test_a_fresh_task_is_the_base_and_all_of_it_learns(kind, lab):
    model = lab.base(kind)
    ours, fed = lab.operate(model, {"vera": {"rank": 64}}).model("a"), lab.batch(model)
    assert torch.equal(ours.eval()(**fed).logits, model(**fed).logits)
    lab.move(ours).train()(**fed).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in lab.own(ours).values())
    starts = lab.operate(model, {"vera": {"rank": 64, "d_initial": 0.25}}).model("a").state_dict()
    assert {float(v) for n, t in starts.items() for v in t} == {0.0, 0.25}


def test_each_role_of_a_fused_projection_has_vectors_of_its_own(lab):
    model = lab.base("gpt2")
    compiled = lab.operate(model, {"vera": {"rank": 12}})
    ours = lab.move(compiled.model("a").eval())
    weights, theirs = ours.state_dict(), lab.apart(model)
    a, b = compiled.program.constants.values()
    with torch.no_grad():
        for i, block in enumerate(theirs.transformer.h):
            for side, start in (("query", 0), ("value", 64)):
                d, out = (weights[f"transformer.h.{i}.attn.c_attn.{side}.vera_lambda_{x}"] for x in "db")
                block.attn.c_attn.weight[:, start : start + 32] += a * d @ b[:, start : start + 32] * out
    fed = lab.feed(model, 3, 9, pad=2)
    assert lab.gap(model(**fed).logits, theirs(**fed).logits) > 1e-2
    assert lab.gap(ours(**fed).logits, theirs(**fed).logits) <= 2e-6


def test_a_task_file_holds_vectors_only_and_the_base_the_matrices(lab, tmp_path):
    compiled = lab.operate(lab.base("bert"), {"vera": {"rank": 64}})
    build = compiled.save(tmp_path / "build")
    with surgeon.Session(build) as session:
        assert session.tasks["a"].parameters == 2 * 2 * (64 + 32)
    assert len(compiled.program.constants) == 2
    other = lab.operate(lab.base("bert"), {"vera": {"rank": 64, "projection_key": 1}}).program
    assert not torch.equal(*(next(iter(p.constants.values())) for p in (compiled.program, other)))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 0}, "vera.rank must be"),
        ({"projection_key": -1}, "vera.projection_key"),
        ({"d_initial": 0}, "vera.d_initial"),
        ({"dropout": 1.0}, "vera.dropout"),
        ({"where": "embedding.token"}, "selects no projection"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(options, said, lab):
    with pytest.raises(SpecError, match=said):
        lab.operate(lab.base("bert"), {"vera": options})


def test_the_same_projection_twice_is_refused(lab):
    with pytest.raises(CompositionError, match="'vera' makes a tensor that 'vera' before it has made"):
        lab.operate(lab.base("bert"), {"vera": {"rank": 8}}, {"vera": {"rank": 4, "where": "attention.query"}})
