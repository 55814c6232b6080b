"""What surgery inserts, as plain data: sites, shapes, parameters and bytes per task."""

from __future__ import annotations

from dataclasses import asdict, dataclass
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
    """All rows, and the totals of one task."""

    rows: tuple[PlanRow, ...]
    base_parameters: int

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
            "by_technique": self.by_technique(),
            "rows": [asdict(r) for r in self.rows],
        }


def plan(program: Program) -> Plan:
    """The plan of a program after its passes."""
    dropped = program.ledger.dropped(program.ledger.left_out)
    idle = program.ledger.idle(dropped)
    rows = [
        PlanRow(
            d.technique,
            d.role,
            d.site,
            d.part,
            d.name,
            d.shape,
            dict(d.free),
            prod(d.shape) if d.init and d.name not in idle else 0,
            (d.default.numel() if d.name in dropped else prod(d.shape)) * d.dtype.itemsize,
        )
        for d in program.ledger.deltas.values()
    ]
    rows += [
        PlanRow(t.technique, "", "", t.name, t.name, t.shape, {}, 0 if t.frozen or t.name in idle else prod(t.shape), 0)
        for t in program.ledger.trained.values()
    ]
    return Plan(tuple(rows), sum(program.tensor(n).numel() for n in program.frozen if _is_parameter(program, n)))


def _is_parameter(program: Program, name: str) -> bool:
    return name in dict(program.graph_module.named_parameters())
