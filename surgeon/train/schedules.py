"""The techniques' schedules in somebody else's training loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from surgeon.model import TaskModel


class ScheduleCallback(TrainerCallback):
    """Lets `transformers.Trainer` do what the techniques of a task ask for between steps (AdaLoRA's budget, say).

    Trainer(model=model, callbacks=[ScheduleCallback(model)], …)
    """

    def __init__(self, model: TaskModel) -> None:
        self.model = model

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Tell the schedules how long the run is."""
        for schedule in self.model.schedules:
            schedule.begin(self.model, state.max_steps)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Before the forward pass."""
        for schedule in self.model.schedules:
            schedule.before(self.model, state.global_step + 1)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """After the optimiser's step, before the gradients go."""
        for schedule in self.model.schedules:
            schedule.after(self.model, state.global_step + 1)
