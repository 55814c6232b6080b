"""How a compile grows with its base: memory with its bytes, time with its layers; and what places of weights cost.

    python -m benchmarks.growth [memory] [weights] [layers]     all of them write docs/growth.md; `make bench-growth`

Bases are Llamas of random numbers in a folder of `.safetensors` shards; every compile and every session has a process
of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.curve import curve
from benchmarks.machine import machine
from benchmarks.measure import Section

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE, PICTURE = DOCS / "growth.md", DOCS / "pictures" / "growth.svg"
GIB, MB = 2**30, 1e6
LADDER = (0.25, 0.5, 1.0, 2.0)
"""Gigabytes."""
LAYERS = (5, 10, 20, 40, 80)
BOUND, ROOM = 1.2, 2 * GIB
"""The aim: peak memory under so many times the base's bytes, and so many bytes more."""
PLACES = ("copy", "link", "reference")
SIZES: dict[str, Any] = {"vocab_size": 8000, "num_attention_heads": 16, "num_key_value_heads": 4, "use_cache": False}
STAGES = {
    "tracing": "tracing",
    "finding the anatomy": "finding the anatomy",
    "operating": "surgery and its checks",
    "converting to ONNX": "converting to ONNX",
}


def main() -> None:
    """Run the rooms named on the command line, or all; only a whole run writes the page."""
    rooms = {"memory": memory, "weights": places, "layers": layers}
    chosen = sys.argv[1:] or list(rooms)
    console, started = Console(), time.perf_counter()
    sections: list[Section] = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in chosen:
            for section in rooms[name](Path(scratch)):
                console.print(section.markdown())
                sections.append(section)
    if not sys.argv[1:]:
        PAGE.write_text(page(sections, time.perf_counter() - started), encoding="utf-8")
        console.print(f"wrote {PAGE} and {PICTURE}")


def page(sections: list[Section], seconds: float) -> str:
    """The whole page."""
    return (
        "# How a compile grows\n\nWritten by `make bench-growth`: Llamas of random numbers in fp32, LoRA r=8 on "
        "queries and values, one task, every compile in a process of its own.\n\n"
        f"Machine: {machine('torch', 'transformers', 'onnxruntime', 'onnx')}. "
        f"The whole run took {seconds / 60:.0f} minutes.\n"
    ) + "".join(f"\n{section.markdown()}" for section in sections)


def memory(scratch: Path) -> Iterator[Section]:
    """Peak memory of a compile over a ladder of sizes."""
    rows = []
    for gigabytes in LADDER:
        with _base(scratch, gigabytes) as (folder, size):
            found = _compile(scratch, folder, "copy")
        allowed = BOUND * size + ROOM
        rows.append(
            (
                f"{size / MB:.0f} MB",
                f"{found['seconds']:.1f} s",
                f"{found['peak'] / MB:.0f} MB",
                f"{(found['peak'] - found['imports']) / size:.2f}",
                f"{allowed / MB:.0f} MB",
                f"**{found['peak'] / allowed:.2f}**",
            )
        )
    yield Section(
        "Memory against the base's bytes",
        "Peak resident memory of the process, pages of mapped files counted in. *beyond imports* is what came on top "
        "of Python, torch and transformers, by the base's bytes. Aim: under 1.2 times the base's bytes and 2 GiB.",
        ("base", "compile", "peak", "beyond imports / base", "aim", "peak / aim"),
        tuple(rows),
    )


def places(scratch: Path) -> Iterator[Section]:
    """What a build and its sessions cost where the weights are copied, linked or stay in the checkpoint."""
    rows = []
    with _base(scratch, 1.0) as (folder, size):
        for place in PLACES:
            build = scratch / "build"
            made = _compile(scratch, folder, place, build)
            own = sum(f.stat().st_size for f in build.rglob("*") if f.is_file() and f.stat().st_nlink == 1)
            ran = _child("session", build)
            shutil.rmtree(build)
            rows.append(
                (
                    f"`{place}`",
                    f"{own / MB:.1f} MB",
                    f"{made['seconds']:.1f} s",
                    f"{made['peak'] / MB:.0f} MB",
                    f"{ran['opened']:.2f} s",
                    f"{ran['first']:.2f} s",
                    f"{ran['own'] / MB:.0f} MB",
                    f"{ran['files'] / MB:.0f} MB",
                )
            )
    yield Section(
        "Where the weights are",
        f"`export: {{weights: …}}` over a base of {size / MB:.0f} MB in fp32. *build* are the bytes that were written: "
        "a linked file is the checkpoint's own. A session opens the build, without hashing it, and answers once; *own* "
        "is the memory of its process then, and *mapped* are pages of files, which other processes share.",
        ("weights", "build", "compile", "peak", "session opens", "first answer", "own", "mapped"),
        tuple(rows),
    )


