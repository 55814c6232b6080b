"""One compile, or one session, in this process: prints as JSON what it took and the process's peak memory in bytes."""

from __future__ import annotations

import json
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.compiling_once import peak_memory


def main() -> None:
    """`python -m benchmarks.growth_once compile SPEC OUT` or `… session BUILD`"""
    found = _compile(*map(Path, sys.argv[2:])) if sys.argv[1] == "compile" else _session(Path(sys.argv[2]))
    print(json.dumps({**found, "peak": peak_memory()}))


def _compile(spec: Path, out: Path) -> dict[str, Any]:
    """Seconds of every stage, each ending where the next is reported, and of all."""
    from surgeon import compile

    marks = [("", time.perf_counter())]
    before = peak_memory()
    compile(spec, out=out, progress=lambda stage: marks.append((stage, time.perf_counter())))
    marks.append(("", time.perf_counter()))
    stages = {stage: end - begin for (stage, begin), (_, end) in pairwise(marks) if stage}
    return {"stages": stages, "seconds": marks[-1][1] - marks[0][1], "imports": before}


def _session(build: Path) -> dict[str, Any]:
    """Seconds to open a build and to answer once, and what is resident then: the process's own, and pages of files."""
    import numpy as np

    from surgeon import Session

    before = peak_memory()
    start = time.perf_counter()
    with Session(build, threads=1, verify=False) as session:
        opened = time.perf_counter()
        ids = np.arange(16).reshape(1, 16)
        session.run({"input_ids": ids, "attention_mask": np.ones_like(ids)}, "a")
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
        own, files = (1024 * int(status[name].split()[0]) for name in ("RssAnon", "RssFile"))
        return {
            "opened": opened - start,
            "first": time.perf_counter() - opened,
            "own": own,
            "files": files,
            "imports": before,
        }


if __name__ == "__main__":
    main()
