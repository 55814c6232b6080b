"""A base in four bits as it is deployed: ONNX Runtime reads the same bytes, and the base is another one."""

from __future__ import annotations

import shutil

import numpy as np
import onnx
import pytest
import torch
from bitsandbytes import functional as F
from onnx import numpy_helper

import surgeon
from surgeon.audit import audit
from surgeon.compiler import pack_weights
from surgeon.errors import DeltaError
from surgeon.runtime.taskfile import write_adapter


def test_the_module_holds_no_weight_twice_and_the_checkpoints_are_freed(base_spec):
    plain, compiled = (surgeon.compile(base_spec(*s)) for s in ([{"lora": {}}], [{"qlora": {"rank": 8}}]))
    weight = plain.base.model.get_parameter("bert.encoder.layer.0.output.dense.weight")
    count = sum(p.numel() for n, p in plain.base.model.named_parameters() if p.dim() == 2 and ".layer." in n)
    sizes = [sum(t.numel() * t.itemsize for t in c.model("a")._graph.state_dict().values()) for c in (plain, compiled)]
    deltas = [sum(t.numel() * 4 for t in c.model("a").state_dict().values()) for c in (plain, compiled)]
    saved = (sizes[0] - deltas[0]) - (sizes[1] - deltas[1])
    assert 4 * count - 0.6 * count < saved < 4 * count - 0.5 * count
    assert compiled.plan.checkpoint_bytes - compiled.plan.base_bytes == saved
    assert compiled.plan.base_parameters == plain.plan.base_parameters
    assert compiled.base.model.get_parameter("bert.encoder.layer.0.output.dense.weight").is_meta
    assert not weight.is_meta


