"""How benchmarks measure: variants in turn, medians, and ratios taken round by round."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

THREADS = 2
REST = 0.1
"""Seconds, at least: see `rest`."""


@dataclass(frozen=True)
class Section:
    """A table of the page, with what it says and what was aimed at."""

    title: str
    text: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """As Markdown."""
        lines = [f"## {self.title}", "", self.text, "", "| " + " | ".join(self.columns) + " |"]
        lines.append("| --- |" + " ---: |" * (len(self.columns) - 1))
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        return "\n".join(lines) + "\n"


def interleave(
    variants: Mapping[str, Callable[[], object]], rounds: int, warm: int = 3, rested: bool = True
) -> dict[str, list[float]]:
    """Seconds of every variant, one call each a round, in an order drawn anew each round, with rests between."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    names, order, took = list(variants), random.Random(0), 0.0
    for i in range(-warm, rounds):
        for name in order.sample(names, len(names)):
            if rested:
                rest(took)
            start = time.perf_counter()
            variants[name]()
            took = time.perf_counter() - start
            if i >= 0:
                times[name].append(took)
    return times


def rest(took: float) -> None:
    """Sleep before a call, as long as the last one took or longer.

    Worker threads of whoever ran last spin for a while, and would slow the next. And a virtual machine may have its
    cores in bursts only: under steady work it then runs now at half its speed, now at all of it.
    """
    time.sleep(max(REST, took))


def ratio(times: Mapping[str, Sequence[float]], name: str, to: str) -> float:
    """Median over the rounds of one variant's time to another's."""
    return statistics.median(a / b for a, b in zip(times[name], times[to], strict=True))


def milliseconds(times: Sequence[float]) -> str:
    """A median as text."""
    return f"{1000 * statistics.median(times):.2f} ms"
