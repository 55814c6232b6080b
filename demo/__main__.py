"""The main job end to end: one spec, three tasks trained on real sentences, one ONNX base, answers without torch.

Run by `make demo`. What it types is what a user types; the rest measures. A second run reuses what still holds.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from demo import baseline
from demo.data import prepare
from surgeon import __version__, load
from surgeon.errors import SurgeonError
from surgeon.picture import picture
from surgeon.runtime.document import read_manifest
from surgeon.runtime.files import check_files, hash_file

HERE = Path(os.path.relpath(Path(__file__).parent))
SPEC = Path(os.path.relpath(HERE.parent / "specs" / "demo.yaml"))
OUT = HERE / "out"
BUILD = OUT / "build"
RESULTS = OUT / "results.json"
TRAINING = ["--epochs", "3", "--learning-rate", "1e-3", "--max-length", "64", "--threads", "2"]

console = Console(width=None if sys.stdout.isatty() else 100)


def main() -> None:
    """Do everything, and print one table."""
    started = time.perf_counter()
    torch.set_num_threads(2)
    heading("Three tasks from sentences rated by people")
    data = prepare(OUT / "data")
    key = state(data)
    if not reusable(key):
        shutil.rmtree(BUILD, ignore_errors=True)
        RESULTS.unlink(missing_ok=True)
        heading("One spec, one base: compile")
        surgeon("compile", str(SPEC), "-o", str(BUILD))
        for task, files in data.items():
            heading(f"Train '{task}'")
            files_given = ["--data", str(files["train"]), "--validation", str(files["validation"])]
            surgeon("train", str(BUILD), "--task", task, *files_given, *TRAINING)
        heading("For comparison: the same head on the frozen base, and the base without surgery")
        head_only = {task: baseline.head_only(SPEC, task, files) for task, files in data.items()}
        baseline.export_plain(SPEC, OUT / "plain")
        RESULTS.write_text(json.dumps({"key": key, "head_only": head_only}), encoding="utf-8")
    heading("Run all of it in a fresh interpreter where torch and transformers cannot be imported")
    served = serve(data)
    differences = compare(data)
    report(served, differences, json.loads(RESULTS.read_text(encoding="utf-8"))["head_only"])
    console.print(f"{time.perf_counter() - started:.0f} s. The graph before and after surgery: demo/out/picture.svg")
    console.print('Try it: [bold].venv/bin/surgeon run demo/out/build --task movie "a lovely, quiet film"[/bold]')


def heading(text: str) -> None:
    """Say what comes next."""
    console.print(f"\n[bold cyan]{text}[/bold cyan]")


def surgeon(*arguments: str) -> None:
    """Show a command and run it, as a user would."""
    console.print(f"[dim]$ surgeon {' '.join(arguments)}[/dim]", soft_wrap=True)
    subprocess.run([sys.executable, "-m", "surgeon", *arguments], check=True)


def state(data: Mapping[str, Mapping[str, Path]]) -> str:
    """A hash of all that the trained build depends on."""
    parts = [__version__, SPEC.read_text(encoding="utf-8"), *TRAINING]
    parts += [hash_file(path) for files in data.values() for path in files.values()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def reusable(key: str) -> bool:
    """The build of an earlier run is whole and was made from the same things."""
    try:
        known = json.loads(RESULTS.read_text(encoding="utf-8"))
        check_files(BUILD, read_manifest(BUILD))
    except (OSError, ValueError, SurgeonError):
        return False
    return bool(known["key"] == key)


def serve(data: Mapping[str, Mapping[str, Path]]) -> dict[str, Any]:
    """Answers, accuracies and latencies from the interpreter without torch."""
    tests = [f"{task}={files['test']}" for task, files in data.items()]
    command = [sys.executable, str(HERE / "serve.py"), str(BUILD), str(OUT / "plain"), str(OUT / "served.npz"), *tests]
    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(finished.stdout)
    return found


def compare(data: Mapping[str, Mapping[str, Path]]) -> dict[str, float]:
    """Largest difference between PyTorch's logits and those served, on the first rows of each test set."""
    compiled = load(BUILD)
    differences = {}
    with np.load(OUT / "served.npz") as served:
        for task in data:
            model = compiled.model(task).eval()
            inputs = {i.name: torch.from_numpy(served[f"{task}.{i.name}"]) for i in model.inputs}
            with torch.no_grad():
                logits = model(**inputs).logits.numpy()
            differences[task] = float(np.abs(logits - served[f"{task}.logits"]).max())
    (OUT / "picture.svg").write_text(picture(compiled.program), encoding="utf-8")
    return differences


def report(served: Mapping[str, Any], differences: Mapping[str, float], head_only: Mapping[str, float]) -> None:
    """The table."""
    table = Table(title="One base, three tasks, ONNX Runtime without torch", title_justify="left")
    for column in ("task", "labels", "test rows", "accuracy", "head only", "parameters", "task file", "PyTorch − ORT"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for task, found in served["tasks"].items():
        table.add_row(
            task,
            str(found["labels"]),
            str(found["rows"]),
            f"{found['accuracy']:.3f}",
            f"{head_only[task]:.3f}",
            f"{found['parameters']:,}",
            f"{found['bytes'] / 1e6:.2f} MB",
            f"{differences[task]:.1e}",
        )
    console.print(table)
    latency = Table(title="Latency, 2 threads, median of interleaved runs", title_justify="left")
    for column in ("batch × tokens", "plain base", "task swapped each call", "ratio"):
        latency.add_column(column, justify="right")
    for row in served["latency"]:
        latency.add_row(
            row["shape"], f"{row['plain']:.2f} ms", f"{row['task']:.2f} ms", f"{row['task'] / row['plain']:.2f}"
        )
    console.print(latency)
    heavy = ", ".join(served["heavy"]) or "none"
    console.print(
        f"The base, once: {served['base_bytes'] / 1e6:.0f} MB. Loaded of torch and its kind while serving: {heavy}."
    )


if __name__ == "__main__":
    main()
