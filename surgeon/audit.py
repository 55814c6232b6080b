"""Checks a finished build: files against the manifest, tasks against the ledger, PyTorch against ONNX Runtime."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from surgeon.errors import BuildError
from surgeon.runtime import Manifest, Session
from surgeon.runtime.files import check_files
from surgeon.runtime.taskfile import Array

if TYPE_CHECKING:
    from surgeon.compiler import Compiled

TOLERANCE = 1e-4
FOLLOWED = 3
"""Tokens of a decoder's text that follow one by one."""
SIZES = {"batch": 3, "sequence": 11, "decoder_sequence": 6, "samples": 4100, "frames": 23}


@dataclass(frozen=True)
class AuditedTask:
    """A task, or with no name the base: its parameters, and the largest difference relative to the largest output."""

    name: str | None
    parameters: int
    difference: float | None


@dataclass(frozen=True)
class Audit:
    """What was checked, all of it right; without a tolerance where the ONNX model holds its base in fewer bits."""

    files: int
    compared: bool
    weights: str
    checkpoint: str | None
    """The folder of files that the ONNX model reads and that are no part of the build."""
    tolerance: float | None
    tasks: tuple[AuditedTask, ...]

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def audit(build: str | Path, *, compare: bool = True, progress: Callable[[str], None] | None = None) -> Audit:
    """Check a build. PyTorch is compared where `compare` says so and it is installed, which needs the base.

    A base in fewer bits differs by nature: how far is told, and only NaN is an error. Raises BuildError for files that
    are not the manifest's or answers that differ, DeltaError for tensors that do not fit.
    """
    report = progress or (lambda _: None)
    report("reading every file")
    with Session(build) as session:
        check_files(build, session.manifest)
        compared = compare and _has_torch()
        differences: dict[str | None, float] = {}
        if compared:
            from surgeon.compiler import load

            compiled = load(build, progress=report)
            for task in (None, *session.tasks):
                report(f"comparing {task or 'the base'}")
                differences[task] = difference(compiled, session, task)
        parameters = {None: session.manifest.base.parameters} | {n: t.parameters for n, t in session.tasks.items()}
    found = Audit(
        files=len(session.manifest.every_file()),
        compared=compared,
        weights=session.manifest.weights,
        checkpoint=None if session.manifest.checkpoint is None else session.manifest.checkpoint.folder,
        tolerance=None if session.manifest.approximate else TOLERANCE,
        tasks=tuple(AuditedTask(name, count, differences.get(name)) for name, count in parameters.items()),
    )
    _require_agreement(found, build)
    return found


def _has_torch() -> bool:
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError:
        return False
    return True


def difference(compiled: Compiled, session: Session, task: str | None) -> float:
    """The largest difference of PyTorch and ONNX Runtime, relative to the largest output where that is above one.

    All graphs are run: those of a build with the mode `mixed`, and those that write texts, whose tokens are given.
    """
    import torch
    from torch.func import functional_call

    from surgeon.inputs import vocabulary

    inputs = inputs_for(session.manifest, vocabulary(compiled.base.model))
    model = compiled.base.model if task is None else compiled.model(task)
    training = model.training
    held = {name: compiled.program.tensor(name) for name in compiled.program.stored} if task is None else {}
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    with torch.no_grad():
        expected = functional_call(model.eval(), held, (), tensors)
    model.train(training)
    gaps = []
    for found in _every_graphs(session, inputs, task):
        for name, array in found.items():
            reference = expected[name].detach().float().numpy()
            if session.manifest.generation is not None:  # they answer for the last tokens
                reference = reference[:, -array.shape[1] :]
            gaps.append(float(np.abs(array - reference).max()) / max(1.0, float(np.abs(reference).max())))
    return float(np.max(gaps))  # a NaN among them counts, to `max` it would not


def _every_graphs(session: Session, inputs: dict[str, Array], task: str | None) -> Iterator[dict[str, Array]]:
    """A batch of one task by the graphs of one, and by those of a task a row where the build has them."""
    each = [task] * len(next(iter(inputs.values())))
    yield session.run(inputs, task)
    if "mixed" in session.manifest.modes:
        rows = session.run(inputs, each)
        yield {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    if session.manifest.generation is not None:
        prompts, texts = _cut(session.manifest, inputs)
        yield {"logits": session.texts.follow(prompts, texts, task)}
        if "mixed" in session.manifest.modes:
            yield {"logits": session.texts.follow(prompts, texts, each)}


def _cut(manifest: Manifest, inputs: dict[str, Array]) -> tuple[list[list[int]], list[list[int]]]:
    """What is given at once, and what follows token by token."""
    ids = inputs["input_ids"]
    if manifest.goes_on:
        return ids[:, :-FOLLOWED].tolist(), ids[:, -FOLLOWED:].tolist()
    rows = zip(ids, inputs["attention_mask"], strict=True)
    return [row[mask == 1].tolist() for row, mask in rows], inputs["decoder_input_ids"][:, 1:].tolist()


def inputs_for(manifest: Manifest, vocabulary: int) -> dict[str, Array]:
    """Inputs of another shape than traced, the last row padded on the right where there is a mask.

    A graph that writes texts answers for the last token, which must not be padding.
    """
    rng = np.random.default_rng(0)
    inputs: dict[str, Array] = {}
    for port in manifest.inputs:
        shape = [SIZES[axis] if isinstance(axis, str) else axis for axis in port.axes]
        if port.fill is None and np.dtype(port.dtype).kind == "f":
            inputs[port.name] = rng.standard_normal(shape).astype(port.dtype)
        elif port.fill is None:
            inputs[port.name] = rng.integers(min(3, vocabulary - 1), vocabulary, shape)
        else:
            inputs[port.name] = np.full(shape, port.fill, dtype=port.dtype)
        if port.fill == 1 and not manifest.goes_on:
            inputs[port.name][-1, -3:] = 0
    if manifest.generation is not None and manifest.generation.source is not None:
        inputs["decoder_input_ids"][:, 0] = manifest.generation.source.start
    return inputs


def _require_agreement(found: Audit, build: str | Path) -> None:
    # Written so that a NaN counts as a difference.
    limit = math.inf if found.tolerance is None else found.tolerance
    wrong = [
        t for t in found.tasks if t.difference is not None and not (t.difference <= limit and t.difference < math.inf)
    ]
    if wrong:
        raise BuildError(
            "PyTorch and ONNX Runtime give different answers",
            where=str(build),
            there_is=[f"{task.name or 'the base'}: {task.difference:.2g}" for task in wrong],
            try_=f"compile again; a build of this machine agrees to {TOLERANCE:g}",
        )
