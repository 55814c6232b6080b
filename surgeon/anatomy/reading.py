"""What the first four steps of anatomy found, for the later ones to read."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from surgeon.anatomy.cores import Core
from surgeon.anatomy.facts import Facts
from surgeon.anatomy.norms import NormOp
from surgeon.anatomy.weighted import WeightedOp


@dataclass(frozen=True, eq=False)
class Reading:
    """All that the earlier steps found."""

    facts: Facts
    weighted: dict[Node, WeightedOp]
    norms: dict[Node, NormOp]
    cores: dict[Node, Core]
