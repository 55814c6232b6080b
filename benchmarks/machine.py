"""What a page says of where its numbers come from."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path

from benchmarks.measure import THREADS


def machine(*tools: str) -> str:
    """The processor, the threads that benchmarks use, the system, and the versions of Python and of these packages."""
    versions = ", ".join(f"{name} {version(name)}" for name in tools)
    return (
        f"{processor()}, {THREADS} threads, {platform.system()} {platform.machine()}, "
        f"Python {platform.python_version()}; {versions}"
    )


def processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown processor"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "")
    return (
        f"{names[0] if names else 'unknown processor'} ({len(names)} cores{', AVX-512' if 'avx512f' in flags else ''})"
    )
