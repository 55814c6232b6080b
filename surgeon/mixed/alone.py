"""Operators written so that `torch.func.vmap` maps them over rows of any number.

Its own rules for these compute with the number of rows at hand, and would make it a constant of the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def alone(target: Any) -> Callable[..., Any]:
    """The operator, or what computes the same."""
    return SPELLED.get(target, target)  # type: ignore[no-any-return]


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    product = x @ weight.transpose(0, 1)
    return product if bias is None else product + bias


def _addmm(bias: Tensor, x: Tensor, weight: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return beta * bias + alpha * (x @ weight) if (beta, alpha) != (1, 1) else bias + x @ weight


def _embedding(table: Tensor, ids: Tensor, *_: Any) -> Tensor:
    rows = torch.gather(table, 0, ids.reshape(-1, 1).expand(-1, table.shape[1]))
    return rows.reshape(*ids.shape, table.shape[1])


SPELLED: dict[Any, Callable[..., Any]] = {
    aten.linear.default: _linear,
    aten.addmm.default: _addmm,
    aten.embedding.default: _embedding,
}
