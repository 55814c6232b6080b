"""Where the batch is in the values of a traced graph."""

from __future__ import annotations

from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor, fx

from surgeon.errors import CompositionError

aten = torch.ops.aten


class Batch:
    """The symbol of the number of texts, and which values have it."""

    def __init__(self, inputs: list[fx.Node]) -> None:
        sizes = [node.meta["val"].shape[0] for node in inputs]
        self.symbol = sizes[0].node.expr
        # Inputs may have come with a symbol each for the one batch.
        self._same = {symbolic(size): self.symbol for size in sizes}
        self._factors: dict[fx.Node, Any] = {}
        self._of_text: dict[fx.Node, bool] = {}

    def expression(self, size: Any) -> Any:
        """A size in symbols, of which one is the batch."""
        return symbolic(size).subs(self._same)

    def within(self, size: Any) -> bool:
        """Whether a size grows with the batch."""
        return self.symbol in self.expression(size).free_symbols

    def factor(self, node: fx.Node) -> Any:
        """How many entries of a tensor's first axis belong to one text; None where it is one for all texts.

        Raises CompositionError where the batch is another axis.
        """
        if node not in self._factors:
            self._factors[node] = self._factor(node)
        return self._factors[node]

    def _factor(self, node: fx.Node) -> Any:
        shape = node.meta["val"].shape
        found = [axis for axis, size in enumerate(shape) if self.within(size)]
        if not found:
            return None
        factor = sympy.cancel(self.expression(shape[0]) / self.symbol)
        if found != [0] or self.symbol in factor.free_symbols:
            raise CompositionError(
                "rows of several tasks need the batch as the first axis, and this base or technique has it elsewhere",
                there_is=f"{node} ({node.target}) of shape {list(shape)}",
                try_="`modes: [switch]` in `export`: one task a call",
            )
        return factor

    def of_text(self, node: fx.Node) -> bool:
        """Whether a value is computed from an input's values, and not from its sizes alone, as 0, 1, 2, … is."""
        if node not in self._of_text:
            pending = [node]
            while pending:
                at = pending[-1]
                operands = [] if at.target is aten.sym_size.int else at.all_input_nodes
                unknown = [n for n in operands if n not in self._of_text]
                if unknown:
                    pending += unknown
                    continue
                self._of_text[at] = at.op == "placeholder" or any(self._of_text[n] for n in operands)
                pending.pop()
        return self._of_text[node]


def symbolic(size: Any) -> Any:
    """A size as an expression."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def is_tensor(node: fx.Node) -> bool:
    """Whether a node's value is one tensor."""
    return isinstance(node.meta.get("val"), Tensor)
