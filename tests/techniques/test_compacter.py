"""Compacter is the paper's sum of Kronecker products inside an adapter; deployed it is a plain adapter."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import gelu

from surgeon.errors import SpecError
from surgeon.graph_text import graph_text

OPTIONS = {"bottleneck": 8, "divisions": 4, "norms": False}
SITES = {
    "bert": [f"bert.encoder.layer.{i}.{leaf}" for i in range(2) for leaf in ("attention.output.dense", "output.dense")],
    "gpt2": [f"transformer.h.{i}.{leaf}" for i in range(2) for leaf in ("attn.c_proj", "mlp.c_proj")],
    "llama": [f"model.layers.{i}.{leaf}" for i in range(2) for leaf in ("self_attn.o_proj", "mlp.down_proj")],
    "t5": [
        f"{stack}.block.{i}.{leaf}"
        for stack, last in (("encoder", 1), ("decoder", 2))
        for i in range(2)
        for leaf in ("layer.0.SelfAttention.o", f"layer.{last}.DenseReluDense.wo")
    ],
}


def phm(rule, left, right):
    """W = Σᵢ Aᵢ ⊗ (sᵢ·tᵢᵀ), one product after the other: the paper's equations 4 and 5."""
    n = len(rule)
    return sum(
        torch.kron(rule[i], left.chunk(n, 0)[i] @ right.chunk(n, 1)[i]) for i in range(n)
    )  # fmt: skip


def attach(theirs, own, sites):
    """branch + act(branch·W_down + b_down)·W_up + b_up around the base's own last linears."""
    for site in sites:
        name = f"{site}.compacter"

        def adapted(_module, _inputs, h, name=name):
            down, up = (
                phm(own["compacter.rule"], *(own[f"{name}.{part}.{side}"] for side in ("left", "right")))
                for part in ("down", "up")
            )
            return h + gelu(h @ down + own[f"{name}.down.bias"]) @ up + own[f"{name}.up.bias"]

        theirs.get_submodule(site).register_forward_hook(adapted)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("kind", SITES)
def test_compacter_is_the_papers_equation(kind, rank, lab):
    model = lab.base(kind)
    ours = lab.move(lab.operate(model, {"compacter": {**OPTIONS, "rank": rank}}).model("a"), by=0.5)
    own = {n: t.detach().clone().requires_grad_() for n, t in ours.state_dict().items()}
    theirs = lab.apart(model)
    attach(theirs, own, SITES[kind])
    fed = lab.batch(model)
    found, wanted = ours(**fed), theirs(**fed)
    assert lab.gap(model(**fed).logits, wanted.logits) > 1e-2
    assert lab.gap(found.logits, wanted.logits) <= 2e-6
    found.loss.backward()
    wanted.loss.backward()
    assert lab.gap({n: p.grad for n, p in lab.own(ours).items()}, {n: t.grad for n, t in own.items()}) <= 1e-5


def test_twenty_steps_are_those_of_the_papers_equation(lab):
    model = lab.base("bert")
    ours = lab.move(lab.operate(model, {"compacter": OPTIONS}).model("a"))
    own = {n: t.detach().clone().requires_grad_() for n, t in ours.state_dict().items()}
    theirs = lab.apart(model)
    attach(theirs, own, SITES["bert"])
    lab.train(ours, model, lab.own(ours).values())
    lab.train(theirs, model, own.values())
    assert lab.gap(ours.state_dict(), own) <= 1e-5


def test_a_fresh_task_is_the_base_but_for_about_a_rounding(lab):
    for kind in SITES:
        model = lab.base(kind)
        ours = lab.operate(model, {"compacter": {}}).model("a").eval()
        assert lab.gap(ours(**lab.batch(model)).logits, model(**lab.batch(model)).logits) <= 2e-6


def test_the_start_is_the_papers(lab):
    """A from N(0, 1e-4); s and t uniform within Glorot's bound of each block, times √2; biases zero."""
    ours = lab.operate(lab.base("bert", hidden_size=64), {"compacter": OPTIONS}).model("a").state_dict()
    assert 0.5e-4 < float(ours["compacter.rule"].std()) < 2e-4
    name = f"{SITES['bert'][0]}.compacter"
    for tensor, block in (("down.left", 16), ("down.right", 2), ("up.right", 16)):
        bound = (2 * 6 / (block + 1)) ** 0.5
        drawn = ours[f"{name}.{tensor}"]
        assert 0.6 * bound < float(drawn.abs().max()) <= bound
    assert not ours[f"{name}.down.bias"].any()


def test_the_graph_is_an_adapters(lab):
    adapter = lab.operate(lab.base("bert"), {"adapter": {"bottleneck": 8}})
    compacter = lab.operate(lab.base("bert"), {"compacter": {"bottleneck": 8}})
    assert graph_text(compacter.program) == graph_text(adapter.program).replace("adapter", "compacter")


def test_counts_are_the_papers(lab):
    """3·(d + m) a site for s, t and the biases, and one A of n³; the norms beside them. `++` has half of the sites."""
    model = lab.base("bert")
    for options, sites in (({}, 4), ({"where": "residual.ffn"}, 2)):
        plan = lab.operate(model, {"compacter": {**OPTIONS, **options}}).plan
        assert plan.parameters == sites * 3 * (32 + 8) + 4**3
    norms = 5 * 2 * 32
    assert lab.operate(model, {"compacter": {"bottleneck": 8}}).plan.parameters == 4 * 3 * 40 + 64 + norms


def test_shared_layers_share_their_factors(lab):
    ours = lab.operate(lab.base("albert"), {"compacter": OPTIONS}).model("a")
    lab.move(ours)(**lab.batch(lab.base("albert"))).loss.backward()
    assert len(lab.own(ours)) == 1 + 2 * 6
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in lab.own(ours).values())


@pytest.mark.parametrize(
    ("surgery", "what"),
    [
        ([{"compacter": {"bottleneck": 6}}], "does not divide bottleneck, 6"),
        ([{"compacter": {"divisions": 3, "bottleneck": 6}}], "does not divide the base's width, 32"),
        (
            [
                {"compacter": {**OPTIONS, "where": "residual.ffn@0"}},
                {"compacter": {**OPTIONS, "divisions": 2, "where": "residual.ffn@1"}},
            ],
            "divisions is 2, and 4 in an earlier item",
        ),
    ],
)
def test_divisions_that_do_not_fit_are_refused(surgery, what, lab):
    with pytest.raises(SpecError, match=what):
        lab.operate(lab.base("bert"), *surgery)


COMPOSED = ({"compacter": {**OPTIONS, "placement": "parallel"}}, {"lora": {"rank": 3}}, {"bitfit": {}}, {"head": {}})


def test_tasks_of_other_sizes_swap_in_onnx_runtime(lab, tmp_path):
    """With LoRA, BitFit and a head; `b` is trained with a bottleneck of its own."""
    model = lab.base("bert")
    tasks = {"a": {"labels": 2}, "b": {"labels": 4}}
    compiled = lab.operate(model, *COMPOSED, tasks=tasks)
    lab.move(compiled.model("a"))
    wider = lab.operate(
        model, {"compacter": {**COMPOSED[0]["compacter"], "bottleneck": 12}}, *COMPOSED[1:], tasks=tasks
    )
    compiled.model("b").load_state_dict(lab.move(wider.model("b"), 0.2, 7).state_dict())
    feeds = [lab.feed(model, *sizes, pad=pad) for *sizes, pad in ((3, 11, 4), (1, 5, 0))]
    assert lab.served(compiled, tmp_path, feeds) <= 1e-4
