"""The kinds of rows that a task can be trained on, one for each head of a base."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from surgeon.errors import SpecError
from surgeon.train.kinds.classes import Classes
from surgeon.train.kinds.kind import IGNORED, Example, Kind, Room, learned, room
from surgeon.train.kinds.spans import Question, Spans
from surgeon.train.kinds.texts import Causal, Chat, Completion, SequenceToSequence
from surgeon.train.kinds.tokens import TokenClasses, Words
from surgeon.train.rows import Labels, labels_of

if TYPE_CHECKING:
    from surgeon.model import TaskModel

LABELLED: dict[str, Callable[[Labels], Kind[Any]]] = {
    "sequence-classification": Classes,
    "token-classification": TokenClasses,
}
PLAIN: dict[str, Callable[[], Kind[Any]]] = {
    "question-answering": Spans,
    "causal-lm": Causal,
    "seq2seq-lm": SequenceToSequence,
}


def takes_labels(head: str) -> bool:
    """Whether rows for this head name a label of the task's. Raises SpecError where no rows train this head."""
    if head not in LABELLED and head not in PLAIN:
        raise SpecError(
            f"rows from a file train no task of head '{head}'",
            there_is=[*LABELLED, *PLAIN],
            try_="train Compiled.model(task) with transformers.Trainer",
        )
    return head in LABELLED


def kind(head: str, labels: Labels) -> Kind[Any]:
    """What a task of this head and these labels is trained on. Raises SpecError where rows train no such task."""
    return LABELLED[head](labels) if takes_labels(head) else PLAIN[head]()


def kind_of(model: TaskModel) -> Kind[Any]:
    """What the task of this model is trained on."""
    return kind(model.head_name, labels_of(model) if takes_labels(model.head_name) else 0)


__all__ = [
    "IGNORED",
    "Causal",
    "Chat",
    "Classes",
    "Completion",
    "Example",
    "Kind",
    "Question",
    "Room",
    "SequenceToSequence",
    "Spans",
    "TokenClasses",
    "Words",
    "kind",
    "kind_of",
    "learned",
    "room",
    "takes_labels",
]
