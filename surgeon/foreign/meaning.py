"""What the deltas of a build mean: facts that are in its spec's options and in its folds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from surgeon.anatomy import Projection
from surgeon.compiler import Compiled, passes
from surgeon.ledger import Ledger


def steps(compiled: Compiled, technique: str) -> list[Any]:
    """The spec's passes of one technique: their options say what a delta means."""
    return [step for step in passes(compiled.spec) if step.name == technique]


def scales_input(compiled: Compiled, site: Projection) -> bool:
    """Whether the build's IA3 scales what `site` takes, not what it gives."""
    program = compiled.program
    return any(s.inward(program, site) for s in steps(compiled, "ia3") if site in s.sites(program))


def own_scale(ledger: Ledger, name: str, rank: int) -> float:
    """By what the build multiplies the product whose trained B is `name`, of this rank, where it deploys it."""
    fold = next((f for f in ledger.folds if name in f.outputs), None)
    if fold is None:
        return 1.0
    factor = torch.ones(max(rank, 1), 1, dtype=torch.float64)
    if fold.inputs == (name,):
        return float(fold.fn(factor)[0][0, 0])
    a, between, _ = fold.inputs
    if between == name:  # DoRA: B·(m / n) and m / n - 1, here for a product that is zero
        width = ledger.deltas[name].shape[1]
        zero = torch.zeros(ledger.deltas[a].shape[0], len(factor), dtype=torch.float64)
        b, gain = fold.fn(zero, factor.expand(-1, width), torch.ones(width, dtype=torch.float64))
        return float(b[0, 0] / (gain[0] + 1))
    return float(fold.fn(factor.T, factor[:, 0], factor)[1][0, 0])  # AdaLoRA: A, E, B


def times(tensor: Tensor, ratio: float) -> Tensor:
    """`tensor * ratio`, and the very tensor where the ratio is one."""
    return tensor if ratio == 1 else (tensor.double() * ratio).to(tensor.dtype)