@pytest.fixture
def base_spec():
    """A spec over a BERT of one layer made from its configuration."""

    def make(*surgery):
        config = {"model_type": "bert", "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
        config |= {"intermediate_size": 128, "vocab_size": 100, "max_position_embeddings": 64}
        return {"base": {"config": config}, "surgery": list(surgery), "tasks": {"a": {"labels": 3}, "b": {"labels": 4}}}

    return make


COMPOSED = {
    "bert": [
        {"lora": {"rank": 2, "where": "head.dense"}},
        {"qlora": {"rank": 3, "dropout": 0.1}},
        {"bitfit": {}},
        {"head": {}},
    ],
    "llama": [{"qlora": {"rank": 3, "where": "ffn", "double": False}}, {"lora": {"rank": 2}}, {"ia3": {}}],
    "gpt2": [
        {"bitfit": {"where": ["attention.query", "ffn"]}},
        {"qlora": {"rank": 3, "block": 128}},
        {"prefix": {"length": 3}},
    ],
    "t5": [{"ia3": {}}, {"qlora": {"rank": 3, "quantise": "ffn"}}, {"adapter": {"bottleneck": 4}}],
}


@pytest.fixture(scope="module", params=["bert", "llama", "gpt2", pytest.param("t5", marks=pytest.mark.sweep)])
def built(request, lab, tmp_path_factory):
    """A composed surgery with two tasks off their birth values, saved and open in ONNX Runtime."""
    model = lab.base(request.param)
    labels = {"labels": 3} if request.param == "bert" else {}
    compiled = lab.operate(model, *COMPOSED[request.param], tasks={"a": labels, "b": labels})
    for seed, task in enumerate("ab"):
        lab.move(compiled.model(task).eval(), seed=seed)
    folder = compiled.save(tmp_path_factory.mktemp(request.param) / "build")
    with surgeon.Session(folder, threads=1) as session:
        yield model, compiled, folder, session


def test_onnx_runtime_answers_as_torch_for_every_task_in_turn(built, lab):
    model, compiled, _, session = built
    for sizes in ((3, 11, 4), (1, 5, 0), (2, 20, 3)):
        fed = lab.feed(model, sizes[0], sizes[1], pad=sizes[2])
        arrays = {n: t.numpy() for n, t in fed.items()}
        first = {}
        for task in ("a", "b", "a", "b"):
            found = session.run(arrays, task)["logits"]
            assert np.array_equal(found, first.setdefault(task, found))
            with torch.no_grad():
                assert np.abs(found - compiled.model(task)(**fed).logits.numpy()).max() <= 1e-4
        assert not np.array_equal(first["a"], first["b"])


def test_without_a_task_onnx_runtime_is_the_quantised_base(built, lab):
    model, compiled, _, session = built
    theirs = lab.apart(model)
    with torch.no_grad():
        for name in compiled.program.stored:
            theirs.get_parameter(name).copy_(compiled.program.tensor(name))
        fed = lab.feed(model, 3, 9, pad=2)
        found = session.run({n: t.numpy() for n, t in fed.items()})["logits"]
        assert np.abs(found - theirs(**fed).logits.numpy()).max() <= 1e-5
        assert np.abs(found - model(**fed).logits.numpy()).max() > 1e-4


def test_the_file_holds_bitsandbytes_bytes_under_the_checkpoints_names(built, tmp_path):
    model, compiled, folder, _ = built
    graph = onnx.load(shutil.copytree(folder, tmp_path / "copy") / "model.onnx")  # `onnx` opens no hard links
    held = {t.name: numpy_helper.to_array(t) for t in graph.graph.initializer}
    users = [node for node in graph.graph.node if node.op_type == "MatMulBnb4"]
    assert users
    assert {(o.domain, o.version) for o in graph.opset_import} >= {("com.microsoft", 1)}
    block = {"gpt2": 128}.get(model.config.model_type, 64)
    assert {(a.name, a.i) for n in users for a in n.attribute} >= {("block_size", block), ("quant_type", 1)}
    for name in compiled.program.stored:
        weight = model.get_parameter(name).detach()
        whole = weight.T.contiguous() if "transformer.h" in name else weight
        packed, state = F.quantize_4bit(
            whole, blocksize=block, compress_statistics=model.config.model_type != "llama", quant_type="nf4"
        )
        absmax = F.dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
        assert held[f"{name}.nf4"].tobytes() == packed.numpy().tobytes()
        assert held[f"{name}.absmax"].tobytes() == absmax.numpy().tobytes()
        assert name not in held


def test_every_rank_runs_on_one_graph(lab, tmp_path):
    model = lab.base("bert")
    compiled = lab.operate(model, {"qlora": {"rank": 4}})
    folder = compiled.save(tmp_path / "build")
    fed = lab.feed(model, 2, 9, pad=2)
    with surgeon.Session(folder, threads=1) as session:
        for rank in (0, 1, 16):
            ours, noise = compiled.model("a").eval(), torch.Generator().manual_seed(rank)
            shapes = {n: [rank if s == 4 else s for s in t.shape] for n, t in ours.state_dict().items()}
            ours.load_state_dict({n: 0.2 * torch.randn(s, generator=noise) for n, s in shapes.items()})
            arrays = {n: t.detach().contiguous().numpy() for n, t in ours.deployed().items()}
            write_adapter(tmp_path / "t.onnx_adapter", arrays, compiled.program.fingerprint)
            session.add_task(tmp_path / "t.onnx_adapter", "t", replace=True)
            found = session.run({n: t.numpy() for n, t in fed.items()}, "t")["logits"]
            assert np.abs(found - ours(**fed).logits.detach().numpy()).max() <= 1e-4


def test_a_build_is_saved_loaded_and_verified(base_spec, lab, tmp_path):
    compiled = surgeon.compile(base_spec({"qlora": {"rank": 4}}))
    for task in "ab":
        lab.move(compiled.model(task))
    folder = compiled.save(tmp_path / "build")
    loaded = surgeon.load(folder)
    wanted, found = compiled.model("b").eval(), loaded.model("b").eval()
    assert loaded.program.fingerprint == compiled.program.fingerprint != compiled.base.fingerprint
    fed = {"input_ids": torch.arange(3, 12).view(1, 9)}
    assert torch.equal(found(**fed).logits, wanted(**fed).logits)
    audited = audit(folder).tasks
    assert [t.name for t in audited] == [None, "a", "b"]
    assert all(t.difference <= 1e-5 for t in audited)


def test_a_build_of_a_base_in_hand_is_loaded_without_the_numbers_that_nf4_stands_for(base_spec, lab, tiny, tmp_path):
    """The build's own copy of the base is nobody else's; one that the caller lends stays whole."""
    model = tiny("bert", num_hidden_layers=1)
    spec = {name: part for name, part in base_spec({"qlora": {"rank": 4}}).items() if name != "base"}
    compiled = surgeon.compile(spec, model)
    lab.move(compiled.model("a"))
    folder = compiled.save(tmp_path / "build")
    weight = "bert.encoder.layer.0.output.dense.weight"
    loaded, lent = surgeon.load(folder), surgeon.load(folder, model)
    assert loaded.base.model.get_parameter(weight).is_meta
    assert not lent.base.model.get_parameter(weight).is_meta
    fed = lab.feed(model, 2, 9)
    wanted = compiled.model("a").eval()(**fed).logits
    for again in (loaded, lent):
        assert torch.equal(again.model("a").eval()(**fed).logits, wanted)


def test_tasks_of_the_checkpoint_and_of_its_quantised_form_refuse_each_other(base_spec, tmp_path):
    plain = surgeon.compile(base_spec({"lora": {"rank": 4, "where": ["attention", "ffn"]}}), out=tmp_path / "plain")
    held = surgeon.compile(base_spec({"qlora": {"rank": 4}}), out=tmp_path / "held")
    assert set(plain.model("a").state_dict()) == set(held.model("a").state_dict())
    for build, other in (("plain", "held"), ("held", "plain")):
        file = next((tmp_path / other / "tasks").glob("a.*.onnx_adapter"))
        with surgeon.Session(tmp_path / build) as session, pytest.raises(DeltaError, match="base"):
            session.add_task(file, "foreign")
        weights = next((tmp_path / other / "tasks").glob("a.*.safetensors"))
        with pytest.raises(DeltaError, match="another base"):
            pack_weights(tmp_path / build, "a", weights)


def test_a_plan_needs_no_weights_and_says_what_the_base_takes(base_spec):
    spec = base_spec({"qlora": {"rank": 4}})
    real, meta = surgeon.compile(spec).plan, surgeon.compile(spec, weights=False).plan
    assert real.to_dict() == meta.to_dict()
    assert meta.base_bytes < meta.checkpoint_bytes
