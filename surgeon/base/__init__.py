"""The base: the frozen pretrained model, from a folder, a package, the hub, a configuration, or in hand.

It comes after the spec and before the trace. Safetensors only: nothing here unpickles, and no code of the model's own
folder runs unless the spec says so.
"""

from surgeon.base.checkpoint import Checkpoint
from surgeon.base.fingerprint import fingerprint
from surgeon.base.opening import Base, load_base, open_base
from surgeon.base.writing import write_base

__all__ = ["Base", "Checkpoint", "fingerprint", "load_base", "open_base", "write_base"]
