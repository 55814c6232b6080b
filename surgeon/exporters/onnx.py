"""Back end: the rewritten graph as ONNX, its deltas lifted to named inputs with defaults.

In ONNX Runtime such an input is an overridable initializer: the model runs as it is and is the base; an adapter file
swaps the task per call. Lifting happens before the conversion, so that no optimiser can fold or rename a delta.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common

from surgeon.errors import InvariantError, TraceError
from surgeon.exporters.exported import exported
from surgeon.exporters.quantise import quantised
from surgeon.exporters.rotary import turned
from surgeon.exporters.shared import shared
from surgeon.ledger import Delta
from surgeon.mixed import mixed
from surgeon.module import copied
from surgeon.program import Program

LIMIT = 2**24
"""Bytes of constants that a graph may hold itself."""
OUTPUTS = ("logits", "start_logits", "end_logits", "last_hidden_state")


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

    def export_mixed(self, program: Program, folder: Path, *, opset: int = 20, weights: str = "float32") -> ir.Model:
        """Convert the graph whose rows have a task each, and save it over the weights that `export` has written.

        Raises CompositionError where rows cannot be told apart, and what `export` raises.
        """
        model = convert(mixed(program), opset, weights)
        _share(model, ir.load(folder / "model.onnx"))
        path = folder / "mixed.onnx"
        ir.save(model, path)
        onnx.checker.check_model(str(path))
        return model


def _share(model: ir.Model, other: ir.Model) -> None:
    """Let tensors of a model be those of another's data file, found by their bytes.

    Raises InvariantError where weights would be written twice.
    """
    held = {
        _digest(v.const_value): v.const_value
        for v in other.graph.initializers.values()
        if isinstance(v.const_value, ir.ExternalTensor)
    }
    again = 0
    for value in model.graph.initializers.values():
        tensor = value.const_value
        assert tensor is not None
        place = held.get(_digest(tensor))
        if place is None:
            again += tensor.nbytes
            continue
        value.const_value = ir.ExternalTensor(
            place.location,
            place.offset,
            place.length,
            tensor.dtype,
            shape=ir.Shape(tensor.numpy().shape),
            name=tensor.name or str(value.name),
            base_dir=place.base_dir,
        )
    if again > LIMIT:
        raise InvariantError(f"the mixed graph would hold {again} bytes of weights that the other does not")


def _digest(tensor: Any) -> tuple[str, bytes]:
    return str(tensor.dtype), hashlib.sha256(tensor.tobytes()).digest()


def convert(program: Program, opset: int, weights: str = "float32") -> ir.Model:
    """The program as an ONNX model in memory."""
    deltas = program.ledger.deltas
    source = quantised(copied(program.graph_module), program, weights)
    if program.shares_cache:
        source = turned(shared(source, program))
    # Without gradients: attention of a mask that requires them is laid out in another way.
    with quiet(), torch.no_grad():
        try:
            function = exported(program, source, (*OUTPUTS, *program.presents))
            converted = torch.onnx.export(
                function,
                dynamo=True,
                opset_version=opset,
                optimize=True,
                input_names=[*(i.name for i in program.inputs), *deltas],
                output_names=list(function.call_spec.out_spec.context),
                verbose=False,
            )
        except TraceError:
            raise
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


def set_defaults(model: ir.Model, deltas: Mapping[str, Delta]) -> None:
    """Give every delta input its default as initializer of the same name."""
    inputs = {str(value.name): value for value in model.graph.inputs}
    for delta in deltas.values():
        value = inputs[delta.name]
        value.const_value = ir.tensor(delta.default.contiguous(), name=delta.name)
        model.graph.initializers[delta.name] = value


def name_axes(model: ir.Model, axes: Mapping[str, tuple[str | int, ...]], deltas: Mapping[str, Delta]) -> None:
    """Rename the exporter's symbols (`s30`) to the ledger's and the inputs' own, everywhere alike."""
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        name = str(value.name)
        assert value.shape is not None
        named = dict(enumerate(axes[name])) if name in axes else dict(deltas[name].free)
        wanted = {axis: word for axis, word in named.items() if isinstance(word, str)}
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
