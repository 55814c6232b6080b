"""AdapterFusion is the paper's equation, written again in plain torch with a loop over the adapters."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import relu

import surgeon

BLOCKS = {
    "bert": ("bert.encoder.layer.{}", "output.dense"),
    "gpt2": ("transformer.h.{}", "mlp.c_proj"),
    "llama": ("model.layers.{}", "mlp.down_proj"),
}
MORE = ({"lora": {"rank": 3}}, {"bitfit": {"where": "attention"}})


def fused(own, site):
    """Σ s_n (z_n V) with s = softmax((uQ + q)·(z_n K + k)): section 3.2, one adapter after the other."""
    t = {part: own[f"{site}.fusion.{part}"] for part in ("query.weight", "query.bias", "key.weight", "key.bias")}
    v = own[f"{site}.fusion.value.weight"]
    down, down_bias, up, up_bias = (
        own[f"{site}.fusion.adapter.{part}"] for part in ("down.weight", "down.bias", "up.weight", "up.bias")
    )

    def context(u):
        q = u @ t["query.weight"] + t["query.bias"]
        z = [relu(u @ down[n] + down_bias[n]) @ up[n] + up_bias[n] for n in range(len(down))]
        scores = torch.stack([(q * (one @ t["key.weight"] + t["key.bias"])).sum(-1) for one in z], -1)
        weights = torch.softmax(scores, -1)
        return sum(weights[..., n, None] * (one @ v) for n, one in enumerate(z))

    return context


def fuse(lab, theirs, own, kind):
    """Post-norm: LN(fusion(LN(h + x)) + h + x), one norm used twice. Pre-norm: join + fusion(join)."""
    block, leaf = BLOCKS[kind]
    for i in range(2):
        layer = theirs.get_submodule(block.format(i))
        lab.behind(layer, fused(own, f"{block.format(i)}.{leaf}"))


def copied(model, *, trained=("query", "key", "value")):
    """The task's tensors, apart from it; those that are trained want gradients."""
    return {
        n: t.detach().clone().requires_grad_(any(f".{part}." in n for part in trained))
        for n, t in model.state_dict().items()
    }


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("count", [2, 3])
def test_a_fusion_is_the_papers_equation(kind, count, lab):
    model = lab.base(kind)
    surgery = {"fusion": {"of": count, "bottleneck": 5, "regularization": 0}}
    ours = lab.move(lab.operate(model, surgery).model("a"))
    own, theirs = copied(ours), lab.apart(model)
    fuse(lab, theirs, own, kind)
    fed = lab.batch(model)
    found, wanted = ours(**fed), theirs(**fed)
    assert lab.gap(model(**fed).logits, wanted.logits) > 1e-2
    assert lab.gap(found.logits, wanted.logits) <= 1e-5
    found.loss.backward()
    wanted.loss.backward()
    grads = {n: p.grad for n, p in lab.own(ours).items() if p.requires_grad}
    assert {n.partition(".fusion.")[2] for n in grads} == {
        *("query.weight", "query.bias", "key.weight", "key.bias", "value.weight")
    }
    assert lab.gap(grads, {n: own[n].grad for n in grads}) <= 1e-5


def test_the_equation_holds_to_the_last_digits_in_double_precision(lab):
    """The fold is exact algebra: what differs in single precision is rounding."""
    model = lab.apart(lab.base("bert")).double()
    ours = lab.move(lab.operate(model, {"fusion": {"of": 4, "bottleneck": 5}}).model("a"))
    theirs = lab.apart(model)
    fuse(lab, theirs, copied(ours), "bert")
    fed = lab.batch(model)
    assert lab.gap(ours.eval()(**fed).logits, theirs(**fed).logits) <= 1e-12


