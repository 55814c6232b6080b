"""How trained tensors begin: from a shape and a seeded generator."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Init = Callable[[tuple[int, ...], torch.Generator], Tensor]
"""Gives the starting value of a trained tensor, from its shape and a seeded generator."""


@dataclass(frozen=True)
class ByLabels:
    """An Init that depends on the names of the task's labels too: empty where it has none, None without a task."""

    fn: Callable[[tuple[int, ...], torch.Generator, Sequence[str] | None], Tensor]
    labels: Sequence[str] | None = None

    def __call__(self, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
        return self.fn(shape, rng, self.labels)


def generator(text: str) -> torch.Generator:
    """A generator seeded by a text."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big"))


def zeros(shape: tuple[int, ...], _: torch.Generator) -> Tensor:
    """All zeros."""
    return torch.zeros(shape)


def ones(shape: tuple[int, ...], _: torch.Generator) -> Tensor:
    """All ones."""
    return torch.ones(shape)


def normal(std: float) -> Init:
    """Zero-mean Gaussian."""
    return lambda shape, rng: torch.randn(shape, generator=rng) * std


def truncated_normal(std: float, bound: float) -> Init:
    """Zero-mean Gaussian cut at `bound` on either side."""
    return lambda shape, rng: torch.nn.init.trunc_normal_(torch.empty(shape), 0.0, std, -bound, bound, generator=rng)


def kaiming_uniform(fan_in_axis: int) -> Init:
    """Kaiming's uniform with a = √5, that is U(±1/√fan_in)."""

    def init(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
        bound = 1 / math.sqrt(shape[fan_in_axis])
        return (torch.rand(shape, generator=rng) * 2 - 1) * bound

    return init


def value(tensor: Tensor) -> Init:
    """A given value, such as the base's own bias."""
    return lambda _shape, _rng: tensor.detach().clone()
