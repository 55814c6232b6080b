"""Writes the results of a sweep as a page."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Sequence
from typing import Any

import onnxruntime
import torch
import transformers

from sweep.cases import EXCEPTIONS, Case
from sweep.causes import told
from sweep.chain import SHAPES, TECHNIQUES

Result = dict[str, Any]
INTRO = """# Architectures

Written by `make architectures`. No family is named in Surgeon's code: what a model is made of is found in its graph.

Each row is a tiny random model of a family of the installed transformers, its configuration shrunk from the family's
own defaults by rules that name no family (`sweep/shrinking.py`), with one head. It goes through

1. **trace** with dynamic batch and sequence (an image has a size), and **anatomy**, held against an oracle that
   knows no names (`sweep/oracle.py`): one mixing sublayer for each layer of the configuration, a whole number of
   feed-forwards, in encoder and decoder; query, key, value and output as wide as heads × head size; each sublayer
   taken out at its join against the model itself with that sublayer's last weights at zero; and PEFT's own default
   targets, where it has the family;
2. **surgery**: LoRA on query and value, BitFit where there are biases, adapters at all joins, prefixes where there is
   attention, in one graph. A fresh task must be the base (with prefixes of no length), moved deltas another model;
3. **ONNX Runtime** against PyTorch, the task and the base, at {shapes}, padded, to 1e-4 of the largest logit.

`✓` works, `–` there is nothing for it in this model, `✗` does not: the cause is in the last column, one line, the first
where there are several. `?` was not reached. A cause that starts with `trace` or `export` is what torch.export or the
exporter said, or what that stems from in the model's code (`sweep/causes.py`); `build` means that no rung of the ladder
of tiny sizes makes a model that answers to the inputs of `surgeon/inputs.py` alone: ids, an image or a sound.
"""


def page(results: Sequence[Result], wanted: Sequence[Case]) -> str:
    """The page: what was counted, then a row a case."""
    known = {(c.family, c.head) for c in wanted}
    rows = sorted((r for r in results if (r["family"], r["head"]) in known), key=lambda r: (r["family"], r["head"]))
    shapes = ", ".join(f"{batch} × {length}" for batch, length, _ in SHAPES)
    return "\n".join([INTRO.format(shapes=shapes), *_counted(rows, wanted), "", *_table(rows), ""])


def _counted(rows: Sequence[Result], wanted: Sequence[Case]) -> list[str]:
    tried, green = (
        {r["family"] for r in rows},
        {r["family"] for r in rows if r.get("export") == "ok" and "cause" not in r},
    )
    families = {c.family for c in wanted}
    exact = {r["family"] for r in rows if r.get("faults") == []}
    steps = Counter(str(r["cause"]).partition(":")[0] for r in rows if "cause" in r)
    stopped = ", ".join(f"{step} {count}" for step, count in steps.most_common())
    return [
        f"{len(rows)} of {len(wanted)} cases have been run, {len(tried)} of {len(families)} families. "
        f"**{len(green)} families are green in all columns**, {len(exact)} have an anatomy without fault.",
        "",
        f"What stopped the others: {stopped or 'nothing'}.",
        "",
        *_times(rows, len(wanted)),
        f"Versions: transformers {transformers.__version__}, torch {torch.__version__}, onnxruntime "
        f"{onnxruntime.__version__}, Python {platform.python_version()}.",
        "",
        "Left out: " + "; ".join(f"{family} ({why})" for family, why in EXCEPTIONS.items()) + ".",
    ]


def _times(rows: Sequence[Result], count: int) -> list[str]:
    """What a case took of a processor, and what all would take of two, as far as they were timed so."""
    seconds = [float(r["seconds"]) for r in rows if r.get("code")]
    if not seconds:
        return []
    mean = sum(seconds) / len(seconds)
    return [
        f"A case takes {mean:.0f} seconds of one core, {max(seconds):.0f} at most, told by {len(seconds)}; all {count} "
        f"take {mean * count / 120:.0f} minutes on two cores.",
        "",
    ]


def _table(rows: Sequence[Result]) -> list[str]:
    titles = ["family", "head", "layers", "anatomy", *TECHNIQUES, "ONNX Runtime", "cause"]
    return [
        "| " + " | ".join(titles) + " |",
        "| --- | --- | --- |" + " :-: |" * (len(titles) - 4) + " --- |",
        *("| " + " | ".join(_row(row)) + " |" for row in rows),
    ]


def _row(row: Result) -> list[str]:
    layers = row.get("summary", {}).get("layers", {})
    said = row.get("techniques", {})
    return [
        row["family"],
        row["head"],
        ", ".join(f"{stack} {depth}" for stack, depth in layers.items()),
        _mark(row.get("faults")),
        *(_mark(said.get(name)) for name in TECHNIQUES),
        _mark(row.get("export")),
        told(row["family"], str(row.get("cause", "")))[:200].replace("|", "\\|").replace("](", "] ("),  # it is no link
    ]


def _mark(said: str | list[str] | None) -> str:
    if said in (None, "not tried"):
        return "?"
    if said == "none":
        return "–"
    return "✓" if said in ("ok", []) else "✗"
