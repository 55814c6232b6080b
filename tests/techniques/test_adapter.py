"""Adapters are the papers' equations, written again in plain torch around the base's own modules."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import gelu, relu

# Where a block's parts are: the last linear of each sublayer, in the order of our joins.
LAST_LINEARS = {
    "bert": ("bert.encoder.layer.{}", ("attention.output.dense", "output.dense")),
    "gpt2": ("transformer.h.{}", ("attn.c_proj", "mlp.c_proj")),
    "llama": ("model.layers.{}", ("self_attn.o_proj", "mlp.down_proj")),
}
NORMS = ("LayerNorm", "ln_", "layernorm", "model.norm")


def mlp(own, site, act, scale=1.0):
    """f(z) = s · (act(z·W_down + b_down)·W_up + b_up) with the task's tensors at `site`."""
    down, down_bias, up, up_bias = (
        own[f"{site}.adapter.{part}"] for part in ("down.weight", "down.bias", "up.weight", "up.bias")
    )
    return lambda z: scale * (act(z @ down + down_bias) @ up + up_bias)


def houlsby(lab, theirs, own, kind):
    """branch + f(branch) after both sublayers, before the residual: section 2.1 and figure 2."""
    block, leaves = LAST_LINEARS[kind]
    for i in range(2):
        for leaf in leaves:
            site = f"{block.format(i)}.{leaf}"
            f = mlp(own, site, gelu)
            theirs.get_submodule(site).register_forward_hook(lambda _m, _i, h, f=f: h + f(h))


def pfeiffer(lab, theirs, own, kind):
    """Post-norm: LN(f(LN(h + x)) + h + x), one norm used twice. Pre-norm: join + f(join)."""
    block, (_, leaf) = LAST_LINEARS[kind]
    for i in range(2):
        layer = theirs.get_submodule(block.format(i))
        lab.behind(layer, mlp(own, f"{block.format(i)}.{leaf}", relu))


def parallel(lab, theirs, own, kind):
    """branch + s·f(entry) with s = 4 and the feed-forward's direct input as entry: He et al., sections 3.3 and 4.5."""
    block, (_, leaf) = LAST_LINEARS[kind]
    for i in range(2):
        layer = theirs.get_submodule(block.format(i))
        f = mlp(own, f"{block.format(i)}.{leaf}", relu, scale=4.0)
        if kind == "bert":
            out = layer.output
            out.forward = lambda h, x, out=out, f=f: out.LayerNorm(out.dense(h) + f(x) + x)
        else:
            layer.mlp.register_forward_hook(lambda _m, args, h, f=f: h + f(args[0]))


LAYOUTS = {"houlsby": (houlsby, "gelu"), "pfeiffer": (pfeiffer, "relu"), "parallel": (parallel, "relu")}


@pytest.mark.parametrize("kind", LAST_LINEARS)
@pytest.mark.parametrize("placement", LAYOUTS)
def test_an_adapter_is_the_papers_equation(placement, kind, lab):
    write, activation = LAYOUTS[placement]
    model = lab.base(kind)
    options = {"bottleneck": 6, "placement": placement, "activation": activation, "norms": False}
    ours = lab.move(lab.operate(model, {"adapter": options}).model("a"))
    own = {n: t.detach().clone().requires_grad_() for n, t in ours.state_dict().items()}
    theirs = lab.apart(model)
    write(lab, theirs, own, kind)
    fed = lab.batch(model)
    found, wanted = ours(**fed), theirs(**fed)
    assert lab.gap(model(**fed).logits, wanted.logits) > 1e-2
    assert lab.gap(found.logits, wanted.logits) <= 1e-6
    found.loss.backward()
    wanted.loss.backward()
    assert lab.gap({n: p.grad for n, p in lab.own(ours).items()}, {n: t.grad for n, t in own.items()}) <= 1e-6


@pytest.mark.parametrize("kind", LAST_LINEARS)
def test_houlsbys_recipe_trains_every_norm_from_the_bases_values(kind, lab):
    model = lab.base(kind)
    ours = lab.operate(model, {"adapter": {"bottleneck": 6}}).model("a")
    norms = {n: p for n, p in model.named_parameters() if any(part in n for part in NORMS)}
    trained = {
        n.replace(".adapter.", "."): t for n, t in lab.own(ours).items() if not {"down", "up"} & set(n.split("."))
    }
    assert trained.keys() == norms.keys()
    assert all(torch.equal(trained[n], norms[n]) for n in norms)
    lab.move(ours)
    theirs = lab.apart(model)
    theirs.load_state_dict({n: t.detach() for n, t in trained.items()}, strict=False)
    own = {n: t.detach().clone().requires_grad_() for n, t in ours.state_dict().items()}
    houlsby(lab, theirs, own, kind)
    ours_out, theirs_out = ours(**lab.batch(model)), theirs(**lab.batch(model))
    assert lab.gap(ours_out.logits, theirs_out.logits) <= 1e-6
    ours_out.loss.backward()
    theirs_out.loss.backward()
    grads = {n: p.grad for n, p in theirs.named_parameters() if n in norms}
    assert lab.gap({n: p.grad for n, p in trained.items()}, grads) <= 1e-6


@pytest.mark.parametrize("placement", LAYOUTS)
def test_twenty_steps_of_an_adapter_are_those_of_the_papers_equation(placement, lab):
    write, activation = LAYOUTS[placement]
    model = lab.base("bert")
    options = {"bottleneck": 6, "placement": placement, "activation": activation, "norms": False}
    ours = lab.operate(model, {"adapter": options}).model("a")
    own = {n: t.detach().clone().requires_grad_() for n, t in ours.state_dict().items()}
    theirs = lab.apart(model)
    write(lab, theirs, own, "bert")
    lab.train(ours, model, lab.own(ours).values())
    lab.train(theirs, model, own.values())
    assert lab.gap(ours.state_dict(), own) <= 1e-5


def test_an_encoder_decoder_has_an_adapter_at_every_join(lab):
    """Houlsby in T5: two an encoder layer, three a decoder layer, against hooks on the same linears."""
    model = lab.base("t5")
    ours = lab.move(lab.operate(model, {"adapter": {"bottleneck": 5, "norms": False}}).model("a"), by=0.5)
    theirs, own = lab.apart(model), ours.state_dict()
    sites = {name.partition(".adapter.")[0] for name in own}
    assert len(sites) == 2 * 2 + 2 * 3
    assert {site.rpartition(".")[2] for site in sites} == {"o", "wo"}
    for site in sites:
        f = mlp(own, site, gelu)
        theirs.get_submodule(site).register_forward_hook(lambda _m, _i, h, f=f: h + f(h))
    fed = lab.batch(model)
    assert lab.gap(model(**fed).logits, theirs(**fed).logits) > 1e-2
    assert lab.gap(ours(**fed).logits, theirs(**fed).logits) <= 1e-6


def test_the_scale_of_an_adapter_is_trained_out_and_deployed_in(lab):
    model = lab.base("bert")
    ours = lab.move(lab.operate(model, {"adapter": {"bottleneck": 3, "placement": "parallel"}}).model("a"))
    trained, deployed = ours.state_dict(), ours.deployed()
    scaled = {name for name in trained if ".up." in name}
    assert all(torch.equal(deployed[n], trained[n] * (4 if n in scaled else 1)) for n in trained)
