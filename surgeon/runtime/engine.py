"""The base on ONNX Runtime: one inference session of the verified model, whose inputs are those the manifest lists."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import onnxruntime

from surgeon.errors import BuildError, shorten
from surgeon.runtime.fields import REBUILD
from surgeon.runtime.files import damaged, read_file
from surgeon.runtime.manifest import (
    ENCODER,
    MIXED,
    MIXED_DECODER,
    MIXED_ENCODER,
    MODEL,
    Delta,
    Manifest,
    Port,
)
from surgeon.runtime.ort import ORT_ERRORS

Fusions = Literal["all"] | Sequence[str]
Provider = str | tuple[str, dict[str, Any]]

ERROR_ONLY, WARNING = 3, 2
PER_ROW = (Port("rows", "int64", ("rows",)), Port("task_ids", "int64", ("rows",)))
"""Of every row the number of its text, and the place of its task in the bank."""
ORT_TYPES = {"tensor(float)": "float32", "tensor(double)": "float64"}


def open_model(
    build: Path,
    manifest: Manifest,
    *,
    threads: int | None = None,
    providers: Sequence[Provider] | None = None,
    verify: bool = True,
    fusions: Fusions = "all",
    graph: str = MODEL,
) -> onnxruntime.InferenceSession:
    """Load the model, or another graph over its weights.

    With `verify`, exactly the bytes that were hashed are used, weights included: ONNX Runtime would map the weights'
    file into memory, where a later change of it changes answers and a cut kills the process. A checkpoint outside of
    the build is mapped in any case.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = ERROR_ONLY  # it warns once per delta, that a delta is not constant
    if threads is not None:
        options.intra_op_num_threads = threads
    if graph not in manifest.files:
        raise damaged(build, [f"{graph} is not listed"])
    source: str | bytes = str(build / graph)
    weights: list[bytes] = []
    if verify:
        source = read_file(build, graph, manifest.files[graph])
        external = list(manifest.external)
        weights = [read_file(build, name, manifest.files[name]) for name in external]
        if external:
            options.add_external_initializers_from_files_in_memory(external, weights, [len(data) for data in weights])
    names, mapped = ([], []) if manifest.checkpoint is None else manifest.checkpoint.read(graph, verify=verify)
    if names:
        options.add_external_initializers(names, mapped)
    try:
        session = onnxruntime.InferenceSession(
            source,
            options,
            providers=list(providers or ["CPUExecutionProvider"]),
            disabled_optimizers=[] if fusions == "all" else list(fusions),
        )
    except ORT_ERRORS as error:
        raise BuildError(
            f"ONNX Runtime {onnxruntime.__version__} cannot load the model: {str(error).strip()}", where=str(build)
        ) from error
    session.mapped = mapped  # ONNX Runtime reads them as long as the session lives
    del weights  # alive until here: ONNX Runtime copies them while it builds the session
    _compare(session, build, *_ports(manifest, graph))
    return session


def _ports(manifest: Manifest, graph: str) -> tuple[Sequence[Port], Sequence[Port], Sequence[Port | Delta]]:
    """The inputs, outputs and deltas that the manifest lists for a graph."""
    whole, generation = manifest.inputs, manifest.generation
    if graph == MIXED:
        past = () if not manifest.goes_on else tuple(tensor.past for tensor in generation.cache)  # type: ignore[union-attr]
        return (*whole, *past, *(PER_ROW[1:] if past else PER_ROW)), manifest.mixed, [*_banks(manifest)]
    if generation is None:
        return whole, manifest.outputs, manifest.deltas
    past, source = tuple(tensor.past for tensor in generation.cache), generation.source
    if source is None:
        return (*whole, *past), manifest.outputs, manifest.deltas
    if graph == MODEL:
        return whole, manifest.outputs, manifest.deltas
    several = graph in {MIXED_ENCODER, MIXED_DECODER}
    deltas = [*_banks(manifest)] if several else manifest.deltas
    text = tuple(port for port in whole if port.name.startswith("decoder_"))
    if graph in {ENCODER, MIXED_ENCODER}:
        own = tuple(port for port in whole if port not in text)
        return (*own, *(PER_ROW if several else ())), source.bridge, deltas
    present = tuple(Port(tensor.present, tensor.past.dtype, tensor.past.axes) for tensor in generation.cache)
    logits = tuple(port for port in manifest.outputs if port.name == "logits")
    return (*text, *source.bridge, *past, *(PER_ROW[1:] if several else ())), (*logits, *present), deltas


def _banks(manifest: Manifest) -> Iterator[Port]:
    """The deltas of many tasks."""
    for delta in manifest.deltas:
        yield Port(delta.name, delta.dtype, ("tasks", *delta.axes))
    for name, symbol in manifest.counted.items():
        yield Port(name, "int64", ("tasks", symbol))


def _compare(
    session: onnxruntime.InferenceSession,
    build: Path,
    inputs: Sequence[Port],
    outputs: Sequence[Port],
    deltas: Sequence[Port | Delta],
) -> None:
    """Are the model's inputs, outputs and deltas the manifest's? A pass that drops the deltas from the graph's inputs
    leaves a model that loads and ignores every task.
    """
    pairs = (
        ("inputs", session.get_inputs(), inputs, _sized),
        ("outputs", session.get_outputs(), outputs, _typed),
        ("deltas", session.get_overridable_initializers(), deltas, _declared),
    )
    for kind, found, listed, form in pairs:
        have = {form(node.name, _dtype(node.type), node.shape) for node in found}
        want = {form(port.name, port.dtype, port.axes) for port in listed}
        if have != want:
            raise BuildError(
                f"the model's {kind} are not those of the manifest",
                where=str(build),
                there_is=f"only in the model: {shorten(sorted(have - want)) or 'none'}; "
                f"only in the manifest: {shorten(sorted(want - have)) or 'none'}",
                try_=REBUILD,
            )


def _declared(name: str, dtype: str, axes: Sequence[str | int]) -> str:
    return f"{name} {dtype}[{', '.join(str(axis) for axis in axes)}]"


def _sized(name: str, dtype: str, axes: Sequence[str | int | None]) -> str:
    """With the sizes that are fixed; how the exporter called the others is of no weight to a caller."""
    return _declared(name, dtype, [axis if isinstance(axis, int) else "?" for axis in axes])


def _typed(name: str, dtype: str, _: Sequence[str | int | None]) -> str:
    return f"{name} {dtype}"


def _dtype(ort_type: str) -> str:
    return ORT_TYPES.get(ort_type, ort_type.removeprefix("tensor(").removesuffix(")"))
