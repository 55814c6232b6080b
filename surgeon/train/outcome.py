"""What a training run tells on its way, and at its end."""

from __future__ import annotations

from dataclasses import dataclass, field

from surgeon.errors import DataError


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
    """One pass over the rows: mean training loss, and the validation where there is one; means over the tasks.

    No `exact_match` where a row has one label: it would be the accuracy.
    """

    epoch: int
    loss: float
    validation_loss: float | None
    accuracy: float | None
    exact_match: float | None = None
    accuracies: dict[str, float] = field(default_factory=dict)
    """By task."""


@dataclass(frozen=True)
class TrainResult:
    """What training came to. The models hold the weights of `best_epoch`: the last one without validation rows.

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
