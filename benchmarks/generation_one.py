"""One variant of the generation benchmark: waits for a line that names a work, does it, prints its seconds.

    python -m benchmarks.generation_one KIND BUILD TASK THREADS

Decoding is the time of a text less that of its first token, by the tokens between.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Write = Callable[[Sequence[list[int]], int], int]
"""Writes after prompts so many tokens a row; returns how many came in the longest."""
PROMPT, LONG, TEXT = 16, 600, 256
STEPS, FEW = 32, 12


def ours(build: str, task: str, threads: int) -> tuple[Write, Callable[[int], None]]:
    from surgeon.runtime import Session

    session = Session(build, threads=threads, verify=False)

    def write(prompts: Sequence[list[int]], count: int) -> int:
        rows = session.generate(prompts, task or None, max_new_tokens=count, batch=len(prompts))
        return max(len(row.tokens) for row in rows)

    def load(tasks: int) -> None:
        for i in range(len(session.tasks), tasks if task else 0):
            path = Path(build) / session.manifest.tasks[task].adapter
            session.add_task(path, f"task{i}")
            session.generate([[5, 6]], f"task{i}", max_new_tokens=2)

    return write, load


def genai(build: str, task: str, threads: int) -> tuple[Write, Callable[[int], None]]:
    import onnxruntime_genai as og

    config = og.Config(build)
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = og.Model(config)
    adapters = og.Adapters(model)
    adapters.load(str(next((Path(build) / "tasks").glob("*.onnx_adapter"))), task)

    def write(prompts: Sequence[list[int]], count: int) -> int:
        options = og.GeneratorParams(model)
        length = len(prompts[0]) + count
        options.set_search_options(max_length=length, min_length=length, do_sample=False, batch_size=len(prompts))
        generator = og.Generator(model, options)
        generator.set_active_adapter(adapters, task)
        generator.append_tokens(np.array(prompts, dtype=np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        return len(generator.get_sequence(0)) - len(prompts[0])

    return write, lambda tasks: None


def peft(build: str, task: str, threads: int) -> tuple[Write, Callable[[int], None]]:
    import torch
    from peft import LoraConfig, get_peft_model

    from benchmarks.generation import LORA, MODEL
    from surgeon.base import load_base
    from surgeon.spec import BaseSpec

    torch.set_num_threads(threads)
    base: Any = load_base(BaseSpec(model=MODEL, head="causal-lm"))
    options = LORA["lora"]
    config = LoraConfig(r=options["rank"], lora_alpha=options["alpha"], target_modules=["q_proj", "v_proj"])
    model: Any = get_peft_model(base, config).eval()
    model.generation_config.eos_token_id = None

    def write(prompts: Sequence[list[int]], count: int) -> int:
        ids = torch.tensor(prompts)
        with torch.no_grad():
            found = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )
        return int(found.shape[1] - ids.shape[1])

    return write, lambda tasks: None


def seconds(write: Write, prompts: Sequence[list[int]], count: int) -> tuple[float, int]:
    started = time.perf_counter()
    found = write(prompts, count)
    return time.perf_counter() - started, found


def decoded(write: Write, prompts: Sequence[list[int]], count: int) -> float:
    """Seconds of a step."""
    first, _ = seconds(write, prompts, 1)
    whole, found = seconds(write, prompts, count)
    return (whole - first) / (found - 1)


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096


def main() -> None:
    """Answer lines until there are none."""
    kind, build, task, threads = sys.argv[1:]
    write, load = {"ours": ours, "genai": genai, "peft": peft}[kind](build, task, int(threads))
    draw = np.random.default_rng(0)
    text = [int(i) for i in draw.integers(1000, 40000, LONG)]
    works: dict[str, Callable[[], Any]] = {
        "ready": lambda: f"{resident() / 1e6:.0f} MB",
        "prefill 256": lambda: seconds(write, [text[:TEXT]], 1)[0],
        "decode": lambda: decoded(write, [text[:PROMPT]], STEPS),
        "decode after 600": lambda: decoded(write, [text], FEW),
        "decode 8 rows": lambda: decoded(write, [text[i : i + PROMPT] for i in range(8)], FEW),
        "memory": lambda: json.dumps(memory(load, several=kind == "ours" and bool(task))),
    }
    for line in sys.stdin:
        print(works[line.strip()](), flush=True)


def memory(load: Callable[[int], None], *, several: bool) -> dict[str, int]:
    """Bytes in memory with one task and, of ours, with more."""
    found = {}
    for tasks in (1, 8, 64) if several else (1,):
        load(tasks)
        found[str(tasks)] = resident()
    return found


if __name__ == "__main__":
    main()
