"""A minute of everything at once: no wrong answer, and memory stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.soak import soak


@pytest.mark.sweep
def test_a_minute_of_soak(served_build: Path) -> None:
    counts = soak(served_build, seconds=60).counts
    assert counts["right"] > 1000
    assert min(counts["changes"], counts["bad requests"], counts["slow clients"]) > 50
    assert counts["kills"] > 1
