"""Commands around a build: make one, put weights into it, check it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from surgeon.cli.screen import Json, emit, say, size, steps, table

Build = Annotated[Path, typer.Argument(help="The directory that `surgeon compile` wrote.")]
Task = Annotated[str, typer.Option("--task", "-t", help="The task, as the spec names it.")]


def compile_(
    spec: Annotated[Path, typer.Argument(help="The spec.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The build directory to write: absent or empty.")],
    json: Json = False,
) -> None:
    """Compile a spec into a build: one ONNX model, and the weights of every task beside it.

    The build appears whole or not at all. Fresh tasks are untrained: `surgeon train` is next.

    Example: `surgeon compile spec.yaml -o build`
    """
    from surgeon.compiler import compile

    began = time.perf_counter()
    with steps(silent=json) as progress:
        compiled = compile(spec, out=out, progress=progress)
    found, seconds = compiled.plan, time.perf_counter() - began
    if json:
        answer = {"build": str(out), "tasks": list(compiled.tasks), "seconds": round(seconds, 3)}
        emit({**answer, "parameters": found.parameters, "bytes": found.bytes, "by_technique": found.by_technique()})
        return
    say(f"{out}: {found.parameters:,} trained parameters a task ({size(found.bytes)})")
    for task in compiled.tasks:
        say(f"  surgeon train {out} --task {task} --data FILE")


def pack(
    build: Build,
    weights: Annotated[Path, typer.Argument(help="Trained weights of the task, as .safetensors.")],
    task: Task,
    json: Json = False,
) -> None:
    """Put weights that were trained elsewhere into a build, in place of the task's present ones.

    Every tensor is checked first; a file that does not fit leaves the build as it is.

    Example: `surgeon pack build --task sentiment sentiment.safetensors`
    """
    from surgeon.compiler import pack_weights

    with steps(silent=json) as progress:
        packed = pack_weights(build, task, weights, progress=progress)
    if json:
        emit({"build": str(build), "task": task, "adapter": packed.adapter, "weights": packed.weights})
    else:
        say(f"{build / packed.adapter}")


def verify(
    build: Build,
    torch: Annotated[
        bool, typer.Option("--torch/--no-torch", help="Compare with PyTorch too, where it is installed.")
    ] = True,
    json: Json = False,
) -> None:
    """Check a build: the hash of every file, every tensor of every task, and PyTorch against ONNX Runtime.

    Example: `surgeon verify build`
    """
    from surgeon.audit import audit
    from surgeon.runtime.manifest import OUTSIDE

    with steps(silent=json) as progress:
        found = audit(build, compare=torch, progress=progress)
    if json:
        emit({"build": str(build), **found.to_dict()})
        return
    table(
        ("task", "#parameters", "#difference"),
        [(task.name or "(the base)", task.parameters, task.difference) for task in found.tasks],
    )
    if not found.compared:
        compared = "PyTorch was not compared"
    elif found.tolerance is None:
        compared = f"ONNX Runtime holds the base in {found.weights}: another base, that far from PyTorch's answers"
    else:
        compared = f"PyTorch and ONNX Runtime agree to {found.tolerance:g}"
    say(f"\n{found.files} files are as the manifest says; {compared}")
    if found.weights in OUTSIDE:
        inside = "the build, under the checkpoint's own names"
        say(f"the base's weights are in {found.checkpoint or inside}")
