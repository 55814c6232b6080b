"""One graph for many tasks: every row of a batch has deltas of its own."""

from surgeon.mixed.banks import TASK_IDS, mixed
from surgeon.mixed.rows import ROWS

__all__ = ["ROWS", "TASK_IDS", "mixed"]
