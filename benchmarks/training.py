"""A training step of the traced module with LoRA, against PEFT's."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from peft import LoraConfig, TaskType, get_peft_model

from benchmarks.bases import BASES, inputs, open_model
from benchmarks.measure import Section, interleave, milliseconds, ratio
from surgeon import compile

SHAPES = {"MiniLM-L6": [(32, 32, 15), (32, 64, 10)], "BERT-base": [(8, 64, 8)]}


def measure() -> Iterator[Section]:
    """One table."""
    rows = []
    for name, shapes in SHAPES.items():
        surgery = [{"lora": {"rank": 8, "where": ["attention.query", "attention.value"]}}]
        ours = compile({"base": BASES[name], "surgery": surgery, "tasks": {"t": {"labels": 2}}}).model("t").train()
        config = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], task_type=TaskType.SEQ_CLS)
        theirs = get_peft_model(open_model(name), config).train()
        for batch, tokens, rounds in shapes:
            times = interleave({"ours": step(ours, batch, tokens), "peft": step(theirs, batch, tokens)}, rounds)
            figures = (
                milliseconds(times["ours"]),
                milliseconds(times["peft"]),
                f"**{ratio(times, 'ours', 'peft'):.2f}**",
            )
            rows.append((f"{name}, {batch} × {tokens}", *figures))
    yield Section(
        "A training step",
        "LoRA r=8 on q and v with a classifier: forward, backward and an AdamW step. Aim: ours / PEFT ≤ 1.00.",
        ("base, batch × tokens", "ours", "PEFT", "ours / PEFT"),
        tuple(rows),
    )


def step(model: torch.nn.Module, batch: int, tokens: int) -> Callable[[], None]:
    """One step on a fixed batch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    arguments = inputs(batch, tokens) | {"labels": torch.arange(batch) % 2}

    def run() -> None:
        optimizer.zero_grad()
        model(**arguments).loss.backward()
        optimizer.step()

    return run