def layers(scratch: Path) -> Iterator[Section]:
    """Seconds of every stage against the number of layers, as a table and a picture."""
    found = {}
    for depth in LAYERS:
        spec = _spec({"config": {"model_type": "llama", **SIZES, **_tiny(depth)}}, "copy")
        found[depth] = _run(scratch, spec, scratch / f"layers-{depth}")
    total = {depth: run["seconds"] - run["stages"]["reading the base"] for depth, run in found.items()}
    stage: Callable[[int, str], float] = lambda depth, name: found[depth]["stages"][name]  # noqa: E731
    lines = {"all": [(float(d), total[d]) for d in LAYERS]}
    lines |= {said: [(float(d), stage(d, name)) for d in LAYERS] for name, said in STAGES.items()}
    PICTURE.write_text(curve("Seconds of a compile against layers", "layers", "s", lines), encoding="utf-8")
    yield Section(
        "Time against layers",
        "Llamas 64 wide, so that only the graph grows. *a layer* is the time that each layer costs between this depth "
        "and the one above.\n\n![Seconds against layers](pictures/growth.svg)",
        ("layers", *STAGES.values(), "all", "a layer", "peak"),
        tuple(
            (
                str(depth),
                *(f"{stage(depth, name):.2f} s" for name in STAGES),
                f"{total[depth]:.2f} s",
                f"{1000 * (total[depth] - total[before]) / (depth - before):.0f} ms" if before else "",
                f"{found[depth]['peak'] / MB:.0f} MB",
            )
            for before, depth in zip((0, *LAYERS), LAYERS, strict=False)
        ),
    )


def _tiny(depth: int) -> dict[str, Any]:
    return {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": depth, "max_position_embeddings": 128}


class _base:
    """A folder with a random Llama of about so many gigabytes, removed in the end; and its bytes."""

    def __init__(self, scratch: Path, gigabytes: float) -> None:
        self.folder = scratch / f"base-{gigabytes:g}"
        width, inner, depth = (1024, 4096, 4) if gigabytes < 1 else (2048, 8192, 4)
        layer = 4 * (width * width * 5 // 2 + 3 * width * inner)
        depth = round((gigabytes * 1e9 - 8 * SIZES["vocab_size"] * width) / layer)
        self.sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": depth}

    def __enter__(self) -> tuple[Path, int]:
        with torch.no_grad():
            model = LlamaForCausalLM(LlamaConfig(**SIZES, **self.sizes, max_position_embeddings=256))
        model.save_pretrained(self.folder, max_shard_size="500MB")
        return self.folder, sum(4 * p.numel() for p in model.parameters())

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder)


def _spec(base: dict[str, Any], place: str) -> dict[str, Any]:
    return {
        "base": {**base, "head": "causal-lm"},
        "surgery": [{"lora": {"rank": 8, "where": ["attention.query", "attention.value"]}}],
        "tasks": {"a": {}},
        "export": {"weights": place},
    }


def _compile(scratch: Path, folder: Path, place: str, build: Path | None = None) -> dict[str, Any]:
    out = build or scratch / "build"
    found = _run(scratch, _spec({"model": str(folder)}, place), out)
    if build is None:
        shutil.rmtree(out)
    return found


def _run(scratch: Path, spec: dict[str, Any], out: Path) -> dict[str, Any]:
    path = scratch / "spec.yaml"
    path.write_text(yaml.safe_dump(spec), encoding="utf-8")
    with tempfile.TemporaryDirectory() as cache:
        return _child("compile", path, out, SURGEON_CACHE=cache)


def _child(*arguments: str | Path, **environment: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.growth_once", *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
