"""The state of a training run between two steps, and the step that changes it.

A checkpoint holds everything that the next step depends on, and the order of rows is a function of seed and epoch;
so a run that was killed and resumed ends with the weights of one that was not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from surgeon.train.checkpoint import Checkpoint
from surgeon.train.evaluation import Evaluation, evaluate_examples
from surgeon.train.identity import check_same_run
from surgeon.train.joint import Joint
from surgeon.train.kinds import Example, Kind, learned
from surgeon.train.options import TrainOptions
from surgeon.train.outcome import DivergedError, Epoch, Progress, TrainResult
from surgeon.train.processes import ALONE, Processes
from surgeon.train.sampling import draws, epoch_batches, turns

if TYPE_CHECKING:
    from surgeon.model import TaskModel

StepCallback = Callable[["TaskModel", int, int], None]


class Data(NamedTuple):
    """What a task is trained on and validated with, tokenized."""

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
        joint: Joint,
        options: TrainOptions,
        data: Mapping[str, Data],
        identity: dict[str, Any],
        processes: Processes = ALONE,
    ) -> None:
        self.joint, self.options, self.data, self.identity = joint, options, data, identity
        self.processes = processes
        self.best_by = options.best_by or next(iter(data.values())).kind.best_by
        self.trained = joint.trained(joint.models)
        groups = joint.parameter_groups(options)
        self.optimizer = torch.optim.AdamW(groups, weight_decay=options.weight_decay)
        self.rates = [group["lr"] for group in groups]
        self.optimizer.zero_grad()
        batches = {task: math.ceil(len(one.examples) / options.batch_size) for task, one in data.items()}
        self.draws = draws(batches, options.sampling)
        self.epoch_steps = math.ceil(sum(self.draws.values()) / options.gradient_accumulation)
        self.total = self.epoch_steps * options.epochs
        self.step = 0
        self.own = dict.fromkeys(data, 0)
        self.losses = 0.0
        self.last_loss = math.nan
        self.history: list[Epoch] = []
        self.best: dict[str, Tensor] = {}
        self.best_epoch = 0
        self.best_settled = False
        self.stopped = False
        totals = self._own_steps()
        for task, _, schedule in joint.schedules:
            schedule.begin(joint.models[task], totals[task])
        self.seconds = 0.0
        self.timed = 0

    def _own_steps(self) -> dict[str, int]:
        """How many steps of the run each task takes part in."""
        totals, accumulation = dict.fromkeys(self.draws, 0), self.options.gradient_accumulation
        for epoch in range(self.options.epochs):
            order = turns(self.draws, self.options.seed, epoch)
            for start in range(0, len(order), accumulation):
                for task in set(order[start : start + accumulation]):
                    totals[task] += 1
        return totals

    def steps(self, callbacks: Sequence[StepCallback]) -> Iterator[Progress]:
        """Take the steps that are left; yield after each, the last of an epoch after its evaluation."""
        accumulation, examples = self.options.gradient_accumulation, {t: one.examples for t, one in self.data.items()}
        while self.step < self.total and not self.stopped:
            epoch, begin = divmod(self.step, self.epoch_steps)
            order = epoch_batches(examples, self.draws, self.options.batch_size, self.options.seed, epoch)
            self.joint.train()
            for start in range(begin * accumulation, len(order), accumulation):
                clock = time.perf_counter()
                group = order[start : start + accumulation]
                self._advance([(task, [examples[task][i] for i in batch]) for task, batch in group], callbacks)
                self.seconds += time.perf_counter() - clock
                self.timed += 1
                if self.checkpoint_due() and not all(p.isfinite().all() for p in self.trained):
                    raise self._diverged("a weight is not finite", self.step)
                if self.step % self.epoch_steps == 0:
                    self._end_epoch(self._evaluate())
                yield self._progress(epoch + 1)

    def _evaluate(self) -> dict[str, Evaluation]:
        models, size, team = self.joint.models, self.options.batch_size, self.processes
        return {
            task: evaluate_examples(models[task], one.kind, one.held, one.pad, size, processes=team)
            for task, one in self.data.items()
            if one.held
        }

    def _advance(self, batches: list[tuple[str, list[Example]]], callbacks: Sequence[StepCallback]) -> None:
        """One optimiser step on the mean loss of all labels of `batches`, of which each process takes its share.

        A task that has none among them stays as it is.
        """
        models = {task: self.joint.models[task] for task, _ in batches}
        schedules = [(task, schedule) for task, _, schedule in self.joint.schedules if task in models]
        for task, schedule in schedules:
            schedule.before(models[task], self.own[task] + 1)
        total = self._gradients(batches)
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.options.grad_clip or math.inf)
        if not (math.isfinite(total) and torch.isfinite(norm)):
            what = "the gradient is not finite" if math.isfinite(total) else f"the loss is {total}"
            raise self._diverged(what, self.step + 1)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.options.share(self.step, self.total)
        self.optimizer.step()
        self.step += 1
        self.last_loss = total
        self.losses += total
        for task in models:
            self.own[task] += 1
        for task, schedule in schedules:
            schedule.after(models[task], self.own[task])
        for model in models.values():
            for callback in callbacks:
                callback(model, self.step, self.total)
        self.optimizer.zero_grad()

    def _gradients(self, batches: list[tuple[str, list[Example]]]) -> float:
        """Leave the gradients of the mean loss; returns that loss.

        A model's loss is the mean over the labels of one batch. Weighed by their number, batches that are accumulated
        and shares of other processes come to the mean over all.
        """
        device = self.joint.device
        labels = sum(learned(example) for _, batch in batches for example in batch)
        total = 0.0
        for task, whole in batches:
            if batch := self.processes.own(whole):
                weight = sum(map(learned, batch)) / labels
                loss = self.joint.models[task](**self.data[task].batch(batch, device)).loss * weight
                loss.backward()
                total += loss.item()
        if self.processes.count == 1:
            return total
        trained = self.joint.trained({task for task, _ in batches})
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        flat = self.processes.add(
            torch.cat([*(g.flatten().double() for g in own), torch.tensor([total]).double().to(device)])
        )
        pieces = torch.split(flat[:-1], [g.numel() for g in own])
        for parameter, piece in zip(trained, pieces, strict=True):
            parameter.grad = piece.view_as(parameter).to(parameter.dtype)
        return float(flat[-1])

    def _diverged(self, what: str, step: int) -> DivergedError:
        last = f"{self.last_loss:.4g} at step {self.step}" if self.step else "none"
        return DivergedError(
            f"{what} at step {step} of {self.total}",
            there_is=f"last finite loss: {last}; nothing was written",
            try_="a lower learning rate, or a longer warm-up",
        )

    def _end_epoch(self, found: Mapping[str, Evaluation]) -> None:
        loss = self.losses / self.epoch_steps
        self.losses = 0.0
        each = list(found.values())
        whole = [one.exact_match for one in each if one.exact_match is not None]
        self.history.append(
            Epoch(
                epoch=len(self.history) + 1,
                loss=loss,
                validation_loss=mean(one.loss for one in each) if each else None,
                accuracy=mean(one.accuracy for one in each) if each else None,
                exact_match=mean(whole) if whole else None,
                accuracies={task: one.accuracy for task, one in found.items()},
            )
        )
        now, best = self._merit(self.history[-1]), self._merit(self.history[self.best_epoch - 1])
        settled = all(schedule.settled(self.own[task]) for task, _, schedule in self.joint.schedules)
        better = self.best_epoch == 0 or now is None or best is None or now > best
        if better or (settled and not self.best_settled):
            self.best_settled = settled
            self.best_epoch = len(self.history)
            self.best = self.joint.tensors()
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
        tensors = {f"weights/{name}": tensor for name, tensor in self.joint.tensors().items()}
        tensors |= {f"best/{name}": tensor for name, tensor in self.best.items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{name}": moment for name, moment in moments.items()}
        for task, number, schedule in self.joint.schedules:
            tensors |= {f"schedule/{task}/{number}/{name}": tensor for name, tensor in schedule.state().items()}
        for rank, states in enumerate(self.processes.gather(self.joint.random_states())):
            tensors |= {f"random/{rank}/{name}": state for name, state in states.items()}
        state = {
            "identity": self.identity,
            "own": self.own,
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
        self.joint.load(found.under("weights"))
        self.best = found.under("best")
        moments: dict[int, dict[str, Tensor]] = {}
        for path, tensor in found.under("optimizer").items():
            index, name = path.split("/")
            moments.setdefault(int(index), {})[name] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        for task, number, schedule in self.joint.schedules:
            schedule.restore(found.under(f"schedule/{task}/{number}"))
        self.joint.set_random_states(found.under(f"random/{self.processes.rank}"))
        self.step, self.own = found.step, found.state["own"]
        self.history = [Epoch(**epoch) for epoch in found.state["history"]]
        self.best_epoch, self.stopped = found.state["best_epoch"], found.state["stopped"]
        self.best_settled = found.state["best_settled"]
        self.losses, self.last_loss = found.state["losses"], found.state["last_loss"]

    def finish(self, found: Checkpoint | None) -> TrainResult:
        """Put the best weights into the models and say what came out."""
        self.joint.load(self.best)
        best = self.history[self.best_epoch - 1]
        return TrainResult(
            best_epoch=self.best_epoch,
            best_accuracy=best.accuracy,
            best_loss=best.validation_loss,
            cut=sum(example.cut for one in self.data.values() for example in one.examples),
            history=tuple(self.history),
            steps=self.step,
            seconds_per_step=self.seconds / max(self.timed, 1),
            resumed_from=found.step if found else None,
            stopped_early=self.stopped and self.step < self.total,
        )
