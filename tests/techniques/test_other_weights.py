"""`export.weights`: the base's matrices in 8 or 4 bits for ONNX Runtime, and nothing else; deltas as ever."""

from __future__ import annotations

import shutil
from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

import surgeon
from surgeon.audit import Audit, AuditedTask, _require_agreement, audit
from surgeon.compiler import Compiled
from surgeon.errors import BaseError, BuildError, SpecError
from surgeon.exporters.cache import cache_key
from surgeon.exporters.onnx import convert
from surgeon.exporters.quantise import BITS, pack, products
from surgeon.runtime.taskfile import write_adapter
from surgeon.spec import read_spec

CASES = [("bert", "int8"), ("llama", "int4")]
BOUNDS = {"int8": 0.05, "int4": 0.8}
"""Largest difference to fp32 relative to the largest logit: tiny random bases are far noisier than real ones."""
ROUNDING = 0.05
"""The same to the rounded base: ONNX Runtime rounds the inputs of every product too."""


def with_weights(compiled, weights):
    """The same surgery, exported in another form."""
    spec = read_spec({**compiled.spec.model_dump(mode="json", exclude_none=True), "export": {"weights": weights}})
    return Compiled(spec, compiled.base, compiled.program)


def operate(lab, kind, weights, *surgery, tasks=("a", "b")):
    model = lab.base(kind) if isinstance(kind, str) else kind
    labels = {"labels": 3} if model.config.model_type == "bert" else {}
    made = lab.operate(model, *surgery, tasks=dict.fromkeys(tasks, labels))
    return with_weights(made, weights)


def operators(model):
    return Counter(node.op_type for node in model.graph)


def numbers(weight, bits):
    """What codes and scales stand for."""
    codes, scales = pack(weight, bits)
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
    return ((codes.float() - 2 ** (bits - 1)) * scales[..., None]).reshape(weight.shape)


@pytest.mark.parametrize("bits", [8, 4])
def test_bytes_are_those_of_onnx_runtimes_own_quantiser(bits):
    weight = torch.randn(48, 96, generator=torch.Generator().manual_seed(0))
    weight[3, 32:64] = 0
    x, y = (helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["n", s]) for n, s in (("x", 96), ("y", 48)))
    constant = numpy_helper.from_array(weight.T.contiguous().numpy(), "w")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"], "product")], "one", [x], [y], [constant])
    config = DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=True, bits=bits)
    quantiser = MatMulNBitsQuantizer(helper.make_model(graph), algo_config=config)
    quantiser.process()
    (node,) = quantiser.model.model.graph.node
    held = {t.name: numpy_helper.to_array(t) for t in quantiser.model.model.graph.initializer}
    codes, scales = pack(weight, bits)
    assert node.op_type == "MatMulNBits"
    assert np.array_equal(held[node.input[1]], codes.numpy())
    assert np.array_equal(held[node.input[2]].reshape(scales.shape), scales.numpy())
    step = scales.abs().repeat_interleave(32, -1)  # the largest of the other sign may be cut by one step more
    assert ((numbers(weight, bits) - weight).abs() <= step * 1.001).all()


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def built(request, lab, tmp_path_factory):
    """Two tasks of several techniques over a base in fewer bits."""
    kind, weights = request.param
    compiled = operate(lab, kind, weights, {"lora": {"rank": 4}}, {"bitfit": {}} if kind == "bert" else {"ia3": {}})
    for seed, task in enumerate("ab"):
        lab.move(compiled.model(task).eval(), seed=seed)
    folder = compiled.save(tmp_path_factory.mktemp(kind) / "build")
    with surgeon.Session(folder, threads=1) as session:
        yield kind, weights, compiled, folder, session


