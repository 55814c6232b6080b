"""Back end: the rewritten graph as ONNX, its deltas lifted to named inputs with defaults.

In ONNX Runtime such an input is an overridable initializer: the model runs as it is and is the base; an adapter file
swaps the task per call. Lifting happens before the conversion, so that no optimiser can fold or rename a delta.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnxscript.rewriter.rules.common import slice_split_rule

from surgeon.base.checkpoint import Checkpoint
from surgeon.errors import InvariantError, TraceError
from surgeon.exporters.branches import branched
from surgeon.exporters.experts import translations
from surgeon.exporters.exported import exported
from surgeon.exporters.hiding import hidden
from surgeon.exporters.layout import laid_out
from surgeon.exporters.pairs import paired
from surgeon.exporters.places import DATA, HALVES, Held, held_by, key, outside, place, save
from surgeon.exporters.quantise import quantised
from surgeon.exporters.rotary import turned
from surgeon.exporters.shared import shared
from surgeon.halves import Halves
from surgeon.ledger import Delta
from surgeon.mixed import mixed
from surgeon.module import copied
from surgeon.program import Program
from surgeon.runtime.manifest import DECODER, ENCODER, MIXED_DECODER, MIXED_ENCODER, OUTSIDE

LIMIT = 2**24
"""Bytes of constants that a graph may hold itself."""
OUTPUTS = ("logits", "start_logits", "end_logits", "last_hidden_state")


@dataclass
class OnnxExporter:
    """Writes `model.onnx` and `model.onnx.data`; what the `checkpoint` has may stay in its files."""

    checkpoint: Checkpoint | None = None

    def export(self, program: Program, folder: Path, *, opset: int = 20, weights: str = "copy") -> ir.Model:
        """Convert and save into `folder`; returns the ONNX model.

        Raises TraceError where the rewritten graph cannot be converted, InvariantError where a delta got lost.
        """
        model = convert(program, opset, weights)
        self._place(model, program, weights, self._held if weights in OUTSIDE else {})
        save(model, folder / "model.onnx")
        _check(model, folder / "model.onnx")
        return model

    def export_halves(
        self, both: Halves, folder: Path, *, opset: int = 20, weights: str = "copy", several: bool = False
    ) -> dict[str, ir.Model]:
        """Convert encoder and decoder of a model that generates, and save them over the weights that `export` has
        written; with `several`, also those whose rows have a task each. Each declares all deltas, so that one task file
        is for both.
        """
        models = {}
        bridge = [i.name for i in both.bridge]
        for one, many, half in ((ENCODER, MIXED_ENCODER, both.encoder), (DECODER, MIXED_DECODER, both.decoder)):
            models[one] = convert(half, opset, weights, bridge)
            self._beside(models[one], half, folder / one, weights)
            if several:
                models[many] = convert(mixed(half), opset, weights, bridge, masks=half)
                self._beside(models[many], half, folder / many, weights)
        return models

    def export_mixed(self, program: Program, folder: Path, *, opset: int = 20, weights: str = "copy") -> ir.Model:
        """Convert the graph whose rows have a task each, and save it over the weights that `export` has written.

        Raises CompositionError where rows cannot be told apart, and what `export` raises.
        """
        model = convert(mixed(program), opset, weights, masks=program)
        self._beside(model, program, folder / "mixed.onnx", weights)
        return model

    @cached_property
    def _held(self) -> Held:
        return {} if self.checkpoint is None else held_by(self.checkpoint)

    def _beside(self, model: ir.Model, program: Program, path: Path, weights: str) -> None:
        """Save another graph over the weights of `model.onnx`.

        Raises InvariantError where weights would be written twice.
        """
        written = (v.const_value for v in ir.load(path.with_name("model.onnx")).graph.initializers.values())
        own = {key(t): t for t in written if isinstance(t, ir.ExternalTensor) and str(t.location) == DATA}
        self._place(model, program, weights, {**(self._held if weights in OUTSIDE else {}), **own})
        tensors = [v.const_value for name, v in model.graph.initializers.items() if name not in program.ledger.deltas]
        again = sum(t.nbytes for t in tensors if t is not None and not isinstance(t, ir.ExternalTensor))
        if again > LIMIT:
            raise InvariantError(f"{path.name} would hold {again} bytes of weights that model.onnx does not")
        ir.save(model, path)
        _check(model, path)

    def _place(self, model: ir.Model, program: Program, weights: str, held: Held) -> None:
        """Find the places of weights; those of a checkpoint in half precision stay so, unless they are to be wider."""
        keeps = self.checkpoint is not None and weights in {"copy", *OUTSIDE}
        halves = sorted(self.checkpoint.dtypes & HALVES.keys()) if keeps and self.checkpoint is not None else ()
        place(model, held, halves, but=program.ledger.deltas)


def _check(model: ir.Model, path: Path) -> None:
    """Let ONNX check what was written; it takes no file that is not there, or that has another name too."""
    if not outside(model):
        onnx.checker.check_model(str(path))
        return
    written = onnx.load(path, load_external_data=False)
    graph = written.graph
    external = [tensor for tensor in graph.initializer if tensor.external_data]
    listed = {value.name for value in graph.input}
    for tensor in external:
        graph.initializer.remove(tensor)
        if tensor.name not in listed:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    onnx.checker.check_model(written)


def convert(
    program: Program,
    opset: int,
    weights: str = "copy",
    outputs: Sequence[str] = (),
    *,
    masks: Program | None = None,
) -> ir.Model:
    """The program as an ONNX model in memory, with the `outputs` it has beside the usual ones.

    Of a task a row, `masks` is the program of one task a call, whose masks tell what an attention sees.
    """
    deltas = program.ledger.deltas
    source = paired(quantised(copied(program.graph_module), program, weights))
    if program.shares_cache:
        source = turned(shared(source, program, masks=masks))
    source = hidden(laid_out(source, program, turned=weights not in OUTSIDE))
    # Without gradients: attention of a mask that requires them is laid out in another way.
    with quiet(), torch.no_grad(), _in_linear_time():
        try:
            function = exported(program, source, (*OUTPUTS, *program.presents, *outputs))
            converted = torch.onnx.export(
                function,
                dynamo=True,
                opset_version=opset,
                optimize=True,
                input_names=[*(i.name for i in program.inputs), *deltas],
                output_names=list(function.call_spec.out_spec.context),
                custom_translation_table=translations(function.graph),
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
    branched(model, deltas)
    common.ClearMetadataAndDocStringPass()(model)
    model.metadata_props.clear()
    check_overridable(model, program)
    return model


@contextlib.contextmanager
def _in_linear_time() -> Iterator[None]:
    """Leave out the one rule of onnxscript's that looks at all nodes for each: two slices as a split.

    Of 80 layers it takes longer than the rest of a compile.
    """
    rule: Any = slice_split_rule
    rule.try_rewrite = lambda *_, **__: None
    try:
        yield
    finally:
        del rule.try_rewrite


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
