"""What surgery inserts, as plain data: sites, shapes, parameters and bytes per task."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any

from surgeon.program import Program


@dataclass(frozen=True)
class PlanRow:
    """One delta or trained tensor; `parameters` counts trained values, `bytes` what is deployed."""

    technique: str
    role: str
    site: str
    part: str
    name: str
    shape: tuple[int, ...]
    free: dict[int, str]
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Plan:
    """All rows, and the totals of one task; the base's bytes as it is held, and as the checkpoint has it."""

    rows: tuple[PlanRow, ...]
    base_parameters: int
    base_bytes: int
    checkpoint_bytes: int
    weights: str = "copy"
    """How the ONNX model holds the base's matrices."""
    blocks: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Matrices that the base's file holds in blocks, by their form: how many stay so, and how many are dequantised."""

    @property
    def parameters(self) -> int:
        """Trained parameters of one task."""
        return sum(r.parameters for r in self.rows)

    @property
    def bytes(self) -> int:
        """Bytes of one task's deployed tensors."""
        return sum(r.bytes for r in self.rows)

    def by_technique(self) -> dict[str, int]:
        """Trained parameters per technique."""
        counts: dict[str, int] = {}
        for row in self.rows:
            counts[row.technique] = counts.get(row.technique, 0) + row.parameters
        return counts

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "parameters": self.parameters,
            "bytes": self.bytes,
            "base_parameters": self.base_parameters,
            "base_bytes": self.base_bytes,
            "checkpoint_bytes": self.checkpoint_bytes,
            "weights": self.weights,
            "blocks": self.blocks,
            "by_technique": self.by_technique(),
            "rows": [asdict(r) for r in self.rows],
        }


def plan(program: Program, weights: str = "copy", kept: Collection[str] = ()) -> Plan:
    """The plan of a program after its passes; `kept` names matrices that stay in the blocks of the base's file."""
    rows = [
        PlanRow(
            d.technique,
            d.role,
            d.site,
            d.part,
            d.name,
            d.shape,
            dict(d.free),
            prod(d.shape) if d.init else 0,
            prod(d.shape) * d.dtype.itemsize,
        )
        for d in program.ledger.deltas.values()
    ]
    rows += [
        PlanRow(t.technique, "", "", t.name, t.name, t.shape, {}, 0 if t.frozen else prod(t.shape), 0)
        for t in program.ledger.trained.values()
    ]
    parameters = {name for name, _ in program.graph_module.named_parameters()} & program.frozen
    stored = program.stored.values()
    count = sum(program.tensor(name).numel() for name in parameters) + sum(prod(entry.shape) for entry in stored)
    held, parts = base_bytes(program), {part for entry in stored for part in entry.parts}
    before = held - sum(_bytes(program, part) for part in parts)
    before += sum(prod(entry.shape) * entry.dtype.itemsize for entry in stored)
    blocks: dict[str, tuple[int, int]] = {}
    for name, form in program.quantised.forms.items():
        stay, go = blocks.get(form, (0, 0))
        blocks[form] = (stay + 1, go) if name in kept else (stay, go + 1)
    return Plan(tuple(rows), count, held, before, weights, blocks)


def base_bytes(program: Program) -> int:
    """Bytes of the base's tensors, as they are held."""
    return sum(_bytes(program, name) for name in program.frozen)


def _bytes(program: Program, name: str) -> int:
    tensor = program.tensor(name)
    return tensor.numel() * tensor.itemsize
