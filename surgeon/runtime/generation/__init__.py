"""Writing texts with a decoder's build: greedily or by chance, many rows at a time, from a cache that stays with ONNX
Runtime.
"""

from surgeon.runtime.generation.asking import Prompt, ask
from surgeon.runtime.generation.decoder import Decoder
from surgeon.runtime.generation.options import Choice, check_counts, choice
from surgeon.runtime.generation.rows import Listener, Written
from surgeon.runtime.generation.writing import write

__all__ = ["Choice", "Decoder", "Listener", "Prompt", "Written", "ask", "check_counts", "choice", "write"]
