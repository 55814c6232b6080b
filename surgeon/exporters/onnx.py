"""Back end: the rewritten graph as ONNX, its deltas lifted to named inputs with defaults.

In ONNX Runtime such an input is an overridable initializer: the model runs as it is and is the base; an adapter file
swaps the task per call. Lifting happens before the conversion, so that no optimiser can fold or rename a delta.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.func import functional_call

from surgeon.errors import InvariantError, TraceError
from surgeon.exporters.quantise import quantised
from surgeon.ledger import Delta
from surgeon.module import switchable
from surgeon.program import Program
from surgeon.trace import sample_inputs

OUTPUTS = ("logits", "start_logits", "end_logits", "last_hidden_state")


class Lifted(nn.Module):
    """The program as a function of inputs and deltas."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__()
        self.program = graph

    def forward(self, inputs: dict[str, Tensor], deltas: dict[str, Tensor]) -> dict[str, Tensor]:
        output = functional_call(self.program, deltas, (), inputs)
        return {name: output[name] for name in OUTPUTS if output.get(name) is not None}


class OnnxExporter:
    """Writes `model.onnx` and `model.onnx.data`."""

    name = "onnx"

    def export(self, program: Program, folder: Path, *, opset: int = 20, weights: str = "float32") -> ir.Model:
        """Convert and save into `folder`; returns the ONNX model.

        Raises TraceError where the rewritten graph cannot be converted, InvariantError where a delta got lost.
        """
        model = convert(program, opset, weights)
        path = folder / "model.onnx"
        ir.save(model, path, external_data="model.onnx.data")
        onnx.checker.check_model(str(path))
        return model


def convert(program: Program, opset: int, weights: str = "float32") -> ir.Model:
    """The program as an ONNX model in memory."""
    deltas = program.ledger.deltas
    graph_module = quantised(switchable(program.graph_module).eval(), program, weights)
    module = Lifted(translated(graph_module, program.operators))
    vocabulary = max((e.rows for e in program.anatomy.embeddings if e.role == "embedding.token"), default=100)
    inputs = sample_inputs(program.inputs, vocabulary, torch.device("cpu"))
    samples = {d.name: d.sample() for d in deltas.values()}
    shapes = {
        "inputs": {i.name: dict.fromkeys(range(len(i.axes)), Dim.DYNAMIC) for i in program.inputs},
        "deltas": {d.name: dict.fromkeys(d.free, Dim.DYNAMIC) for d in deltas.values()},
    }
    # Without gradients in the second step too: attention of a mask that requires them is laid out in another way.
    with quiet(), torch.no_grad():
        try:
            exported = torch.export.export(
                module,
                (),
                {"inputs": inputs, "deltas": samples},
                dynamic_shapes=shapes,
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=True,
            )
            converted = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=opset,
                optimize=True,
                input_names=[*inputs, *deltas],
                output_names=list(exported.call_spec.out_spec.context),
                verbose=False,
            )
        except Exception as error:
            reason = str(error.__cause__ or error).strip().splitlines()[0]  # the exporter's own is a list of steps
            raise TraceError(f"the rewritten graph does not convert to ONNX: {reason}") from error
    assert converted is not None
    model = converted.model
    name_axes(model, {i.name: i.axes for i in program.inputs}, deltas)
    set_defaults(model, deltas)
    common.ClearMetadataAndDocStringPass()(model)
    model.metadata_props.clear()
    check_overridable(model, program)
    return model


def translated(
    graph_module: fx.GraphModule, operators: Mapping[Any, Callable[..., Tensor] | None]
) -> fx.GraphModule:
    """Operators that torch does not have, in the way of the exporter; those of constants computed here.

    What is computed takes the place and the name of its first constant, which nobody else reads then.
    """
    done: dict[str, Tensor] = {}
    for node in list(graph_module.graph.nodes):
        if node.op != "call_function" or node.target not in operators:
            continue
        exported = operators[node.target]
        if exported is not None:
            node.target = exported
            continue
        names = [operand.target for operand in node.args]
        if names[0] not in done:
            done[names[0]] = node.target(*(_attribute(graph_module, name) for name in names))
        with graph_module.graph.inserting_before(node):
            node.replace_all_uses_with(graph_module.graph.get_attr(names[0]))
        graph_module.graph.erase_node(node)
    for name, tensor in done.items():
        owner, _, leaf = name.rpartition(".")
        setattr(graph_module.get_submodule(owner), leaf, tensor)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    return graph_module


def _attribute(graph_module: fx.GraphModule, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    tensor: Tensor = getattr(graph_module.get_submodule(owner), leaf)
    return tensor


def set_defaults(model: ir.Model, deltas: Mapping[str, Delta]) -> None:
    """Give every delta input its default as initializer of the same name."""
    inputs = {str(value.name): value for value in model.graph.inputs}
    for delta in deltas.values():
        value = inputs[delta.name]
        value.const_value = ir.tensor(delta.default.contiguous(), name=delta.name)
        model.graph.initializers[delta.name] = value


def name_axes(model: ir.Model, axes: Mapping[str, tuple[str, ...]], deltas: Mapping[str, Delta]) -> None:
    """Rename the exporter's symbols (`s30`) to the ledger's and the inputs' own, everywhere alike."""
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        name = str(value.name)
        assert value.shape is not None
        wanted = dict(enumerate(axes[name])) if name in axes else dict(deltas[name].free)
        for axis, word in wanted.items():
            symbol = value.shape[axis]
            if isinstance(symbol, ir.SymbolicDim):
                names.setdefault(str(symbol.value), word)
        value.shape = ir.Shape([wanted.get(axis, dim) for axis, dim in enumerate(value.shape)])
    for value in _values(model):
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(dim, names) for dim in value.shape])


def _renamed(dim: int | ir.SymbolicDim, names: Mapping[str, str]) -> Any:
    if isinstance(dim, int) or dim.value is None:
        return dim
    return names.get(str(dim.value), str(dim.value))


def _values(model: ir.Model) -> Iterator[ir.Value]:
    yield from model.graph.outputs
    for node in model.graph:
        yield from (o for o in node.outputs if not o.is_graph_output())


def check_overridable(model: ir.Model, program: Program) -> None:
    """Raise InvariantError unless the overridable inputs are exactly the ledger's deltas."""
    found = {str(v.name) for v in model.graph.inputs if v.name in model.graph.initializers}
    plain = {str(v.name) for v in model.graph.inputs} - found
    if found != set(program.ledger.deltas) or plain != {i.name for i in program.inputs}:
        raise InvariantError("the ONNX graph's inputs are not the ledger's", there_is=sorted(found | plain))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporters' progress prints and warnings to themselves; what fails is raised."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
