"""One graph for many tasks: every row of a batch has deltas of its own."""

from surgeon.mixed.banks import TASKS, mixed
from surgeon.mixed.rows import ROWS, TASK_IDS

__all__ = ["ROWS", "TASKS", "TASK_IDS", "mixed"]
