"""A bias by distance, as T5 adds to its scores, that counts the columns of a prefix among the keys.

    b[i, j] = table[bucket(position(j) - i)]      i a query, j a key; for texts alone position(j) = j

Told by its form: whole numbers of keys `[…, 1, keys]` less those of queries `[…, queries, 1]`, on the way to what is
added to the scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, fx

from surgeon.anatomy import Attention
from surgeon.dataflow import ancestors, descendants
from surgeon.ledger import Delta
from surgeon.passes.columns import neutral, terms, widened
from surgeon.program import Program

Distances = Literal["none", "before", "first"]
SUB, EXPAND = torch.ops.aten.sub.Tensor, torch.ops.aten.expand.default


def count_distances(
    program: Program, sites: Sequence[Attention], prefix: Delta, counted: Distances
) -> dict[fx.Node, bool]:
    """Give a prefix its columns in the biases by distance of these attentions; returns the biases that have them, and
    whether those columns that a task does not have are closed there, as where a bias has the mask in it.

    `before`: the prefix stands at -n … -1, and distances within the text are as they were. `first`: it stands at
    0 … n-1, and the text's keys, not its queries, move up by n.
    """
    live = program.live(prefix, -2)
    biases = {bias: _distances(bias) for bias in dict.fromkeys(term for site in sites for term in terms(site))}
    grown: dict[fx.Node, bool] = {}
    for distance, keys in {node: keys for found in biases.values() for node, keys in found.items()}.items():
        own = [bias for bias, found in biases.items() if distance in found]
        way = {distance, *own} | (descendants(distance) & set().union(*map(ancestors, own)))
        distance.replace_input_with(keys, program.insert(_counted(counted), [keys, live], before=distance))
        closing = _widen_what_is_met(program, sorted(way), own[0], live)
        program.propagate(way)
        grown |= {bias: any(node is bias or node in ancestors(bias) for node in closing) for bias in own}
    return grown


def _widen_what_is_met(program: Program, way: Sequence[fx.Node], bias: fx.Node, live: fx.Node) -> list[fx.Node]:
    """Whatever else goes into a bias, such as a mask, gets neutral columns; returns where some are closed."""
    wide: dict[fx.Node, fx.Node] = {}
    closing = []
    for node in way:
        if node.target is EXPAND and _as_wide(node.args[0], bias):
            node.args = (node.args[0], [*node.args[1][:-1], -1])  # type: ignore[index,misc]
        for operand in node.all_input_nodes:
            if operand not in way and _as_wide(operand, bias):
                columns = neutral(node, operand)
                if operand not in wide:
                    wide[operand] = program.insert(widened(*columns), [operand, live], before=node)
                node.replace_input_with(operand, wide[operand])
                closing += [node] * (operand.meta["val"].dtype == torch.bool or columns[1] != 0.0)
    return closing


def _distances(bias: fx.Node) -> dict[fx.Node, fx.Node]:
    """Differences of a key's number and a query's on the way to a bias, and the numbers of the keys."""
    found = {}
    for node in ancestors(bias):
        sides = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
        if node.target is not SUB or len(sides) != 2 or node.meta["val"].is_floating_point():
            continue
        own = [s for s in sides if _as_wide(s, bias) and s.meta["val"].dim() > 1 and s.meta["val"].shape[-2] == 1]
        if len(own) == 1 and next(s for s in sides if s is not own[0]).meta["val"].shape[-1] == 1:
            found[node] = own[0]
    return found


def _as_wide(node: object, bias: fx.Node) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[-1] == bias.meta["val"].shape[-1]


def _counted(counted: Distances) -> Callable[[Tensor, Tensor], Tensor]:
    """Numbers of the keys `[…, n + keys]`; where tasks of several lengths share a batch, of those columns that live."""

    def places(keys: Tensor, live: Tensor) -> Tensor:
        own, n = live.cumsum(-1) - 1, live.sum(-1, keepdim=True)
        front, text = (own - n, keys) if counted == "before" else (own, keys + n)
        return torch.cat([front.to(keys.dtype).expand(*keys.shape[:-1], -1), text], -1)

    return places
