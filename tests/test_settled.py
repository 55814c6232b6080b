"""A program is decomposed where ONNX has no operator for a node, and nowhere else."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.onnx._internal.exporter import _decomp, _registration

from surgeon.exporters.onnx import quiet
from surgeon.exporters.settled import Settled

TABLE: Any = _decomp.create_onnx_friendly_decomposition_table(
    set(_decomp.get_onnx_implemented_overloads(_registration.ONNXRegistry.from_torchlib()))
)


class Several(nn.Module):
    """Nodes with no operator of ONNX: of one result and of two, by a free size, and one that is itself an output."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = 1.0 - self.proj(x).narrow(1, 0, x.shape[1] - 1)
        first, second = torch.aminmax(y, dim=-1)
        return first + second, y.flatten(1)


class Written(nn.Module):
    """Writes over a part of a value."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        y[:, 0].add_(1.0)
        return y


class Doubled(nn.Module):
    """Reads the size of its last axis."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x, x]).view(-1, x.shape[-1])


def settled(module: nn.Module, x: Tensor) -> Settled:
    dims = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    made = torch.export.export(module, (x,), dynamic_shapes=(dims,), strict=False)
    parts = made.graph_signature, made.state_dict, made.range_constraints, made.module_call_graph
    return Settled(made.graph_module, made.graph, *parts, constants=made.constants, verifiers=made.verifiers)


def answers(program: ExportedProgram, x: Tensor) -> Any:
    return program.module(check_guards=False)(x)


def test_only_nodes_that_have_no_operator_are_decomposed() -> None:
    module, x, other = Several().eval(), torch.randn(2, 5, 6), torch.randn(3, 9, 6)
    program = settled(module, x)
    before = {str(node.target) for node in program.graph.nodes}
    assert {"aten.narrow.default", "aten.rsub.Scalar", "aten.aminmax.default", "aten.flatten.using_ints"} <= before
    kept = next(node for node in program.graph.nodes if node.target == torch.ops.aten.linear.default)
    done = program.run_decompositions(TABLE)
    assert done is program
    assert kept in done.graph.nodes
    assert not {node.target for node in done.graph.nodes} & TABLE.keys()
    for given in (x, other):
        for found, wanted in zip(answers(done, given), module(given), strict=True):
            assert torch.equal(found, wanted)


def test_a_program_that_writes_in_place_is_retraced_whole() -> None:
    module, x, other = Written(), torch.randn(3, 5), torch.randn(4, 6)
    program = settled(module, x)
    with quiet():
        done = program.run_decompositions(TABLE)
    assert done is not program
    assert not any(node.target in TABLE or _writes(node.target) for node in done.graph.nodes)
    for given in (x, other):
        assert torch.equal(answers(done, given), module(given))


class Squared(nn.Module):
    """Makes a tensor of sizes alone, by an operator that has no counterpart in ONNX."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.eye(x.shape[-1], dtype=x.dtype)


def test_what_is_made_of_sizes_alone_is_decomposed_as_well() -> None:
    x, other = torch.randn(2, 5), torch.randn(3, 9)
    program = settled(Squared(), x)
    assert program.run_decompositions(TABLE) is program
    assert not {node.target for node in program.graph.nodes} & TABLE.keys()
    assert torch.equal(answers(program, other), other)


@pytest.mark.parametrize("way", ["the last axis", "all elements"])
def test_a_size_that_onnxscript_does_not_read_is_put_as_one_that_it_does(way: str) -> None:
    """As a pass or a decomposition writes it down."""
    program, other = settled(Doubled(), torch.randn(2, 5)), torch.randn(3, 9)
    sizes = torch.ops.aten.sym_size.int, torch.ops.aten.sym_numel.default
    (size,) = program.graph.find_nodes(op="call_function", target=sizes[0])
    assert size.args[1] == 1
    if way == "the last axis":
        size.args = (size.args[0], -1)
    else:
        size.target, size.args = sizes[1], size.args[:1]
        size.meta["val"] = size.args[0].meta["val"].numel()
    with quiet():
        converted = torch.onnx.export(program, (), verbose=False)
    session = ort.InferenceSession(converted.model_proto.SerializeToString())
    (found,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
    np.testing.assert_array_equal(found.reshape(6, 9), Doubled()(other).numpy())


class Thirds(nn.Module):
    """Cuts an axis of a free size into three, the last shorter where that does not go."""

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = (piece.sum(1, keepdim=True) for piece in x.chunk(3, 1))
        return torch.cat([first, second * 2, third * 3], 1)


def test_a_free_axis_is_cut_into_pieces() -> None:
    program, other = settled(Thirds(), torch.randn(2, 9)), torch.randn(3, 11)
    with quiet():
        converted = torch.onnx.export(program, (), verbose=False)
    session = ort.InferenceSession(converted.model_proto.SerializeToString())
    (found,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
    np.testing.assert_allclose(found, Thirds()(other), rtol=1e-6)


def _writes(target: Any) -> bool:
    schema = getattr(target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)
