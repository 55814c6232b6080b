"""Einstein sums spelled as matrix products, the form in which anatomy reads attention and projections."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from surgeon.dataflow import call_as

aten = torch.ops.aten


def spell_out(graph: fx.Graph) -> None:
    """Put a matrix product in the place of every einsum of two operands that is one.

    One letter is summed over, one is the columns' own, and one the rows' own, or several where nothing is batched.
    Products of two activations are attention's: without a softmax there is none, and sums stay as they are (a product
    of all pairs takes more memory in some recurrences).
    """
    attends = any(graph.find_nodes(op="call_function", target=t) for t in (aten.softmax.int, aten._softmax.default))
    for node in graph.find_nodes(op="call_function", target=aten.einsum.default):
        said, operands = node.args[:2]
        terms, _, out = said.replace(" ", "").partition("->")
        pair = list(zip(terms.split(","), operands, strict=True))
        if len(pair) != 2 or not out or not (terms.replace(",", "") + out).isalpha():
            continue
        if out[-1] in pair[0][0]:
            pair.reverse()  # the columns are the second operand's, as keys are
        (left, a), (right, b) = pair
        axes = _axes(left, right, out)
        if axes is None or not (attends or "get_attr" in (a.op, b.op)):
            continue
        batch, rows, summed, columns = axes
        with graph.inserting_before(node):
            a = _laid_out(node, a, left, batch + rows + summed)
            if right != batch + summed + columns:
                b = call_as(node, aten.transpose.int, (_laid_out(node, b, right, batch + columns + summed), -1, -2))
            product = call_as(node, aten.matmul.default, (a, b))
            product = _laid_out(node, product, batch + rows + columns, out)
        node.replace_all_uses_with(product)
        graph.erase_node(node)


def _axes(left: str, right: str, out: str) -> tuple[str, str, str, str] | None:
    """The letters that both have and keep, the left's own, those summed over, the right's own; None for other sums."""
    batch = "".join(i for i in out if i in left and i in right)
    rows = "".join(i for i in out if i in left and i not in right)
    summed = "".join(i for i in left if i in right and i not in out)
    columns = "".join(i for i in out if i in right and i not in left)
    once = sorted(batch + rows + summed) == sorted(left) and sorted(batch + columns + summed) == sorted(right)
    fits = len(summed) == len(columns) == 1 and (len(rows) == 1 or (rows and not batch))
    return (batch, rows, summed, columns) if once and fits else None


def _laid_out(of: fx.Node, value: Any, have: str, want: str) -> Any:
    """A value with its axes in another order."""
    order = [have.index(letter) for letter in want]
    return value if order == sorted(order) else call_as(of, aten.permute.default, (value, order))
