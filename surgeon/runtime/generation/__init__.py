"""Writing texts, greedily, by chance or by beam search: many rows at a time, from a cache of ONNX Runtime's."""

from surgeon.runtime.generation.aligned import Aligned
from surgeon.runtime.generation.asking import Prompt, ask, check_list
from surgeon.runtime.generation.beams import Beams, check_beams
from surgeon.runtime.generation.decoder import Decoder
from surgeon.runtime.generation.decoding import Decoding, OneTask, TaskPerRow
from surgeon.runtime.generation.groups import Groups
from surgeon.runtime.generation.halves import Halves, OneTaskHalves, Pair, TaskPerRowHalves
from surgeon.runtime.generation.options import Choice, check_counts, choice
from surgeon.runtime.generation.rows import Listener, Row, Written
from surgeon.runtime.generation.searching import search
from surgeon.runtime.generation.slots import Slots
from surgeon.runtime.generation.writing import Together, Writer, follow, write

__all__ = [
    "Aligned",
    "Beams",
    "Choice",
    "Decoder",
    "Decoding",
    "Groups",
    "Halves",
    "Listener",
    "OneTask",
    "OneTaskHalves",
    "Pair",
    "Prompt",
    "Row",
    "Slots",
    "TaskPerRow",
    "TaskPerRowHalves",
    "Together",
    "Writer",
    "Written",
    "ask",
    "check_beams",
    "check_counts",
    "check_list",
    "choice",
    "follow",
    "search",
    "write",
]
