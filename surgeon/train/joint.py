"""Tasks over one base in one training run, and the base's own weights where they are trained with them.

Over a frozen base the tasks are independent, and training them together is training each alone. With the base they
are Multi-Task Adapters (Pfeiffer et al., arXiv:2005.00247, section 2.2.2, after Stickland and Murray,
arXiv:1902.02671): every task's deltas, and one set of base weights that all of them move.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from surgeon.errors import DeltaError
from surgeon.ledger import Schedule
from surgeon.train.options import TrainOptions

if TYPE_CHECKING:
    from surgeon.model import TaskModel

TASKS, BASE = "tasks", "base"


class Joint:
    """Models over one base, by task; `base` holds the base's parameters where they are trained too.

    Tensors are named `tasks/TASK/NAME` and `base/NAME`. The order of the tasks does not matter.
    """

    def __init__(self, models: Mapping[str, TaskModel], *, train_base: bool = False) -> None:
        self.models = dict(sorted(models.items()))
        for name, model in self.models.items():
            if not any(p.requires_grad for p in model.parameters()):
                raise DeltaError(f"task '{name}' has no deltas to train", try_="give it a surgery, or labels")
        self.base: dict[str, nn.Parameter] = self.any.base_parameters() if train_base else {}

    @property
    def any(self) -> TaskModel:
        """One of the models, for what they have in common."""
        return next(iter(self.models.values()))

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return next(self.any.parameters()).device

    @property
    def cuda(self) -> list[torch.device]:
        """The device whose random state they use, if it is not the CPU."""
        return [self.device] if self.device.type == "cuda" else []

    def random_states(self) -> dict[str, Tensor]:
        """The random states that their dropout depends on."""
        return {"cpu": torch.get_rng_state(), **{d.type: torch.cuda.get_rng_state(d) for d in self.cuda}}

    def set_random_states(self, states: Mapping[str, Tensor]) -> None:
        """Go back to random states."""
        torch.set_rng_state(states["cpu"])
        for device in self.cuda:
            torch.cuda.set_rng_state(states["cuda"], device)

    def trained(self, tasks: Collection[str]) -> list[Tensor]:
        """What is trained by steps of these tasks."""
        models = [model for task, model in self.models.items() if task in tasks]
        own = [p for model in models for n in model.state_dict() if (p := model.get_parameter(n)).requires_grad]
        return [*own, *self.base.values()]

    @property
    def schedules(self) -> Iterator[tuple[str, int, Schedule]]:
        """What the techniques do between steps: task, number and schedule."""
        for task, model in self.models.items():
            yield from ((task, index, schedule) for index, schedule in enumerate(model.schedules))

    def parameter_groups(self, options: TrainOptions) -> list[dict[str, Any]]:
        """What is trained, as groups for an optimiser."""
        groups = [group for m in self.models.values() for group in m.parameter_groups(options.learning_rate)]
        base = {"params": list(self.base.values()), "lr": options.base_learning_rate}
        return [*groups, base] if self.base else groups

    def tensors(self) -> dict[str, Tensor]:
        """Copies of the tasks' tensors, and of the base's where it is trained, as they are now."""
        named = {f"{TASKS}/{task}/{name}": t for task, m in self.models.items() for name, t in m.state_dict().items()}
        named |= {f"{BASE}/{name}": parameter for name, parameter in self.base.items()}
        return {name: tensor.detach().clone() for name, tensor in named.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take such tensors."""
        for task, model in self.models.items():
            start = f"{TASKS}/{task}/"
            model.load_state_dict({n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)})
        with torch.no_grad():
            for name, parameter in self.base.items():
                parameter.copy_(tensors[f"{BASE}/{name}"])

    def train(self, mode: bool = True) -> None:
        """Put every model in training mode, or in evaluation mode."""
        for model in self.models.values():
            model.train(mode)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Let the base be trained, where it is; put everything back as it was where that fails."""
        before, modes = self.tensors(), {task: model.training for task, model in self.models.items()}
        for parameter in self.base.values():
            parameter.requires_grad_(True)
        try:
            yield
            self.train(False)
        except BaseException:
            self.load(before)
            for task, model in self.models.items():
                model.zero_grad()
                model.drop()
                model.train(modes[task])
            raise
        finally:
            for parameter in self.base.values():
                parameter.grad = None
                parameter.requires_grad_(False)
