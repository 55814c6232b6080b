"""Which task the next batch is of, and which rows: a function of the seed and the epoch alone."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import count

from surgeon.train.batches import epoch_order
from surgeon.train.kinds import Example


def draws(sizes: Mapping[str, int], exponent: float) -> dict[str, int]:
    """How many batches each task gives to an epoch, from how many it has: in proportion to size ** exponent.

    An epoch has as many batches as all tasks together; with exponent 1 that is each of them once. At least one each.
    """
    total, weights = sum(sizes.values()), {task: size**exponent for task, size in sizes.items()}
    exact = {task: total * weight / sum(weights.values()) for task, weight in weights.items()}
    counts = {task: int(wanted) for task, wanted in exact.items()}
    for task in sorted(sizes, key=lambda task: (counts[task] - exact[task], task))[: total - sum(counts.values())]:
        counts[task] += 1
    return {task: max(n, 1) for task, n in counts.items()}


def turns(counts: Mapping[str, int], seed: int, epoch: int) -> list[str]:
    """The task of every batch of an epoch, in random order."""
    order = [task for task in sorted(counts) for _ in range(counts[task])]
    random.Random(f"{seed}/{epoch}/turns").shuffle(order)
    return order


def epoch_batches(
    examples: Mapping[str, Sequence[Example]], counts: Mapping[str, int], batch_size: int, seed: int, epoch: int
) -> list[tuple[str, list[int]]]:
    """Task and rows of every batch of an epoch. A task that gives fewer batches than it has goes on in the next one."""
    streams = {task: _stream(rows, batch_size, seed, epoch * counts[task]) for task, rows in examples.items()}
    return [(task, next(streams[task])) for task in turns(counts, seed, epoch)]


def _stream(examples: Sequence[Example], batch_size: int, seed: int, begin: int) -> Iterator[list[int]]:
    """A task's batches from one on: pass after pass over its rows, each in another order."""
    first, skipped = divmod(begin, math.ceil(len(examples) / batch_size))
    for number in count(first):
        yield from epoch_order(examples, batch_size, seed, number)[skipped:]
        skipped = 0
