"""Surgeon: a declarative model-surgery compiler.

    compiled = surgeon.compile("spec.yaml", out="build")     # needs the `compile` extra
    model = compiled.model("sentiment")                      # an nn.Module: train it as you like
    session = surgeon.Session("build")                       # needs onnxruntime alone
    session.run(inputs, task="sentiment")

The door is lazy: importing `surgeon` loads nothing heavy.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surgeon.compiler import Compiled, compile, load
    from surgeon.errors import SurgeonError
    from surgeon.runtime import Session
    from surgeon.spec import Spec, json_schema, read_spec

__version__ = "0.1.0"
__all__ = ["Compiled", "Session", "Spec", "SurgeonError", "compile", "json_schema", "load", "read_spec"]

_ROOMS = {
    "Compiled": "surgeon.compiler",
    "Session": "surgeon.runtime",
    "Spec": "surgeon.spec",
    "SurgeonError": "surgeon.errors",
    "compile": "surgeon.compiler",
    "json_schema": "surgeon.spec",
    "load": "surgeon.compiler",
    "read_spec": "surgeon.spec",
}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'surgeon' has no attribute '{name}'")
    return getattr(import_module(_ROOMS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
