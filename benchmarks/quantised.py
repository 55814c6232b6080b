"""What other weights of the ONNX base cost and save: fp32, NF4 of `qlora`, `export.weights` int8 and int4.

    python -m benchmarks.quantised [BUILD]      writes docs/quantised.md; BUILD is the demo's, for a trained task

Every base gets the same task, which was trained over fp32, and straight in ONNX Runtime: a session would refuse it
over NF4.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from benchmarks.bases import inputs
from benchmarks.latency import options
from benchmarks.machine import machine
from benchmarks.measure import THREADS, Section, interleave, milliseconds, ratio
from surgeon import Session, compile, read_spec
from surgeon.runtime.manifest import MANIFEST

Arrays = dict[str, np.ndarray[Any, Any]]
ROOT = Path(__file__).resolve().parent.parent
PAGE, SPEC, DEMO = ROOT / "docs" / "quantised.md", ROOT / "specs" / "demo.yaml", ROOT / "demo" / "out" / "build"
TASK = "movie"
SHAPES = {(1, 32): 40, (8, 64): 15}
CHUNK = 64
CHILD = """
import sys, numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.log_severity_level, options.intra_op_num_threads = 3, int(sys.argv[3])
session = onnxruntime.InferenceSession(sys.argv[1], options)
session.run(None, dict(numpy.load(sys.argv[2])))
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmRSS")))
"""


@dataclass(frozen=True)
class Variant:
    """A base in ONNX, in whichever form."""

    name: str
    model: Path
    session: ort.InferenceSession

    @property
    def megabytes(self) -> float:
        """Of the model and its weights."""
        return sum(path.stat().st_size for path in (self.model, self.model.parent / "model.onnx.data")) / 1e6

    def resident(self, arrays: Arrays, folder: Path) -> float:
        """Megabytes of a fresh process that loads it and runs once."""
        np.savez(folder / "inputs.npz", **arrays)
        command = [sys.executable, "-c", CHILD, str(self.model), str(folder / "inputs.npz"), str(THREADS)]
        return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout) / 1024

    def logits(self, arrays: Arrays, adapter: ort.LoraAdapter | None) -> np.ndarray[Any, Any]:
        """The task's answers, or the base's."""
        chosen = ort.RunOptions()
        if adapter is not None:
            chosen.add_active_adapter(adapter)
        rows = len(next(iter(arrays.values())))
        parts = [{n: a[i : i + CHUNK] for n, a in arrays.items()} for i in range(0, rows, CHUNK)]
        return np.concatenate([self.session.run(["logits"], part, chosen)[0] for part in parts])


def main() -> None:
    """Measure and write the page."""
    build = Path(sys.argv[1]) if sys.argv[1:] else DEMO
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SURGEON_CACHE"] = f"{folder}/cache"
        section = measure(Path(folder), build if build.is_dir() else None)
    PAGE.write_text(page(section), encoding="utf-8")
    print(section.markdown())


def measure(folder: Path, trained: Path | None) -> Section:
    """One row a base."""
    variants = make(folder)
    plain = variants[0]
    arrays = {n: t.numpy() for n, t in inputs(8, 64).items()}
    adapter, labels, texts = None, None, "random words on a task as it is born"
    answered = arrays
    if trained is not None:
        adapter, labels, answered = task(trained, plain.model.parent)
        texts = f"the demo's task `{TASK}`, trained over fp32, on its {len(labels)} test sentences"
    wanted = plain.logits(answered, adapter)
    times = {shape: latencies(variants, shape, rounds) for shape, rounds in SHAPES.items()}
    rows = []
    for variant in variants:
        found = variant.logits(answered, adapter)
        cells = [variant.name, f"{variant.megabytes:.1f}", f"{variant.resident(arrays, folder):.0f}"]
        for shape in SHAPES:
            taken = times[shape]
            cells += [milliseconds(taken[variant.name]), f"**{ratio(taken, variant.name, plain.name):.2f}**"]
        cells.append(f"{np.abs(found - wanted).max() / np.abs(wanted).max():.3f}")
        cells.append("" if labels is None else f"{(found.argmax(-1) == labels).mean():.3f}")
        rows.append(tuple(cells))
    shapes = [name for b, t in SHAPES for name in (f"{b} × {t}", "/ fp32")]
    columns = ("base", "MB", "process, MB", *shapes, "difference", "accuracy")
    return Section("MiniLM-L6", f"Difference and accuracy: {texts}.", columns, tuple(rows))


def make(folder: Path) -> list[Variant]:
    """The demo's spec over every form of the base; fp32 first."""
    spec = read_spec(SPEC).model_dump(mode="json", exclude_none=True)
    (lora,) = (item["lora"] for item in spec["surgery"])
    qlora = [{"qlora": {key: lora[key] for key in ("rank", "alpha", "where")}}]
    changes: dict[str, dict[str, Any]] = {"fp32": {}, "NF4 (`qlora`)": {"surgery": qlora}}
    changes |= {f"`{weights}`": {"export": {"weights": weights}} for weights in ("int8", "int4")}
    models = {}
    for i, (name, change) in enumerate(changes.items()):
        compile({**spec, **change}, out=folder / str(i))
        models[name] = folder / str(i) / "model.onnx"
    for weights in ("int8", "int4"):
        models[f"{weights} with fp32 inputs"] = with_fp32_inputs(models[f"`{weights}`"])
    chosen = options()
    chosen.log_severity_level = 3
    return [Variant(name, path, ort.InferenceSession(path, chosen)) for name, path in models.items()]


