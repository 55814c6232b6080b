"""One case, from a configuration to ONNX Runtime: what works of it, and why not what does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor, fx
from transformers import PreTrainedModel

from surgeon.anatomy import Anatomy, find, summary
from surgeon.base import open_base
from surgeon.base.opening import Base
from surgeon.compiler import Compiled, begin, passes
from surgeon.exporters.onnx import OnnxExporter
from surgeon.inputs import base_inputs, ended, vocabulary
from surgeon.model import TaskModel
from surgeon.module import copied
from surgeon.pipeline import run_passes
from surgeon.spec import read_spec
from surgeon.trace import trace
from sweep.cases import Case, base
from sweep.oracle import faults
from sweep.shrinking import LADDER, Sizes

TECHNIQUES = ("lora", "bitfit", "adapter", "prefix")
SHAPES = ((3, 11, 4), (1, 5, 0), (2, 20, 3))
"""Batch, tokens, and how many of the first row's are padding; none of them the trace's."""
SAMPLES = 400
"""Of a sound, about as many as a token is made of."""
BAR = 1e-4
Notes = dict[str, Any]


def read(case: Case, notes: Notes, ladder: Sequence[Sizes] = LADDER) -> tuple[PreTrainedModel, fx.GraphModule, Anatomy]:
    """The cheap part: trace, anatomy and its oracle."""
    notes["step"] = "build"
    model = base(case, ladder)
    notes["step"] = "trace"
    graph_module = trace(model)
    notes["step"] = "anatomy"
    anatomy = find(graph_module)
    notes["summary"] = summary(anatomy)
    notes["step"] = "oracle"
    notes["faults"] = faults(model, graph_module, anatomy)
    return model, graph_module, anatomy


def reading(case: Case, notes: Notes) -> None:
    """`read`, with what stops it as the cause."""
    try:
        read(case, notes)
        if notes["faults"]:
            notes["cause"] = f"anatomy: {notes['faults'][0]}"
    except Exception as error:
        notes["cause"] = f"{notes['step']}: {cause(error)}"


def chain(case: Case, notes: Notes, ladder: Sequence[Sizes] = LADDER) -> None:
    """Everything: all techniques in one graph, in torch and in ONNX Runtime; each alone where that does not work."""
    try:
        model, graph_module, anatomy = read(case, notes, ladder)
    except Exception as error:
        notes["cause"] = f"{notes['step']}: {cause(error)}"
        return
    opened, items = open_base(model), surgery(anatomy)
    verdict = {name: "ok" if name in items else "none" for name in TECHNIQUES}
    notes["step"] = "surgery"
    notes["export"] = together = attempt(opened, graph_module, list(items.values()))
    if together != "ok" and items:
        notes["together"] = together
        notes["export"] = alone = attempt(opened, graph_module, [])
        if alone == "ok":
            notes["step"] = "each technique alone"
            verdict |= {name: attempt(opened, graph_module, [item]) for name, item in items.items()}
            if all(said in {"ok", "none"} for said in verdict.values()):
                notes["export"] = f"each technique works alone, all together do not: {together}"
        else:
            verdict = dict.fromkeys(items, "not tried") | {n: v for n, v in verdict.items() if v == "none"}
    notes["techniques"] = verdict
    notes["step"] = "done"
    bad = [f"anatomy: {notes['faults'][0]}"] if notes["faults"] else []
    bad += [f"export: {notes['export']}"] if notes["export"] != "ok" else []
    bad += [f"{name}: {said}" for name, said in verdict.items() if said not in {"ok", "none", "not tried"}]
    if bad:
        notes["cause"] = bad[0]


def surgery(anatomy: Anatomy) -> dict[str, dict[str, Any]]:
    """The techniques that there is something for in this model, as items of a spec."""
    roles = {p.role for p in anatomy.projections}
    found: dict[str, dict[str, Any]] = {}
    if where := sorted(roles & {"attention.query", "attention.value", "attention.output", "mixer"}):
        pair = [r for r in ("attention.query", "attention.value") if r in where]
        sites = [p for p in anatomy.projections if p.role in (pair or where)]
        rank = min(3, *(min(site.in_features, site.out_features) for site in sites))
        found["lora"] = {"lora": {"rank": rank, "where": pair or where}}
    if any(site.bias for site in (*anatomy.projections, *anatomy.norms) if site.role != "head.out"):
        found["bitfit"] = {"bitfit": {}}
    if joins := sorted({j.role for j in anatomy.joins}):
        found["adapter"] = {"adapter": {"bottleneck": 5, "where": joins, "norms": False}}
    if anatomy.attentions:
        found["prefix"] = {"prefix": {"length": 3}}
    return found


def attempt(opened: Base, graph_module: fx.GraphModule, items: list[Mapping[str, Any]]) -> str:
    """`ok`, or why surgery does not work."""
    try:
        compiled = _operate(opened, graph_module, items)
        return _in_torch(compiled) or _in_onnx_runtime(compiled) or "ok"
    except Exception as error:
        return cause(error)


def cause(error: BaseException) -> str:
    """The reason in one line: the first that is said, with the next where it announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    return f"{type(error).__name__}: {said}"[:300]


