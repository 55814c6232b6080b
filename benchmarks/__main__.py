"""Measures Surgeon against its peers on this machine and writes docs/benchmarks.md; run by `make bench`.

Every comparison runs ours and the peer's in turn, on the same work and threads, and reports medians and their ratios.
"""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import adapter_drop, compiling, latency, mixed, tasks, training
from benchmarks.machine import machine
from benchmarks.measure import THREADS, Section

PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"
ROOMS = {
    "latency": latency,
    "mixed": mixed,
    "training": training,
    "tasks": tasks,
    "adapter_drop": adapter_drop,
    "compiling": compiling,
}
TOOLS = ("torch", "transformers", "onnxruntime", "peft", "onnx", "onnxscript")


def main() -> None:
    """Run the rooms named on the command line, or all; only a whole run writes the page."""
    chosen = sys.argv[1:] or list(ROOMS)
    console = Console()
    torch.set_num_threads(THREADS)
    warnings.simplefilter("ignore")  # of the peers
    started = time.perf_counter()
    sections: list[Section] = []
    for name in chosen:
        console.print(f"[bold cyan]{name}[/bold cyan]")
        for section in ROOMS[name].measure():
            console.print(section.markdown())
            sections.append(section)
    if not sys.argv[1:]:
        PAGE.write_text(page(sections, time.perf_counter() - started), encoding="utf-8")
        console.print(f"wrote {PAGE}")


def page(sections: list[Section], seconds: float) -> str:
    """The whole page."""
    head = (
        "# Benchmarks\n\nWritten by `make bench`. Ours and the peer's run in turn on the same work; times are medians, "
        "a ratio is the median of the rounds' ratios.\n\n"
        f"Machine: {machine(*TOOLS)}. The whole run took {seconds / 60:.0f} minutes.\n"
    )
    return head + "".join(f"\n{section.markdown()}" for section in sections)


if __name__ == "__main__":
    main()