def test_twenty_steps_of_a_fusion_are_those_of_the_papers_equation_with_its_regulariser(lab):
    model = lab.base("bert")
    ours = lab.operate(model, {"fusion": {"of": 3, "bottleneck": 5}}).model("a")
    lab.move(ours)
    own, theirs = copied(ours), lab.apart(model)
    fuse(lab, theirs, own, "bert")
    plain = theirs.forward
    values = [t for n, t in own.items() if ".value." in n]

    def regularised(**fed):
        out = plain(**fed)
        out.loss = out.loss + 0.01 * sum((torch.eye(len(v)) - v).square().sum() for v in values)
        return out

    theirs.forward = regularised
    trained = [n for n, t in own.items() if t.requires_grad]
    lab.train(ours, model, [ours.get_parameter(n) for n in trained])
    lab.train(theirs, model, [own[n] for n in trained])
    assert lab.gap({n: ours.state_dict()[n] for n in trained}, {n: own[n] for n in trained}) <= 2e-5
    frozen = {n: t for n, t in own.items() if n not in trained}
    assert all(torch.equal(ours.state_dict()[n], t) for n, t in frozen.items())


def test_an_encoder_decoder_has_a_fusion_behind_every_feed_forward(lab):
    model = lab.base("t5")
    compiled = lab.operate(model, {"fusion": {"bottleneck": 5}})
    ours = lab.move(compiled.model("a"))
    theirs, own = lab.apart(model), ours.state_dict()
    sites = {n.partition(".fusion.")[0] for n in own}
    assert len(sites) == 2 + 2
    for site in sites:
        layer = theirs.get_submodule(site.rpartition(".DenseReluDense.")[0])
        f = fused(own, site)
        layer.register_forward_hook(lambda _m, _i, x, f=f: x + f(x))
    fed = lab.batch(model)
    assert lab.gap(model(**fed).logits, theirs(**fed).logits) > 1e-2
    assert lab.gap(ours(**fed).logits, theirs(**fed).logits) <= 1e-5


def test_value_starts_at_the_identity_and_no_square_matrix_is_deployed(lab):
    ours = lab.operate(lab.base("bert"), {"fusion": {"bottleneck": 5}}).model("a")
    for name, tensor in ours.state_dict().items():
        if ".value." in name:
            assert torch.equal(tensor.diagonal(), torch.ones(32))
            assert 0 < (tensor - torch.eye(32)).abs().max() < 1e-5
    assert all(t.shape != (32, 32) for t in ours.deployed().values())
    assert {p.requires_grad for n, p in lab.own(ours).items() if ".adapter." in n} == {False}


@pytest.mark.sweep  # `surgeon count` has the number, from two layers, in every run
def test_a_fusion_counts_as_adapterhub_does():
    """3d² + 2d a layer, whatever is fused; AdapterHub 1.3.0 counts 21,252,096 in a BERT-base."""
    spec = {"base": {"config": {"model_type": "bert"}}, "surgery": [{"fusion": {"of": 8}}]}
    assert surgeon.compile(spec, weights=False).plan.parameters == 21_252_096


@pytest.mark.parametrize("kind", ["llama", "gpt2", pytest.param("t5", marks=pytest.mark.sweep)])
def test_a_fusion_composes_and_runs_in_onnx_runtime(kind, lab, tmp_path):
    model = lab.base(kind)
    more = MORE[:1] if kind in ("llama", "t5") else MORE
    compiled = lab.operate(model, {"fusion": {"of": 3, "bottleneck": 5}}, *more, tasks={"a": {}, "b": {}})
    models = {task: lab.move(compiled.model(task), seed=seed).eval() for seed, task in enumerate("ab")}
    with surgeon.Session(compiled.save(tmp_path / "build"), threads=1) as session:
        for task in "aba":
            for batch, length, pad in ((3, 11, 4), (1, 5, 0)):
                fed = lab.feed(model, batch, length, pad=pad)
                seen = fed["attention_mask"].bool() if kind != "t5" else slice(None)
                with torch.no_grad():
                    wanted = models[task](**fed).logits[seen]
                found = torch.from_numpy(session.run({n: t.numpy() for n, t in fed.items()}, task)["logits"])[seen]
                assert lab.gap(found, wanted) <= 1e-4