def _operate(opened: Base, graph_module: fx.GraphModule, items: list[Mapping[str, Any]]) -> Compiled:
    spec = read_spec({"surgery": items, "tasks": {"a": {}}})
    return Compiled(spec, opened, run_passes(begin(opened, copied(graph_module)), list(passes(spec))))


def _in_torch(compiled: Compiled) -> str | None:
    """Born as the base, prefixes of no length in front; and another model once the deltas have moved."""
    model, ours = compiled.base.model, compiled.model("a").eval()
    given = feed(model, *_fitting(compiled, SHAPES[0]))
    with torch.no_grad():
        wanted = model(**given).logits
        born = ours.state_dict()
        ours.load_state_dict({name: _without_prefix(ours, name, t) for name, t in born.items()})
        if (gap := _gap(ours(**given).logits, wanted)) > 1e-5:
            return f"a fresh task is not the base: {gap:.1e} off"
        ours.load_state_dict(born)
        if born and _gap(_moved(ours)(**given).logits, wanted) < 1e-4:
            return "trained deltas change nothing"
    return None


def _fitting(compiled: Compiled, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """A shape of as many tokens as the program takes at most."""
    batch, length, pad = shape
    return batch, min(length, compiled.program.max_length or length), pad


def _without_prefix(model: TaskModel, name: str, tensor: Tensor) -> Tensor:
    free = model.ledger.free(name)
    for axis, symbol in free.items():
        if symbol.startswith("prefix.length"):
            tensor = tensor.narrow(axis, 0, 0)
    return tensor


def _in_onnx_runtime(compiled: Compiled) -> str | None:
    """The task and the base, each at every shape."""
    base, ours = compiled.base.model, compiled.model("a").eval()
    deltas = {name: t.detach().numpy() for name, t in ours.deployed().items()}
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    with TemporaryDirectory() as folder, torch.no_grad():
        OnnxExporter().export(compiled.program, Path(folder))
        session = ort.InferenceSession(Path(folder) / "model.onnx", options)
        for shape in (_fitting(compiled, shape) for shape in SHAPES):
            given = feed(base, *shape)
            seen = given.get("attention_mask", torch.ones(1)).bool()
            main = next(iter(given.values()))
            given = {i.name: given.get(i.name, i.absent(main)) for i in compiled.program.inputs}
            arrays = {n: t.numpy() for n, t in given.items()}
            for extra, peer, who in (({}, base, "base"), (deltas, ours, "task")):
                found = torch.from_numpy(np.asarray(session.run(["logits"], arrays | extra)[0]))
                wanted = peer(**given).logits
                if wanted.ndim == 3 and wanted.shape[:2] == seen.shape:  # what a padded place says is of no use
                    found, wanted = found[seen], wanted[seen]
                if not (gap := _gap(found, wanted)) <= BAR:
                    return f"{who} in ONNX Runtime at {shape[0]}x{shape[1]} is {gap:.1e} off"
    return None


def feed(model: PreTrainedModel, batch: int, length: int, pad: int) -> dict[str, Tensor]:
    """Ids, pixels or samples of a sound; and a mask, where there is one, that hides the end of the first row."""
    draw = torch.Generator().manual_seed(length)
    rows = vocabulary(model)
    sizes = {"batch": batch, "sequence": length, "decoder_sequence": max(length - 3, 1)}
    sizes |= {"samples": SAMPLES * (length + 1), "frames": 3 * length + 1}
    given = {}
    for i in base_inputs(model):
        shape = i.shape(sizes)
        if i.dtype.is_floating_point:
            given[i.name] = torch.randn(shape, generator=draw)
        elif i.fill is None:
            given[i.name] = ended(torch.randint(min(3, rows - 1), min(rows, 100), shape, generator=draw), i.end)
        elif i.fill == 1:
            given[i.name] = torch.ones(shape, dtype=i.dtype)
    main, mask = next(iter(given.values())), given.get("attention_mask")
    if mask is not None and pad:
        hidden = mask.shape[1] * pad // length
        ends = main[:1, -1:].clone()
        mask[0, -hidden:], main[0, -hidden:] = 0, 0 if main.is_floating_point() else model.config.pad_token_id or 0
        if base_inputs(model)[0].end is not None:
            main[:1, -hidden - 1 : -hidden] = ends
    return given


def _moved(model: TaskModel) -> TaskModel:
    """Move trained tensors off their birth values."""
    noise = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name in model.state_dict():
            parameter = model.get_parameter(name)
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=noise))
    return model


def _gap(found: Tensor, wanted: Tensor) -> float:
    if found.shape != wanted.shape:
        return float("inf")
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1.0))
