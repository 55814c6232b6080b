"""Writing texts, greedily, by chance or by beam search: many rows at a time, from a cache of ONNX Runtime's."""

from surgeon.runtime.generation.asking import Prompt, ask
from surgeon.runtime.generation.beams import check_beams
from surgeon.runtime.generation.decoder import Decoder
from surgeon.runtime.generation.options import Choice, check_counts, choice
from surgeon.runtime.generation.rows import Listener, Written
from surgeon.runtime.generation.sources import Pair, write_from
from surgeon.runtime.generation.writing import write

__all__ = [
    "Choice",
    "Decoder",
    "Listener",
    "Pair",
    "Prompt",
    "Written",
    "ask",
    "check_beams",
    "check_counts",
    "choice",
    "write",
    "write_from",
]
