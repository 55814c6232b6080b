"""Several processes that train one task together, each with a share of every batch: accelerate's, or this one alone.

What has to be summed at a step is one vector, and the module needs no wrapper. It is short where only deltas are
trained: the base's gradients do not exist then.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from surgeon.errors import DataError

if TYPE_CHECKING:
    from accelerate import PartialState

T = TypeVar("T")


class Processes:
    """This process among those that train with it; without `state` it is the only one."""

    def __init__(self, state: PartialState | None = None) -> None:
        self._state = state
        self.count = state.num_processes if state else 1
        self.rank = state.process_index if state else 0

    @property
    def leads(self) -> bool:
        """Whether it is this process that writes files and tells how it goes."""
        return self.rank == 0

    @property
    def device(self) -> torch.device | None:
        """Where this process should train; None leaves the model where it is."""
        return self._state.device if self._state else None

    def own(self, items: Sequence[T]) -> list[T]:
        """This process' share of what all have."""
        return list(items[self.rank :: self.count])

    def add(self, vector: Tensor) -> Tensor:
        """The sum of every process' vector."""
        if self._state is None:
            return vector
        from accelerate.utils import reduce

        summed: Tensor = reduce(vector.to(self._state.device), "sum")
        return summed.to(vector.device)

    def gather(self, thing: Any) -> list[Any]:
        """Every process' object, in order."""
        if self._state is None:
            return [thing]
        from accelerate.utils import gather_object

        gathered: list[Any] = gather_object([thing])
        return gathered

    def agree(self, thing: Any) -> None:
        """Raise DataError where the processes do not all begin with the same."""
        every = self.gather(thing)
        if any(other != every[0] for other in every):
            raise DataError(
                "the processes do not begin with the same rows, options and weights",
                try_="one machine's files for all, and packages of the same versions",
            )

    def wait(self) -> None:
        """Until all processes are here."""
        if self._state is not None:
            self._state.wait_for_everyone()


ALONE = Processes()


def processes() -> Processes:
    """The processes that `accelerate launch` or `torchrun` has started, this one among them; or this one alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return ALONE
    from accelerate import PartialState

    return Processes(PartialState(cpu=not torch.cuda.is_available()))
