"""What a user may set for training: one frozen model whose fields are the options of `surgeon train`."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt


class TrainOptions(BaseModel):
    """How to train: AdamW, a warm-up and a decay, the best epoch kept."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    epochs: PositiveInt = Field(default=3, description="Passes over the rows.")
    learning_rate: PositiveFloat = Field(default=1e-3, description="Highest learning rate.")
    base_learning_rate: PositiveFloat = Field(
        default=1e-4, description="That of the base's own weights, where they are trained too."
    )
    sampling: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="Exponent of a task's size in how often it is drawn, where several are trained: 1 is by size, each "
        "row once an epoch; 0 is all tasks alike.",
    )
    batch_size: PositiveInt = Field(default=32, description="Rows at a time.")
    max_length: PositiveInt | None = Field(
        default=None, description="Tokens of a row that are kept; not set: 128, 384 of a question, 1024 of a prompt."
    )
    weight_decay: NonNegativeFloat = Field(default=0.0, description="Decoupled weight decay, on every delta.")
    warmup: float = Field(default=0.06, ge=0, lt=1, description="Share of the steps in which the learning rate rises.")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        default="linear", description="The learning rate after that."
    )
    seed: NonNegativeInt = Field(default=0, description="Seed of the order of rows and of dropout.")
    patience: PositiveInt | None = Field(default=None, description="Stop after so many epochs without a better one.")
    best_by: Literal["accuracy", "loss"] | None = Field(
        default=None, description="What tells the best epoch; not set: the loss for texts, the accuracy for the rest."
    )
    grad_clip: PositiveFloat | None = Field(default=1.0, description="Largest norm of the gradient.")
    gradient_accumulation: PositiveInt = Field(default=1, description="Batches to a step.")
    packing: bool = Field(default=False, description="Put several short texts in a row, each read as if alone.")
    gradient_checkpointing: bool = Field(
        default=False, description="Compute activations again in the backward pass: less memory, another forward."
    )
    checkpoint_steps: PositiveInt | None = Field(default=None, description="Steps between checkpoints within an epoch.")
    threads: PositiveInt | None = Field(default=None, description="CPU threads; as torch has them where not set.")

    def share(self, step: int, total: int) -> float:
        """The share of the learning rate at a step: up to 1 over the warm-up, then down to 0 or level."""
        warmup = int(self.warmup * total)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        left = (total - step) / max(total - warmup, 1)
        if self.schedule == "cosine":
            return 0.5 * (1 - math.cos(math.pi * left))
        return left if self.schedule == "linear" else 1.0
