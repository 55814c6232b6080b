"""The deployment side of the generation demo: writes with a build where torch and transformers cannot be imported.

    python demo/write.py BUILD TASK=TEST.jsonl …

Prints JSON: successes per task, by the base and by the trained task, tokens a second, and memory.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo.serve import FORBIDDEN  # isort: skip - from here on torch and its kind cannot be imported

from rich.console import Console

from demo.formats import Row, successes
from surgeon.runtime import Session

BATCH = 8
TOKENS = 24


def main() -> None:
    """Let base and task write for every test row."""
    build, *tests = sys.argv[1:]
    found: dict[str, Any] = {"tasks": {}}
    with Session(build, threads=2) as session:
        for item in tests:
            task, _, path = item.partition("=")
            rows = [Row(**json.loads(line)) for line in Path(path).read_text(encoding="utf-8").splitlines()]
            before, after = write(session, rows, None), write(session, rows, task)
            found["tasks"][task] = {"rows": len(rows), "before": before, "after": after}
        found["weights"] = session.manifest.weights
    held = (Path(build) / name for name in ("model.onnx", "model.onnx.data"))
    found["base_bytes"] = sum(path.stat().st_size for path in held)
    found["memory"] = memory()
    found["heavy"] = [name for name in FORBIDDEN if name in sys.modules]
    print(json.dumps(found))


def memory() -> int:
    """Most bytes that this process has had in memory. What `getrusage` counts on Linux begins with its parent's."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM"))
    return 1024 * int(peak.split()[1])


def write(session: Session, rows: list[Row], task: str | None) -> dict[str, Any]:
    """Successes of one task, its tokens a second, and what it writes first."""
    with Console(stderr=True).status(f"writing {len(rows)} texts as {task or 'the base'}"):
        started = time.perf_counter()
        written = session.generate([r.prompt for r in rows], task, max_new_tokens=TOKENS, batch=BATCH, stop="\n")
        seconds = time.perf_counter() - started
    return {
        "right": successes(rows, [w.text for w in written]),
        "speed": sum(len(w.tokens) for w in written) / seconds,
        "first": written[0].text.strip(),
    }


if __name__ == "__main__":
    main()
