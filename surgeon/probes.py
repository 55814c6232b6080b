"""Values inside the graph that passes marked for people to look at, such as attention over adapters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from surgeon.anatomy import Site

PROBE = "probe"
"""Where a node's `meta` has its mark."""


@dataclass(frozen=True)
class Probe:
    """Marks a value `[…, N]`: how much each of a site's N entries weighs.

    N is the free axis `symbol`; the trained tensor `index` says which of `names` the entries of a task are.
    """

    site: Site
    symbol: str
    names: tuple[str, ...]
    index: str


class Reader(fx.Interpreter):
    """Runs a graph with a task's deployed tensors, and keeps the marked values."""

    def __init__(self, graph: fx.GraphModule, deployed: Mapping[str, Tensor]) -> None:
        super().__init__(graph)
        self.deployed = deployed
        self.seen: list[tuple[Probe, Tensor]] = []

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A delta of the task, or else what the graph holds."""
        return self.deployed[target] if target in self.deployed else super().get_attr(target, args, kwargs)

    def run_node(self, node: fx.Node) -> Any:
        """Run a node, and keep what it gives if it is marked."""
        result = super().run_node(node)
        if PROBE in node.meta:
            self.seen.append((node.meta[PROBE], result))
        return result

    def read(self, inputs: Mapping[str, Tensor]) -> list[tuple[Probe, Tensor]]:
        """The marked values for these inputs of the graph, by name."""
        self.seen = []
        names = [str(node.target) for node in self.graph.nodes if node.op == "placeholder"]
        self.run(*(inputs[name] for name in names), enable_io_processing=False)
        return self.seen
