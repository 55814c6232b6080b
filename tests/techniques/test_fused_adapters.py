"""Adapters that other tasks have trained, fused: read from a build, any number on one graph, or refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import surgeon
from surgeon.errors import SurgeonError
from surgeon.runtime.taskfile import write_adapter

MORE = ({"lora": {"rank": 3}}, {"bitfit": {"where": "attention"}})


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
