"""A build as a model of NVIDIA's Triton Inference Server: its repository entry, and what runs there.

Triton's own ONNX Runtime backend feeds a model inputs and nothing else; it can neither select an adapter nor hold a
bank of tasks. So the entry is for Triton's Python backend, around Surgeon's runtime: each row names a task, and
requests that Triton hands over together are answered in mixed batches. That backend's environment needs Surgeon's
runtime; torch is not loaded.

https://github.com/triton-inference-server/python_backend, and `model_config.proto` of Triton's common repository.
"""

from __future__ import annotations

import importlib
import json
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from surgeon.errors import BuildError, SpecError
from surgeon.runtime import Manifest, Session, read_manifest
from surgeon.runtime.files import check_files
from surgeon.runtime.manifest import TOKENIZER
from surgeon.runtime.taskfile import Array
from surgeon.runtime.tasks import check_name
from surgeon.server.answering import BASE, LABEL, SCORE, TEXT, Answering, classifies
from surgeon.server.faults import message_of
from surgeon.server.gathering import Job, Outputs
from surgeon.server.limits import Limits

TASK, VERSION, BUILD, CONFIG = "task", "1", "build", "config.pbtxt"
TYPES = {
    "float32": "FP32",
    "float16": "FP16",
    "float64": "FP64",
    "int64": "INT64",
    "int32": "INT32",
    "bool": "BOOL",
}
MODEL = '''"""What Triton's Python backend loads; all of it is Surgeon's."""

from surgeon.server.triton import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''

Rows = slice | Array
Part = tuple[Rows, Job]
"""Rows of a request that name one task."""


def write_entry(build: str | Path, repository: str | Path, name: str, *, threads: int = 1) -> Path:
    """Write the build into a model repository as the model `name`, all of it or nothing; returns the entry's folder.

    Raises SpecError where the repository has such a model, BuildError for a damaged build.
    """
    check_name(name)
    build, entry = Path(build), Path(repository) / name
    manifest = read_manifest(build)
    check_files(build, manifest)
    if entry.exists():
        raise SpecError(f"the repository has a model '{name}' already", where=str(entry), try_="another --name")
    entry.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=entry.parent))
    try:
        (partial / VERSION).mkdir()
        shutil.copytree(build, partial / VERSION / BUILD, ignore=shutil.ignore_patterns(".*"))
        (partial / VERSION / "model.py").write_text(MODEL, encoding="utf-8")
        (partial / CONFIG).write_text(config(manifest, name, threads=threads), encoding="utf-8")
        partial.chmod(0o755)
        partial.replace(entry)
    except OSError as error:
        raise BuildError(f"the entry could not be written: {error.strerror}", where=str(entry)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return entry


def config(manifest: Manifest, name: str, *, threads: int = 1, limits: Limits | None = None) -> str:
    """The entry's `config.pbtxt`: every input is optional, for a request has either ids or texts."""
    limits = limits or Limits()
    inside = set() if manifest.generation is None else {tensor.present for tensor in manifest.generation.cache}
    inputs = [(port.name, TYPES[port.dtype], port.axes[1:]) for port in manifest.inputs]
    inputs += [(TEXT, "STRING", (-1,))] if TOKENIZER in manifest.files else []
    outputs = [(port.name, TYPES[port.dtype], port.axes[1:]) for port in manifest.outputs if port.name not in inside]
    outputs += [(LABEL, "STRING", (1,)), (SCORE, "FP32", (1,))] if classifies(manifest) else []
    blocks = [_port("input", *port, optional=True) for port in [*inputs, (TASK, "STRING", (1,))]]
    blocks += [_port("output", *port) for port in outputs]
    return "\n".join(
        [
            f"name: {json.dumps(name)}",
            'backend: "python"',
            f"max_batch_size: {limits.batch}",
            *blocks,
            f"dynamic_batching {{ max_queue_delay_microseconds: {round(limits.wait * 1e6)} }}",
            "instance_group [ { kind: KIND_CPU count: 1 } ]",
            f'parameters {{ key: "threads" value {{ string_value: "{threads}" }} }}',
            "",
        ]
    )


def _port(kind: str, name: str, dtype: str, axes: Sequence[str | int], *, optional: bool = False) -> str:
    dims = ", ".join(str(axis) if isinstance(axis, int) else "-1" for axis in axes)
    more = " optional: true" + (" allow_ragged_batch: true" if "-1" in dims else "") if optional else ""
    return f"{kind} {{ name: {json.dumps(name)} data_type: TYPE_{dtype} dims: [ {dims} ]{more} }}"


class TritonPythonModel:
    """The model as the Python backend calls it."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the build of this version."""
        self._triton = importlib.import_module("triton_python_backend_utils")
        self._check_arrays()
        options = json.loads(args["model_config"])
        folder = Path(args["model_repository"]) / args["model_version"] / BUILD
        threads = int(options["parameters"]["threads"]["string_value"])
        mixed = "mixed" in read_manifest(folder).modes
        self._session = Session(folder, threads=threads, mixed=mixed)
        self._limits = Limits(wait=0)  # Triton has waited for others already
        self._answering = Answering(self._session, self._limits, resident=64)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer requests that came together. One that fails disturbs no other."""
        admitted = [self._admit(request) for request in requests]
        return [self._answer(parts) for parts in admitted]

    def finalize(self) -> None:
        """Answer what is there, and let go of the build."""
        self._answering.queue.close()
        self._session.close()

    def _check_arrays(self) -> None:
        """A backend older than NumPy 2 hands over the first element of a tensor for all of them. Raises BuildError."""
        given = self._triton.Tensor("seen", np.arange(2))
        seen = self._triton.Tensor.from_dlpack("seen", given.to_dlpack()).as_numpy()
        if list(seen) != [0, 1]:
            raise BuildError(
                f"Triton's Python backend misreads the arrays of NumPy {np.__version__}",
                try_="'numpy<2' in the backend's environment, or a newer Triton",
            )

    def _admit(self, request: Any) -> list[Part] | Exception:
        parts: list[Part] = []
        try:
            inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            named = _tasks(inputs.pop(TASK, None))
            deadline = time.monotonic() + self._limits.deadline
            parts = [
                (rows, self._answering.admit({name: array[rows] for name, array in inputs.items()}, task, deadline))
                for task, rows in named
            ]
            for _, job in parts:
                self._answering.queue.submit(job)
        except Exception as error:
            for _, job in parts:
                job.future.cancel()
            return error
        return parts

    def _answer(self, parts: list[Part] | Exception) -> Any:
        try:
            if isinstance(parts, Exception):
                raise parts
            outputs = _joined([(rows, job.future.result()) for rows, job in parts])
        except Exception as error:
            return self._triton.InferenceResponse(error=self._triton.TritonError(message_of(error)))
        columns = {n: a[:, None] if n in (LABEL, SCORE) else np.ascontiguousarray(a) for n, a in outputs.items()}
        return self._triton.InferenceResponse([self._triton.Tensor(n, array) for n, array in columns.items()])


def _tasks(given: Any) -> list[tuple[str | None, Rows]]:
    """The tasks that the rows of a request name, each with its rows."""
    values = () if given is None else np.ravel(given)
    names = [value.decode(errors="replace") if isinstance(value, bytes) else str(value) for value in values]
    named = {name: None if name == BASE else name for name in names} or {BASE: None}
    if len(named) == 1:
        return [(task, slice(None)) for task in named.values()]
    return [(task, np.flatnonzero([one == name for one in names])) for name, task in named.items()]


def _joined(parts: Sequence[tuple[Rows, Outputs]]) -> Outputs:
    """What the parts of a request were answered, in the order of its rows."""
    if len(parts) == 1:
        return parts[0][1]
    order = np.argsort(np.concatenate([rows for rows, _ in parts]))
    joined = {}
    for name in parts[0][1]:
        arrays = [outputs[name] for _, outputs in parts]
        if len({array.shape[1:] for array in arrays}) > 1:
            raise SpecError(
                f"the rows of the request name tasks whose '{name}' differ in shape",
                there_is=", ".join(str(list(array.shape[1:])) for array in arrays),
                try_="a request for each task; or, of answers for each token, texts of one length",
            )
        joined[name] = np.concatenate(arrays)[order]
    return joined
