"""AdapterFusion is the paper's equation, written again in plain torch with a loop over the adapters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import relu

import surgeon
from surgeon.errors import SurgeonError
from surgeon.runtime.taskfile import write_adapter

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


def fuse(theirs, own, kind):
    """Post-norm: LN(fusion(LN(h + x)) + h + x), one norm used twice. Pre-norm: join + fusion(join)."""
    block, leaf = BLOCKS[kind]
    for i in range(2):
        layer = theirs.get_submodule(block.format(i))
        f = fused(own, f"{block.format(i)}.{leaf}")
        if kind == "bert":
            out = layer.output
            out.forward = lambda h, x, out=out, f=f: out.LayerNorm(
                f(out.LayerNorm(out.dense(h) + x)) + out.dense(h) + x
            )
        else:
            layer.register_forward_hook(lambda _m, _i, x, f=f: x + f(x))


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
    fuse(theirs, own, kind)
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
    fuse(theirs, copied(ours), "bert")
    fed = lab.batch(model)
    assert lab.gap(ours.eval()(**fed).logits, theirs(**fed).logits) <= 1e-12


def test_twenty_steps_of_a_fusion_are_those_of_the_papers_equation_with_its_regulariser(lab):
    model = lab.base("bert")
    ours = lab.operate(model, {"fusion": {"of": 3, "bottleneck": 5}}).model("a")
    lab.move(ours)
    own, theirs = copied(ours), lab.apart(model)
    fuse(theirs, own, "bert")
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


def test_a_fusion_counts_as_adapterhub_does():
    """3d² + 2d a layer, whatever is fused; AdapterHub 1.3.0 counts 21,252,096 in a BERT-base."""
    spec = {"base": {"config": {"model_type": "bert"}}, "surgery": [{"fusion": {"of": 8}}]}
    assert surgeon.compile(spec, weights=False).plan.parameters == 21_252_096


# -- adapters that other tasks trained ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapters(lab, tmp_path_factory):
    """A build of three adapters of two widths, and the compiled it comes from."""
    compiled = lab.operate(
        lab.base("bert"),
        {"adapter": {"placement": "pfeiffer", "activation": "relu", "bottleneck": 6}},
        tasks={name: {"labels": 3} for name in ("movie", "product", "kind")},
    )
    for seed, task in enumerate(compiled.tasks):
        lab.move(compiled.model(task), seed=seed)
    narrow = {
        n: t[tuple(slice(4) if "bottleneck" in s else slice(None) for s in _symbols(compiled, n, t))]
        for n, t in compiled.model("kind").state_dict().items()
    }
    compiled.model("kind").load_state_dict(narrow)
    return compiled, compiled.save(tmp_path_factory.mktemp("adapters") / "build")


def _symbols(compiled, name, tensor):
    free = compiled.program.ledger.free(name)
    return [free.get(axis, "") for axis in range(tensor.dim())]


def of(adapters, *names, **options):
    return {"fusion": {"of": list(names), "build": str(adapters[1]), **options}}


def test_trained_adapters_are_read_from_the_tasks_of_a_build(lab, adapters):
    compiled, _ = adapters
    ours = lab.operate(lab.base("bert"), of(adapters, "movie", "product", "kind")).model("a").state_dict()
    site = "bert.encoder.layer.1.output.dense"
    for n, task in enumerate(("movie", "product", "kind")):
        theirs = compiled.model(task).state_dict()
        width = theirs[f"{site}.adapter.down.bias"].shape[0]
        down, up = (ours[f"{site}.fusion.adapter.{part}.weight"][n] for part in ("down", "up"))
        assert torch.equal(down[:, :width], theirs[f"{site}.adapter.down.weight"])
        assert torch.equal(up[:width], theirs[f"{site}.adapter.up.weight"])
        assert not down[:, width:].any()
        assert not up[width:].any()
        assert torch.equal(ours[f"{site}.fusion.adapter.up.bias"][n], theirs[f"{site}.adapter.up.bias"])


def test_where_attention_is_all_on_one_adapter_a_fusion_is_that_adapter(lab, adapters):
    """The adapter pass itself is the oracle: fused with a copy of itself, and V the identity."""
    compiled, build = adapters
    files = [str(build / "tasks" / path.name) for path in (build / "tasks").glob("kind.*.safetensors")]
    twin = build.parent / "twin.safetensors"
    save_file(load_file(files[0]), twin)
    model = lab.base("bert")
    ours = lab.operate(model, {"fusion": {"of": [*files, str(twin)]}}).model("a").eval()
    alone = lab.operate(model, {"adapter": {"placement": "pfeiffer", "activation": "relu"}}).model("a").eval()
    kind = {n: t for n, t in compiled.model("kind").state_dict().items() if ".adapter." in n}
    alone.load_state_dict(kind)
    fed = lab.feed(model, 3, 9, pad=2)
    assert lab.gap(model(**fed).logits, alone(**fed).logits) > 1e-2
    assert lab.gap(ours(**fed).logits, alone(**fed).logits) <= 1e-5


def test_fusions_of_two_and_of_eight_and_the_base_run_on_one_graph(lab, adapters, tmp_path):
    model = lab.base("bert")
    build = lab.operate(model, of(adapters, "movie", "kind"), *MORE, tasks={"a": {"labels": 4}})
    lab.move(build.model("a"), by=0.1)
    folder = build.save(tmp_path / "build")
    session = surgeon.Session(folder, threads=1)
    models = {"a": build.model("a").eval()}
    for count, names in ((3, ("movie", "product", "kind")), (8, None)):
        surgery = of(adapters, *names) if names else {"fusion": {"of": count, "bottleneck": 7}}
        other = lab.operate(model, surgery, *MORE, tasks={"a": {"labels": 4}})
        models[f"of-{count}"] = lab.move(other.model("a"), by=0.1, seed=count).eval()
        path = tmp_path / f"of-{count}.onnx_adapter"
        arrays = {n: t.detach().contiguous().numpy() for n, t in other.model("a").deployed().items()}
        write_adapter(path, arrays, other.base.fingerprint)
        session.add_task(path, f"of-{count}")
    for batch, length, pad in ((3, 11, 4), (1, 5, 0)):
        fed = lab.feed(model, batch, length, pad=pad)
        arrays = {n: t.numpy() for n, t in fed.items()}
        for task in ("a", "of-8", "of-3", "a"):
            with torch.no_grad():
                wanted = models[task](**fed).logits
            assert lab.gap(torch.from_numpy(session.run(arrays, task)["logits"]), wanted) <= 1e-4
        with torch.no_grad():
            assert lab.gap(torch.from_numpy(session.run(arrays)["logits"]), model(**fed).logits) <= 1e-6


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
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


def test_a_fused_build_is_opened_and_trained_again_without_the_adapters_build(lab, adapters, tmp_path):
    model = lab.base("bert")
    compiled = lab.operate(model, of(adapters, "movie", "kind"), tasks={"a": {"labels": 3}})
    lab.move(compiled.model("a"), by=0.1)
    build = compiled.save(tmp_path / "build")
    text = (build / "spec.yaml").read_text(encoding="utf-8")
    assert str(adapters[1]) in text
    hidden = adapters[1].rename(adapters[1].with_name("hidden"))
    try:
        again = surgeon.load(build, base=model)
    finally:
        hidden.rename(adapters[1])
    tensors = again.model("a").state_dict()
    assert all(torch.equal(t, tensors[n]) for n, t in compiled.model("a").state_dict().items())
    assert not again.model("a").get_parameter("bert.encoder.layer.0.output.dense.fusion.adapter.up.bias").requires_grad


# -- what does not fit --------------------------------------------------------------------------------------------


BAD = {
    "one": (["movie"], {}, ("1 adapter cannot be fused", "kind, movie, product")),
    "none": ([], {}, ("0 adapters cannot be fused", "kind, movie, product")),
    "the same twice": (["movie", "kind", "movie"], {}, ("twice: movie", "kind, movie, product")),
    "an unknown task": (["movie", "kinds"], {}, ("no trained task 'kinds'", "did you mean 'kind'?")),
    "another activation": (["movie", "kind"], {"activation": "gelu"}, ("activation: relu", "gelu is wanted")),
    "another scale": (["movie", "kind"], {"scale": 4.0}, ("scale: 1.0", "4.0 is wanted")),
    "sites that have none": (["movie", "kind"], {"where": "residual.attention"}, ("8 of 8 adapter tensors",)),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_adapters_that_do_not_fit_are_refused(case, lab, adapters):
    names, options, words = BAD[case]
    with pytest.raises(SurgeonError) as told:
        lab.operate(lab.base("bert"), of(adapters, *names, **options))
    assert all(word in str(told.value) for word in words), told.value


@pytest.mark.parametrize("entry", [1, 0, -3, "movie", True, [2, 3]])
def test_what_is_no_number_and_no_list_of_tasks_is_refused(entry, lab):
    with pytest.raises(SurgeonError, match=r"fusion\.of"):
        lab.operate(lab.base("bert"), {"fusion": {"of": entry}})


def test_tasks_without_a_build_and_a_build_without_tasks_are_refused(lab, adapters, tmp_path):
    model = lab.base("bert")
    with pytest.raises(SurgeonError, match=r"no trained task 'movie'[\s\S]*no `build` is named"):
        lab.operate(model, {"fusion": {"of": ["movie", "kind"]}})
    with pytest.raises(SurgeonError, match="`of` is a number"):
        lab.operate(model, {"fusion": {"of": 2, "build": str(adapters[1])}})
    with pytest.raises(SurgeonError, match="not a build"):
        lab.operate(model, {"fusion": {"of": ["movie", "kind"], "build": str(tmp_path)}})


def test_adapters_of_another_base_another_width_or_with_nan_are_refused(lab, adapters, tmp_path):
    _, build = adapters
    with pytest.raises(SurgeonError, match="another base"):
        lab.operate(lab.base("bert", hidden_size=36), of(adapters, "movie", "kind"))
    good = next(str(path) for path in (build / "tasks").glob("kind.*.safetensors"))
    tensors = load_file(good)
    name = "bert.encoder.layer.0.output.dense.adapter.up.bias"

    def refused(match, changed):
        save_file(changed, tmp_path / "changed.safetensors")
        with pytest.raises(SurgeonError, match=match):
            lab.operate(lab.base("bert"), {"fusion": {"of": [good, str(tmp_path / "changed.safetensors")]}})

    refused(r"has shape \[30\], this base wants \[32\]", {**tensors, name: tensors[name][:30].clone()})
    refused("NaN or infinity in", {**tensors, name: tensors[name] * np.nan})
    refused("1 of 8 adapter tensors are missing", {n: t for n, t in tensors.items() if n != name})
    refused("at no site of the fusion", {**tensors, "bert.pooler.adapter.up.bias": tensors[name].clone()})
    refused("together with other deltas", {**tensors, "bert.pooler.lora_A": tensors[name].clone()})
    with pytest.raises(SurgeonError, match=r"no trained task 'x\.bin'"):
        lab.operate(lab.base("bert"), {"fusion": {"of": [good, "x.bin"]}})
