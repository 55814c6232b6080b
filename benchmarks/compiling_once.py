"""One compile or export in this process: prints its seconds and the process's peak memory in bytes."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.bases import BASES, export_stock, open_model
from surgeon import compile


def main() -> None:
    """`python -m benchmarks.compiling_once BASE VARIANT FOLDER`"""
    name, variant, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    model = open_model(name)
    rank = 8 if variant == "rank" else 16
    tasks: dict[str, Any] = {"b": {"labels": 3}} if variant == "task" else {"a": {"labels": 2}}
    spec = {
        "base": BASES[name],
        "surgery": [{"lora": {"rank": rank, "where": ["attention.query", "attention.value"]}}],
        "tasks": tasks,
    }
    start = time.perf_counter()
    if variant == "export":
        export_stock(model, folder / "stock.onnx")
    else:
        compile(spec, model, out=folder / variant)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "peak": peak_memory()}))


def peak_memory() -> int:
    """Peak resident bytes of this process; `getrusage` would count the parent's, from before it became this one."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


if __name__ == "__main__":
    main()
