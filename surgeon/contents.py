"""What a build is written from, and what its manifest says of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from surgeon.base import Base
from surgeon.exporters.generation import generation
from surgeon.exporters.versions import tool_version, tool_versions
from surgeon.halves import Halves
from surgeon.model import TaskModel
from surgeon.plan import base_bytes
from surgeon.program import Program
from surgeon.runtime.manifest import FORMAT
from surgeon.spec import Spec


@dataclass(frozen=True)
class Contents:
    """What a build is written from."""

    spec: Spec
    base: Base
    whole: Program
    models: Mapping[str, TaskModel]
    served: Program | Halves | None = None
    """What writes texts: a decoder's program, exported in place of the `whole`, or the halves of an encoder-decoder."""

    @property
    def program(self) -> Program:
        """What `model.onnx` is made from."""
        return self.served if isinstance(self.served, Program) else self.whole

    @property
    def halves(self) -> Halves | None:
        """What stands beside it."""
        return self.served if isinstance(self.served, Halves) else None

    @property
    def generation(self) -> dict[str, Any] | None:
        """How texts are written, if they are."""
        return None if self.served is None else generation(self.base, self.served)


def describe(contents: Contents, facts: Mapping[str, Any]) -> dict[str, Any]:
    base, program = contents.base, contents.program
    return {
        "format": FORMAT,
        "surgeon": tool_version("modelsurgeon"),
        "base": {
            "source": base.source,
            "architecture": type(base.model).__name__,
            "head": base.head,
            "fingerprint": program.fingerprint,
            "parameters": sum(p.numel() for p in base.model.parameters()),
            "max_length": base.max_length,
            "labels": _own_labels(base),
            "bytes": base_bytes(program),
            "stored": {entry.name: entry.form for entry in program.stored.values()},
            "drift": program.drift,
        },
        "weights": contents.spec.export.weights,
        "modes": list(contents.spec.export.modes),
        "inputs": [
            {
                "name": i.name,
                "dtype": str(i.dtype).removeprefix("torch."),
                "axes": [_alone(axis) for axis in i.axes],
                "fill": i.fill,
            }
            for i in program.inputs
            if not i.cached
        ],
        "deltas": [
            {
                "name": d.name,
                "shape": list(d.shape),
                "free": {str(axis): symbol for axis, symbol in d.free.items()},
                "dtype": str(d.dtype).removeprefix("torch."),
                "technique": d.technique,
                "site": d.site,
                "part": d.part,
                "role": d.role,
                "stack": d.stack,
                "layer": d.layer,
                "optional": d.optional,
                "droppable": d.droppable,
                "least": {str(axis): size for axis, size in d.least.items()},
                "padding": d.padding,
                "once": d.once,
            }
            for d in program.ledger.deltas.values()
        ],
        "positions": dict(program.ledger.positions),
        "counted": dict(program.counted),
        "generation": contents.generation,
        "tools": tool_versions(),
        **facts,
    }


def _own_labels(base: Base) -> list[str] | None:
    """Names of the classes of the base's own head, where it classifies and they have names."""
    names = [*(base.model.config.id2label or {}).values()] if base.head == "sequence-classification" else []
    return None if not names or all(name.startswith("LABEL_") for name in names) else names


def _alone(axis: str | int) -> str | int:
    """An axis as a caller sees it who gives a whole text, without a past."""
    return axis.removeprefix("past+") if isinstance(axis, str) else axis