def test_every_matrix_of_the_base_is_held_so_and_every_delta_is_an_input(built, tmp_path):
    kind, weights, compiled, folder, _ = built
    path = shutil.copytree(folder, tmp_path / "copy") / "model.onnx"
    onnx.checker.check_model(str(path))
    model = onnx.load(path)
    initializers = {t.name: t for t in model.graph.initializer}
    overridable = {i.name for i in model.graph.input} & set(initializers)
    assert overridable == set(compiled.program.ledger.deltas)
    found = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    assert len(found) == {"bert": 2 * 6 + 1, "llama": 2 * 7 + 1}[kind]
    others = [node.input[1] for node in model.graph.node if node.op_type in ("MatMul", "Gemm")]
    assert not set(others) & (set(initializers) - overridable)
    for node in found:
        facts = {a.name: a.i for a in node.attribute}
        codes, scales = (numpy_helper.to_array(initializers[name]) for name in node.input[1:])
        assert facts["bits"] == BITS[weights]
        assert codes.shape == (facts["N"], facts["K"] // 32, 32 * facts["bits"] // 8)
        assert scales.shape == codes.shape[:2]
        name = node.input[1].removeprefix("program.").removesuffix(f".{weights}")
        assert np.array_equal(codes, pack(compiled.program.tensor(name), facts["bits"])[0].numpy())
        assert f"program.{name}" not in initializers


def test_answers_are_those_of_the_rounded_base_whatever_the_task_and_shape(built, lab):
    kind, weights, compiled, _, session = built
    base = lab.apart(lab.base(kind))
    with torch.no_grad():
        for name in held(compiled):
            base.get_parameter(name).copy_(numbers(compiled.program.tensor(name), BITS[weights]))
    rounded = operate(lab, base, "float32", *compiled.spec.model_dump(mode="json")["surgery"])
    for task in "ab":
        rounded.model(task).eval().load_state_dict(compiled.model(task).state_dict())
    for sizes in ((3, 11, 4), (1, 5, 0), (2, 20, 3)):
        fed = lab.feed(base, sizes[0], sizes[1], pad=sizes[2])
        first = {}
        for task in ("a", "b", None, "a", "b"):
            found = session.run({n: t.numpy() for n, t in fed.items()}, task)["logits"]
            assert np.array_equal(found, first.setdefault(task, found))
            found = torch.from_numpy(found)
            with torch.no_grad():
                exact, wanted = ((c.model(task) if task else c.base.model)(**fed).logits for c in (compiled, rounded))
            assert lab.gap(found, wanted) <= ROUNDING
            assert 1e-4 < lab.gap(found, exact) <= BOUNDS[weights]
        assert not np.array_equal(first["a"], first["b"])


def held(compiled):
    return set(products(compiled.program.graph, compiled.program).values())


def test_ranks_are_free_and_tasks_trained_over_fp32_run_on_it(built, lab, tmp_path):
    kind, weights, compiled, _, session = built
    fed = lab.feed(lab.base(kind), 2, 9, pad=2)
    assert compiled.program.fingerprint == compiled.base.fingerprint
    before = {name: tensor.clone() for name, tensor in compiled.model("a").state_dict().items()}
    for rank in (0, 1, 9):
        model = lab.resize(compiled.model("a"), rank=rank)
        with torch.no_grad():
            for tensor in lab.own(model).values():
                tensor.mul_(0.2)
        arrays = {n: t.detach().contiguous().numpy() for n, t in model.deployed().items()}
        write_adapter(tmp_path / "a.onnx_adapter", arrays, compiled.base.fingerprint)
        session.add_task(tmp_path / "a.onnx_adapter", "fp32", replace=True)
        found = session.run({n: t.numpy() for n, t in fed.items()}, "fp32")["logits"]
        with torch.no_grad():
            assert lab.gap(torch.from_numpy(found), model(**fed).logits) <= BOUNDS[weights]
    compiled.model("a").load_state_dict(before)


def test_the_build_says_so_loads_and_verifies(tmp_path):
    config = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config |= {"intermediate_size": 64, "vocab_size": 100, "max_position_embeddings": 64}
    spec = {"base": {"config": config}, "surgery": [{"lora": {"rank": 2}}], "tasks": {"a": {"labels": 3}}}
    exported = {**spec, "export": {"weights": "int8"}}
    compiled = surgeon.compile(exported, out=tmp_path / "build")
    assert compiled.plan.weights == surgeon.compile(exported, weights=False).plan.to_dict()["weights"] == "int8"
    with surgeon.Session(tmp_path / "build") as session:
        assert session.manifest.weights == "int8"
        assert session.manifest.base.fingerprint == compiled.base.fingerprint
    assert surgeon.load(tmp_path / "build").spec.export.weights == "int8"
    found = audit(tmp_path / "build")
    assert (found.weights, found.tolerance, found.compared) == ("int8", None, True)
    assert all(0 < task.difference < 0.05 for task in found.tasks)


def test_what_is_no_number_is_still_a_difference():
    for difference, tolerance in ((float("nan"), None), (float("inf"), None), (1.0, 1e-4)):
        found = Audit(1, True, "int8", None, tolerance, (AuditedTask("a", 1, difference),))
        with pytest.raises(BuildError, match="different answers"):
            _require_agreement(found, "build")


def test_the_cache_keeps_the_forms_apart(lab):
    program = lab.operate(lab.base("bert"), {"lora": {"rank": 2}}).program
    assert len({cache_key(program, "", 20, weights) for weights in ("float32", "int8", "int4")}) == 3


def test_only_matrices_of_the_base_that_nothing_else_reads_are_held_so(lab):
    """Not VeRA's shared matrices, not a head tied to the embedding, not a weight in NF4, not one that is trained."""
    vera = operators(convert(lab.operate(lab.base("bert"), {"vera": {"rank": 32}}).program, 20, "int8"))
    assert vera["MatMulNBits"] == 2 * 6 + 2
    gpt2 = lab.operate(lab.base("gpt2"), {"lora": {"rank": 2}})
    assert "transformer.wte.weight" not in held(gpt2)
    assert len(held(gpt2)) == 2 * 4
    four = lab.operate(lab.base("bert"), {"qlora": {"rank": 2}})
    assert held(four) == {"bert.pooler.dense.weight", "classifier.weight"}


def test_what_cannot_be_held_so_is_told(lab, tiny, tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_text("base: {model: x}\nexport:\n  weights: int3\n")
    with pytest.raises(SpecError, match=r"spec.yaml:3:12: export.weights cannot be .int3.(?s:.*)int4"):
        read_spec(path)
    path.write_text("surgery: [full: {}]\ntasks: {a: {labels: 3}}\nexport:\n  weights: int8\n")
    with pytest.raises(SpecError, match=r"(?s)spec.yaml:4:12.*no matrix to hold in int8"):
        surgeon.compile(path, lab.base("bert"))
    path.write_text("surgery: [lora: {}]\ntasks: {a: {}}\nexport:\n  weights: int8\n")
    with pytest.raises(SpecError, match=r"(?s)spec.yaml:4:12.*float16"):
        surgeon.compile(path, tiny("bert").half())
    odd = tiny("bert", hidden_size=24, intermediate_size=40)
    with pytest.raises(SpecError, match="no matrix to hold"):
        surgeon.compile(path, odd)


def test_a_weight_that_is_no_number_is_told(lab):
    compiled = lab.operate(lab.apart(lab.base("bert")), {"lora": {}})
    with torch.no_grad():
        compiled.program.tensor("bert.encoder.layer.1.output.dense.weight")[2, 3] = float("nan")
    with pytest.raises(BaseError, match="weight holds NaN"):
        convert(compiled.program, 20, "int8")


def test_what_is_in_nf4_stays_and_the_rest_is_held_so(lab, tmp_path):
    """GPT-2's `[in, out]` weights beside it."""
    compiled = operate(lab, "gpt2", "int8", {"qlora": {"rank": 2, "quantise": "ffn", "where": "attention"}})
    lab.move(compiled.model("a").eval())
    folder = compiled.save(tmp_path / "build")
    model = onnx.load(shutil.copytree(folder, tmp_path / "copy") / "model.onnx", load_external_data=False)
    found = Counter(node.op_type for node in model.graph.node)
    assert (found["MatMulBnb4"], found["MatMulNBits"]) == (2 * 2, 2 * 2)
    fed = lab.feed(lab.base("gpt2"), 2, 9, pad=2)
    with surgeon.Session(folder, threads=1) as session, torch.no_grad():
        found = session.run({n: t.numpy() for n, t in fed.items()}, "a")["logits"]
        assert lab.gap(torch.from_numpy(found), compiled.model("a")(**fed).logits) <= BOUNDS["int8"]
