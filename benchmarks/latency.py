"""Latency of a swapped LoRA task: against the plain ONNX base, and against PEFT in eager PyTorch."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnxruntime as ort
import torch
from peft import LoraConfig, get_peft_model

from benchmarks.bases import BASES, export_stock, inputs, open_model
from benchmarks.measure import THREADS, Section, interleave, milliseconds, ratio
from surgeon import Session, compile

SHAPES = {(1, 32): 60, (1, 128): 40, (8, 128): 12}
SURGERY = [{"lora": {"rank": 16, "alpha": 16, "where": ["attention.query", "attention.value"]}}]
WITHOUT = ("SkipLayerNormFusion",)


def measure() -> Iterator[Section]:
    """One table a base."""
    for name in BASES:
        with tempfile.TemporaryDirectory() as folder:
            yield _base(name, Path(folder))


def _base(name: str, folder: Path) -> Section:
    os.environ["SURGEON_CACHE"] = str(folder / "cache")
    model = open_model(name)
    export_stock(model, folder / "stock.onnx")
    spec = {"base": BASES[name], "surgery": SURGERY, "tasks": {"a": {"labels": 2}, "b": {"labels": 2}}}
    build = compile(spec, out=folder / "build")
    plain = compile({"base": BASES[name]}, out=folder / "plain")
    del build, plain
    stock = ort.InferenceSession(folder / "stock.onnx", options())
    sessions = {
        "plain": Session(folder / "plain", threads=THREADS),
        "ours": Session(folder / "build", threads=THREADS),
        "fused by choice": Session(folder / "build", threads=THREADS, fusions=WITHOUT),
    }
    tuned = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules=["query", "value"])).eval()
    rows = []
    for (batch, tokens), rounds in SHAPES.items():
        rows.append(_shape((batch, tokens), rounds, stock, sessions, tuned))
    return Section(
        f"Latency of a swapped task: {name}",
        "LoRA r=16 on q and v, another task on every call. *stock* is `torch.onnx.export` of the base with default "
        "session options, *plain* is our export of the base without surgery, *no task* our build answering as the "
        "base; *without SkipLayerNorm* leaves out that one fusion (`Session.tuned` decides by measuring); PEFT runs in "
        "eager PyTorch. Aims: task / plain ≤ 1.10, 1.05, 1.02; PEFT / task ≥ 1.8, 1.4, 1.1; best / stock < 1.00.",
        (
            "batch × tokens",
            "stock",
            "plain",
            "no task",
            "task",
            "task without SkipLayerNorm",
            "PEFT",
            "task / plain",
            "task / stock",
            "without SLN / stock",
            "PEFT / task",
        ),
        tuple(rows),
    )


def options() -> ort.SessionOptions:
    """Default session options but for the threads."""
    chosen = ort.SessionOptions()
    chosen.intra_op_num_threads = THREADS
    return chosen


def _shape(
    shape: tuple[int, int],
    rounds: int,
    stock: ort.InferenceSession,
    sessions: dict[str, Session],
    tuned: torch.nn.Module,
) -> tuple[str, ...]:
    tensors = inputs(*shape)
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    turn = {"ours": 0, "fused by choice": 0}

    def swapped(name: str) -> None:
        turn[name] += 1
        sessions[name].run(arrays, "ab"[turn[name] % 2])

    def eager() -> None:
        with torch.no_grad():
            tuned(**tensors)

    times = interleave(
        {
            "stock": lambda: stock.run(None, arrays),
            "plain": lambda: sessions["plain"].run(arrays),
            "no task": lambda: sessions["ours"].run(arrays),
            "task": lambda: swapped("ours"),
            "chosen": lambda: swapped("fused by choice"),
            "peft": eager,
        },
        rounds,
    )
    shown = [milliseconds(times[name]) for name in ("stock", "plain", "no task", "task", "chosen", "peft")]
    ratios = [("task", "plain"), ("task", "stock"), ("chosen", "stock"), ("peft", "task")]
    return (f"{shape[0]} × {shape[1]}", *shown, *(f"**{ratio(times, a, b):.2f}**" for a, b in ratios))
