"""What a task lacks of droppable deltas is not computed: it stands behind a condition of the graph."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

import surgeon
from surgeon.exporters.onnx import convert
from surgeon.mixed import mixed
from surgeon.runtime.taskfile import write_adapter
from surgeon.starts import zeros

TECHNIQUES = {
    "houlsby": {"adapter": {"bottleneck": 5}},
    "pfeiffer": {"adapter": {"bottleneck": 5, "placement": "pfeiffer"}},
    "parallel": {"adapter": {"bottleneck": 5, "placement": "parallel"}},
    "fusion": {"fusion": {"of": 3, "bottleneck": 5}},
    "compacter": {"compacter": {"bottleneck": 4}},
}
KINDS = ["bert", "albert", "llama", "gpt2", "t5"]
OFTEN = {("houlsby", "albert"), ("houlsby", "gpt2"), ("pfeiffer", "bert"), ("fusion", "llama"), ("compacter", "t5")}
CASES = [
    pytest.param(technique, kind, marks=() if (technique, kind) in OFTEN else pytest.mark.sweep)
    for technique in TECHNIQUES
    for kind in KINDS
]
SMALL = {"Size", "Cast", "ReduceL1", "Gather", "Transpose"}
"""Operators on deltas alone, which know no text."""


def branches(model):
    """The conditional nodes of a graph."""
    return [node for node in model.graph if node.op_type == "If"]


@pytest.mark.parametrize(("technique", "kind"), CASES)
def test_every_adapted_join_is_a_branch_and_nothing_else_computes_with_its_deltas(technique, kind, lab):
    program = lab.operate(lab.base(kind), TECHNIQUES[technique], {"lora": {"rank": 2}}).program
    joins = sum(_droppable(program, change.deltas) for change in program._changes)
    assert joins
    for of in (program, mixed(program)):
        model = convert(of, 20, masks=program)
        assert len(branches(model)) == joins
        droppable = [value for value in model.graph.inputs if _droppable(of, [value.name])]
        assert droppable
        outside = set(model.graph)
        assert {node.op_type for value in droppable for node in value.consumers() if node in outside} <= SMALL


def _droppable(program, names):
    return any(name in program.ledger.deltas and program.ledger.deltas[name].droppable for name in names)


@pytest.mark.parametrize("form", [lambda b, g: b * (1 + g), lambda b, g: b + g], ids=["factor", "summand"])
def test_a_sublayer_that_is_there_without_the_deltas_is_no_branch(form, lab):
    program = lab.operate(lab.base("bert"), {"lora": {"rank": 2}}).program
    join = next(join for join in program.anatomy.joins if join.role == "residual.ffn")
    with program.author("test", "surgery[1]"):
        delta = program.delta(join, "gate", (join.width,), zeros, droppable=True)
        program.replace_operand([join.add], join.branch, form, (delta,))
    assert branches(convert(program, 20)) == []


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_onnx_runtime_computes_nothing_for_what_is_dropped(technique, lab, tmp_path):
    """By its own profile, which lists every operator that ran."""
    compiled = lab.operate(lab.base("bert", num_hidden_layers=3), TECHNIQUES[technique], tasks={"a": {"labels": 2}})
    lab.move(compiled.model("a")).eval()
    build = compiled.save(tmp_path / "build")
    fed = {n: t.numpy() for n, t in lab.feed(compiled.base.model, 2, 7).items()}
    fed["token_type_ids"] = 0 * fed["input_ids"]
    model, joins = compiled.model("a"), len(branches(convert(compiled.program, 20)))
    ran = {}
    for layers in (None, 0, 2):
        deltas = {}
        if layers is not None:
            model.drop(layers)
            deltas = {n: t.detach().numpy() for n, t in model.deployed().items()}
        ran[layers] = _products(build, fed, deltas, tmp_path)
    model.drop()
    each = (ran[0] - ran[None]) // joins
    assert each >= 2, "an adapter is two products at least"
    assert ran[2] == ran[None] + each * joins // 3


def _products(build, fed, deltas, folder):
    """How many products ONNX Runtime computes of these inputs."""
    options = ort.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(folder / "profile")
    session = ort.InferenceSession(build / "model.onnx", options, providers=["CPUExecutionProvider"])
    session.run(None, {**fed, **deltas})
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    kernels = [e for e in events if e["cat"] == "Node" and e["name"].endswith("_kernel_time")]
    return sum("MatMul" in e["args"]["op_name"] or e["args"]["op_name"] == "Gemm" for e in kernels)


def test_a_bias_without_a_bottleneck_still_acts(lab, tmp_path):
    """Its deltas have no size that tells it from the base."""
    compiled = lab.operate(lab.base("bert"), TECHNIQUES["houlsby"], tasks={"a": {"labels": 2}})
    lab.move(compiled.model("a")).eval()
    build = compiled.save(tmp_path / "build")
    fed = {n: t.numpy() for n, t in lab.feed(compiled.base.model, 2, 7).items()}
    tensors = {n: t.detach().contiguous().numpy() for n, t in compiled.model("a").deployed().items()}
    for name, delta in compiled.program.ledger.deltas.items():
        if delta.droppable and delta.free:
            tensors[name] = delta.default.numpy()
    without = {n: 0 * t if n.endswith("adapter.up.bias") else t for n, t in tensors.items()}
    with surgeon.Session(build, threads=1) as session:
        answers = []
        for name, own in (("with", tensors), ("without", without)):
            file = tmp_path / f"{name}.onnx_adapter"
            write_adapter(file, own, compiled.base.fingerprint)
            session.add_task(file, name)
            answers.append(session.run(fed, name)["logits"])
    assert not np.allclose(*answers)
