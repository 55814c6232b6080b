"""Training: rows of the kind that its head learns from in, trained deltas in the task's model out.

    rows = kind_of(model).read("reviews.csv", {})
    result = train_task(model, load_tokenizer("build"), rows, None, TrainOptions(epochs=3))

Several tasks in one run, and with them the base's own weights if wanted, are trained by `train_tasks`. For anything
else, `Compiled.model(task)` is an `nn.Module` that `transformers.Trainer` takes as it is.
"""

from surgeon.train.batches import load_tokenizer
from surgeon.train.checkpoint import clear_checkpoints
from surgeon.train.evaluation import Evaluation, evaluate
from surgeon.train.kinds import Chat, Completion, Question, Words, kind_of
from surgeon.train.loop import ProgressCallback, train_task, train_tasks
from surgeon.train.mixtures import Mixture, build_mixtures, mixtures, prune
from surgeon.train.options import TrainOptions
from surgeon.train.outcome import DivergedError, Epoch, Progress, TrainResult
from surgeon.train.rows import Row, TaskRows, hold_out, labels_of, read_rows
from surgeon.train.run import StepCallback

__all__ = [
    "Chat",
    "Completion",
    "DivergedError",
    "Epoch",
    "Evaluation",
    "Mixture",
    "Progress",
    "ProgressCallback",
    "Question",
    "Row",
    "StepCallback",
    "TaskRows",
    "TrainOptions",
    "TrainResult",
    "Words",
    "build_mixtures",
    "clear_checkpoints",
    "evaluate",
    "hold_out",
    "kind_of",
    "labels_of",
    "load_tokenizer",
    "mixtures",
    "prune",
    "read_rows",
    "train_task",
    "train_tasks",
]
