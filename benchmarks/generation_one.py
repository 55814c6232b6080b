"""One variant of the generation benchmark: waits for a line that names a work, does it, prints its seconds.

    python -m benchmarks.generation_one KIND BUILD TASK THREADS

Decoding is the median time from a token to the next.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

Write = Callable[[Sequence[list[int]], int], list[float]]
"""Writes after prompts so many tokens a row; returns when each came."""
PROMPT, LONG, TEXT = 16, 600, 256
STEPS = 24


def ours(build: str, task: str, threads: int) -> tuple[Write, Callable[[int], None]]:
    from surgeon.runtime import Session
    from surgeon.runtime.generation import decoding

    came: list[float] = []

    class Stamped(decoding.Decoder):
        def step(self, *given: Any) -> Any:
            found = super().step(*given)
            came.append(time.perf_counter())
            return found

    decoding.Decoder = Stamped  # type: ignore[misc]
    session = Session(build, threads=threads, verify=False)

    def write(prompts: Sequence[list[int]], count: int) -> list[float]:
        came.clear()
        session.generate(prompts, task or None, max_new_tokens=count, batch=len(prompts))
        return came[len(prompts) - 1 :]  # prompts are read one by one

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

    def write(prompts: Sequence[list[int]], count: int) -> list[float]:
        options = og.GeneratorParams(model)
        length = len(prompts[0]) + count
        options.set_search_options(max_length=length, min_length=length, do_sample=False, batch_size=len(prompts))
        generator = og.Generator(model, options)
        generator.set_active_adapter(adapters, task)
        generator.append_tokens(np.array(prompts, dtype=np.int32))
        came = []
        while not generator.is_done():
            generator.generate_next_token()
            came.append(time.perf_counter())
        return came

    return write, lambda tasks: None


def peft(build: str, task: str, threads: int) -> tuple[Write, Callable[[int], None]]:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import StoppingCriteriaList

    from benchmarks.generation import LORA, MODEL
    from surgeon.base import load_base
    from surgeon.spec import BaseSpec

    torch.set_num_threads(threads)
    base: Any = load_base(BaseSpec(model=MODEL, head="causal-lm"))
    options = LORA["lora"]
    config = LoraConfig(r=options["rank"], lora_alpha=options["alpha"], target_modules=["q_proj", "v_proj"])
    model: Any = get_peft_model(base, config).eval()
    model.generation_config.eos_token_id = None

    def write(prompts: Sequence[list[int]], count: int) -> list[float]:
        ids, came = torch.tensor(prompts), []

        def stamp(tokens: torch.Tensor, _: Any, **__: Any) -> torch.Tensor:
            came.append(time.perf_counter())
            return torch.zeros(len(tokens), dtype=torch.bool)

        with torch.no_grad():
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([stamp]),  # type: ignore[list-item]
            )
        return came

    return write, lambda tasks: None


def prefilled(write: Write, prompt: list[int]) -> float:
    """Seconds to the first token."""
    started = time.perf_counter()
    return write([prompt], 1)[0] - started


def decoded(write: Write, prompts: Sequence[list[int]]) -> float:
    """Seconds of a step."""
    came = write(prompts, STEPS)
    return statistics.median(b - a for a, b in pairwise(came))


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
        "prefill 256": lambda: prefilled(write, text[:TEXT]),
        "decode": lambda: decoded(write, [text[:PROMPT]]),
        "decode after 600": lambda: decoded(write, [text]),
        "decode 8 rows": lambda: decoded(write, [text[i : i + PROMPT] for i in range(8)]),
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
