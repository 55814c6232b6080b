"""Training of one task: rows of text and label in, trained deltas in the task's model out.

    rows = read_rows("reviews.csv", labels_of(model))
    result = train_task(model, load_tokenizer("build"), rows, None, TrainOptions(epochs=3))

For anything else, `Compiled.model(task)` is an `nn.Module` that `transformers.Trainer` takes as it is.
"""

from surgeon.train.batches import load_tokenizer
from surgeon.train.checkpoint import clear_checkpoints
from surgeon.train.evaluation import Evaluation, evaluate
from surgeon.train.loop import ProgressCallback, train_task
from surgeon.train.mixtures import Mixture, build_mixtures, mixtures, prune
from surgeon.train.options import TrainOptions
from surgeon.train.rows import Row, hold_out, labels_of, read_rows
from surgeon.train.run import DivergedError, Epoch, Progress, StepCallback, TrainResult

__all__ = [
    "DivergedError",
    "Epoch",
    "Evaluation",
    "Mixture",
    "Progress",
    "ProgressCallback",
    "Row",
    "StepCallback",
    "TrainOptions",
    "TrainResult",
    "build_mixtures",
    "clear_checkpoints",
    "evaluate",
    "hold_out",
    "labels_of",
    "load_tokenizer",
    "mixtures",
    "prune",
    "read_rows",
    "train_task",
]