def with_fp32_inputs(path: Path) -> Path:
    """The same bytes, multiplied with inputs that are not rounded: a copy beside the model."""
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
    other = path.with_name("fp32-inputs.onnx")
    onnx.save(model, other)
    return other


def task(trained: Path, build: Path) -> tuple[ort.LoraAdapter, np.ndarray[Any, Any], Arrays]:
    """A trained task, the labels of its test sentences, and these as a session encodes them."""
    entry = json.loads((trained / MANIFEST).read_text(encoding="utf-8"))["tasks"][TASK]
    with (trained.parent / "data" / f"{TASK}-test.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    adapter = ort.LoraAdapter()
    adapter.Load(str(trained / entry["adapter"]))
    names = entry["labels"]
    with Session(build, threads=THREADS) as session:
        encoded = session.encode([row["text"] for row in rows], max_length=64)
    return adapter, np.array([names.index(row["label"]) for row in rows]), encoded


def latencies(variants: list[Variant], shape: tuple[int, int], rounds: int) -> dict[str, list[float]]:
    """Seconds of every base in turn, without a task."""
    arrays = {n: t.numpy() for n, t in inputs(*shape).items()}
    return interleave({v.name: lambda v=v: v.session.run(None, arrays) for v in variants}, rounds)  # type: ignore[misc]


def load() -> str:
    """What else ran."""
    busy = os.getloadavg()[0]
    return f"The load was {busy:.1f} at the end" + (": other work ran beside." if busy > THREADS + 1 else ".")


def page(section: Section) -> str:
    """The whole page."""
    return FRAME.format(machine=machine("torch", "onnxruntime", "bitsandbytes"), table=section.markdown(), load=load())


FRAME = """\
# Other weights of the ONNX base

Written by `python -m benchmarks.quantised`.

Three forms of a base are smaller than fp32. They are other bases, and answer a little differently.

| | NF4 | `int8`, `int4` |
| --- | --- | --- |
| spec | [`qlora`](techniques/qlora.md) in `surgery` | [`export: {{weights: int8}}`](spec.md) |
| what is in fewer bits | the projections that `quantise` selects | every matrix of the base that nothing else reads |
| training | over the same bytes that are served | over the checkpoint's own numbers |
| answers | those of training, to 1e-4 | approximate; `surgeon verify` says how far |
| fingerprint | another one: tasks of fp32 are refused | that of fp32: its tasks run unchanged |
| memory saved | in training and in ONNX Runtime | in ONNX Runtime |
| operator of ONNX Runtime | `MatMulBnb4` | `MatMulNBits`, blocks of 32, inputs rounded to 8 bits |

*MB* are `model.onnx` and its data; of MiniLM's 91 MB, 47 are the tables of its embeddings, which stay fp32. *process*
is the resident memory of a fresh process that loads the model and runs a batch of 8 × 64 once. Latencies are medians
of runs in turn, of the base without a task; a ratio is the median of the rounds' ratios. *difference* is the largest of
any logit to fp32's, relative to the largest logit. *with fp32 inputs* are the same bytes with `accuracy_level` 0, which
is not offered: it shows what the rounding of inputs costs and brings. NF4's difference and accuracy are of the task
that was trained over fp32; one that `qlora` trains is trained over NF4 itself. An accuracy on 600
sentences has a standard error of 0.014, so none of these differs for certain.

Machine: {machine}. {load}

{table}"""


if __name__ == "__main__":
    main()
