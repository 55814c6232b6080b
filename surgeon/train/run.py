"""The state of a training run between two steps, and the step that changes it.

A checkpoint holds everything that the next step depends on, and the order of rows is a function of seed and epoch;
so a run that was killed and resumed ends with the weights of one that was not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from surgeon.errors import DataError, DeltaError
from surgeon.train.batches import epoch_order
from surgeon.train.checkpoint import Checkpoint
from surgeon.train.evaluation import Evaluation, evaluate_examples
from surgeon.train.identity import check_same_run
from surgeon.train.kinds import Example, Kind, learned
from surgeon.train.options import TrainOptions
from surgeon.train.processes import ALONE, Processes

if TYPE_CHECKING:
    from surgeon.model import TaskModel

StepCallback = Callable[["TaskModel", int, int], None]


@dataclass(frozen=True)
class Progress:
    """Where training is, after every step and every evaluation."""

    step: int
    steps: int
    epoch: int
    epochs: int
    loss: float
    accuracy: float | None


@dataclass(frozen=True)
class Epoch:
    """One pass over the rows: mean training loss, and the validation where there is one."""

    epoch: int
    loss: float
    validation_loss: float | None
    accuracy: float | None
    exact_match: float | None = None


@dataclass(frozen=True)
class TrainResult:
    """What training came to. The model holds the weights of `best_epoch`: the last one without validation rows.

    `cut` is how many of the rows trained on were longer than what is kept of them.
    """

    best_epoch: int
    best_accuracy: float | None
    history: tuple[Epoch, ...]
    steps: int
    seconds_per_step: float
    resumed_from: int | None
    stopped_early: bool
    best_loss: float | None = None
    cut: int = 0


class DivergedError(DataError):
    """A loss, a gradient or a weight is not finite any more."""


class Data(NamedTuple):
    """What a run is trained on and validated with, tokenized."""

    kind: Kind[Any]
    examples: list[Example]
    held: list[Example]
    pad: int
    packing: bool = False

    def batch(self, examples: list[Example], device: torch.device) -> dict[str, Tensor]:
        """What the model is trained on at a time."""
        make = self.kind.packed if self.packing else self.kind.batch
        return make(examples, self.pad, device)


class Run:
    """The state of a run between two steps: what a checkpoint holds."""

    def __init__(
        self,
        model: TaskModel,
        options: TrainOptions,
        data: Data,
        identity: dict[str, Any],
        processes: Processes = ALONE,
    ) -> None:
        self.model, self.options, self.data, self.identity = model, options, data, identity
        self.processes = processes
        self.best_by = options.best_by or data.kind.best_by
        self.trained = [p for p in model.parameters() if p.requires_grad]
        if not self.trained:
            raise DeltaError("this task has no deltas to train", try_="give it a surgery, or labels")
        groups = model.parameter_groups(options.learning_rate)
        self.optimizer = torch.optim.AdamW(groups, weight_decay=options.weight_decay)
        self.rates = [group["lr"] for group in groups]
        self.optimizer.zero_grad()
        batches = math.ceil(len(data.examples) / options.batch_size)
        self.epoch_steps = math.ceil(batches / options.gradient_accumulation)
        self.total = self.epoch_steps * options.epochs
        self.step = 0
        self.losses = 0.0
        self.last_loss = math.nan
        self.history: list[Epoch] = []
        self.best: dict[str, Tensor] = {}
        self.best_epoch = 0
        self.best_settled = False
        self.stopped = False
        for schedule in model.schedules:
            schedule.begin(model, self.total)
        self.seconds = 0.0
        self.timed = 0

    def steps(self, callbacks: Sequence[StepCallback]) -> Iterator[Progress]:
        """Take the steps that are left; yield after each, the last of an epoch after its evaluation."""
        accumulation, examples = self.options.gradient_accumulation, self.data.examples
        while self.step < self.total and not self.stopped:
            epoch, begin = divmod(self.step, self.epoch_steps)
            order = epoch_order(examples, self.options.batch_size, self.options.seed, epoch)
            self.model.train()
            for start in range(begin * accumulation, len(order), accumulation):
                clock = time.perf_counter()
                group = order[start : start + accumulation]
                self._advance([[examples[i] for i in batch] for batch in group], callbacks)
                self.seconds += time.perf_counter() - clock
                self.timed += 1
                if self.checkpoint_due() and not all(p.isfinite().all() for p in self.trained):
                    raise self._diverged("a weight is not finite", self.step)
                if self.step % self.epoch_steps == 0:
                    self._end_epoch(self._evaluate())
                yield self._progress(epoch + 1)

    def _evaluate(self) -> Evaluation | None:
        kind, held, pad, size = self.data.kind, self.data.held, self.data.pad, self.options.batch_size
        return evaluate_examples(self.model, kind, held, pad, size, processes=self.processes) if held else None

    def _advance(self, batches: list[list[Example]], callbacks: Sequence[StepCallback]) -> None:
        """One optimiser step on the mean loss of all labels of `batches`, of which each process takes its share."""
        for schedule in self.model.schedules:
            schedule.before(self.model, self.step + 1)
        total = self._gradients(batches)
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.options.grad_clip or math.inf)
        if not (math.isfinite(total) and torch.isfinite(norm)):
            what = "the gradient is not finite" if math.isfinite(total) else f"the loss is {total}"
            raise self._diverged(what, self.step + 1)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * share(self.step, self.total, self.options)
        self.optimizer.step()
        self.step += 1
        self.last_loss = total
        self.losses += total
        for schedule in self.model.schedules:
            schedule.after(self.model, self.step)
        for callback in callbacks:
            callback(self.model, self.step, self.total)
        self.optimizer.zero_grad()

    def _gradients(self, batches: list[list[Example]]) -> float:
        """Leave the gradients of the mean loss; returns that loss.

        A model's loss is the mean over the labels of one batch. Weighed by their number, batches that are accumulated
        and shares of other processes come to the mean over all.
        """
        device = self.trained[0].device
        labels = sum(learned(example) for batch in batches for example in batch)
        total = 0.0
        for batch in filter(None, map(self.processes.own, batches)):
            weight = sum(map(learned, batch)) / labels
            loss = self.model(**self.data.batch(batch, device)).loss * weight
            loss.backward()
            total += loss.item()
        if self.processes.count == 1:
            return total
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.trained]
        flat = self.processes.add(
            torch.cat([*(g.flatten().double() for g in own), torch.tensor([total]).double().to(device)])
        )
        pieces = torch.split(flat[:-1], [g.numel() for g in own])
        for parameter, piece in zip(self.trained, pieces, strict=True):
            parameter.grad = piece.view_as(parameter).to(parameter.dtype)
        return float(flat[-1])

    def _diverged(self, what: str, step: int) -> DivergedError:
        last = f"{self.last_loss:.4g} at step {self.step}" if self.step else "none"
        return DivergedError(
            f"{what} at step {step} of {self.total}",
            there_is=f"last finite loss: {last}; nothing was written",
            try_="a lower learning rate, or a longer warm-up",
        )

    def _end_epoch(self, found: Evaluation | None) -> None:
        loss = self.losses / self.epoch_steps
        self.losses = 0.0
        figures = (found.loss, found.accuracy, found.exact_match) if found else (None, None, None)
        self.history.append(Epoch(len(self.history) + 1, loss, *figures))
        now, best = self._merit(self.history[-1]), self._merit(self.history[self.best_epoch - 1])
        settled = all(s.settled(self.step) for s in self.model.schedules)
        better = self.best_epoch == 0 or now is None or best is None or now > best
        if better or (settled and not self.best_settled):
            self.best_settled = settled
            self.best_epoch = len(self.history)
            self.best = copy_weights(self.model)
        patience = self.options.patience
        self.stopped = settled and patience is not None and len(self.history) - self.best_epoch >= patience

    def _merit(self, epoch: Epoch) -> float | None:
        """What makes one epoch better than another."""
        if epoch.accuracy is None or epoch.validation_loss is None:
            return None
        return epoch.accuracy if self.best_by == "accuracy" else -epoch.validation_loss

    def _progress(self, epoch: int) -> Progress:
        accuracy = self.history[-1].accuracy if self.history else None
        return Progress(self.step, self.total, epoch, self.options.epochs, self.last_loss, accuracy)

    def checkpoint_due(self) -> bool:
        """After every epoch, and every so many steps where the options say so."""
        every = self.options.checkpoint_steps
        return self.step % self.epoch_steps == 0 or (every is not None and self.step % every == 0)

    def checkpoint(self) -> Checkpoint:
        """Everything that the steps to come depend on."""
        tensors = {f"weights/{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"best/{name}": tensor for name, tensor in self.best.items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{name}": moment for name, moment in moments.items()}
        for index, schedule in enumerate(self.model.schedules):
            tensors |= {f"schedule/{index}/{name}": tensor for name, tensor in schedule.state().items()}
        for rank, states in enumerate(self.processes.gather(random_states(self.model))):
            tensors |= {f"random/{rank}/{name}": state for name, state in states.items()}
        state = {
            "identity": self.identity,
            "history": [asdict(epoch) for epoch in self.history],
            "best_epoch": self.best_epoch,
            "best_settled": self.best_settled,
            "losses": self.losses,
            "last_loss": self.last_loss,
            "stopped": self.stopped,
        }
        return Checkpoint(self.step, tensors, state)

    def restore(self, found: Checkpoint, folder: Path | None) -> None:
        """Go back to where a checkpoint was written. Raises DataError where it is of another run."""
        check_same_run(found.state["identity"], self.identity, folder)
        self.model.load_state_dict(found.under("weights"))
        self.best = found.under("best")
        moments: dict[int, dict[str, Tensor]] = {}
        for path, tensor in found.under("optimizer").items():
            index, name = path.split("/")
            moments.setdefault(int(index), {})[name] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        for place, schedule in enumerate(self.model.schedules):
            schedule.restore(found.under(f"schedule/{place}"))
        states = found.under(f"random/{self.processes.rank}")
        torch.set_rng_state(states["cpu"])
        for device in cuda_devices(self.model):
            torch.cuda.set_rng_state(states["cuda"], device)
        self.step = found.step
        self.history = [Epoch(**epoch) for epoch in found.state["history"]]
        self.best_epoch, self.stopped = found.state["best_epoch"], found.state["stopped"]
        self.best_settled = found.state["best_settled"]
        self.losses, self.last_loss = found.state["losses"], found.state["last_loss"]

    def finish(self, found: Checkpoint | None) -> TrainResult:
        """Put the best weights into the model and say what came out."""
        self.model.load_state_dict(self.best)
        self.model.eval()
        best = self.history[self.best_epoch - 1]
        return TrainResult(
            best_epoch=self.best_epoch,
            best_accuracy=best.accuracy,
            best_loss=best.validation_loss,
            cut=sum(example.cut for example in self.data.examples),
            history=tuple(self.history),
            steps=self.step,
            seconds_per_step=self.seconds / max(self.timed, 1),
            resumed_from=found.step if found else None,
            stopped_early=self.stopped and self.step < self.total,
        )


def share(step: int, total: int, options: TrainOptions) -> float:
    """The share of the learning rate at a step: up to 1 over the warm-up, then down to 0 or level."""
    warmup = int(options.warmup * total)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    left = (total - step) / max(total - warmup, 1)
    if options.schedule == "cosine":
        return 0.5 * (1 - math.cos(math.pi * left))
    return left if options.schedule == "linear" else 1.0


def copy_weights(model: TaskModel) -> dict[str, Tensor]:
    """The task's tensors as they are now."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def cuda_devices(model: TaskModel) -> list[torch.device]:
    """The device whose random state the model uses, if it is not the CPU."""
    device = next(model.parameters()).device
    return [device] if device.type == "cuda" else []


def random_states(model: TaskModel) -> dict[str, Tensor]:
    """The random states that the model's dropout depends on."""
    states = {"cpu": torch.get_rng_state()}
    for device in cuda_devices(model):
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states
