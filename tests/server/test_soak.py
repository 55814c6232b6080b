"""A minute of everything at once: no wrong answer, and memory stays."""

from __future__ import annotations

from pathlib import Path

from benchmarks.soak import soak


def test_a_minute_of_soak(served_build: Path) -> None:
    counts = soak(served_build, seconds=60).counts
    assert counts["right"] > 100
    assert min(counts["changes"], counts["bad requests"], counts["slow clients"]) > 10
    assert counts["kills"] > 1
