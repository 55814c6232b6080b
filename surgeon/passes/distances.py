"""A bias by distance, as T5 adds to its scores, that counts the columns of a prefix among the keys.

    b[i, j] = table[bucket(position(j) - i)]      i a query, j a key; for texts alone position(j) = j

Told by its form: whole numbers of keys `[…, 1, keys]` less those of queries `[…, queries, 1]`, on the way to a table
whose rows are added to the scores. A window's mask has such a difference and no table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, fx

from surgeon.anatomy import Attention
from surgeon.dataflow import ancestors, descendants
from surgeon.errors import CompositionError
from surgeon.ledger import Delta
from surgeon.passes.columns import Columns, neutral, terms, widened
from surgeon.program import Program

Distances = Literal["none", "before", "first"]
SUB, EXPAND = torch.ops.aten.sub.Tensor, torch.ops.aten.expand.default
LOOKUP = torch.ops.aten.embedding.default


def count_distances(
    program: Program, sites: Sequence[Attention], prefix: Delta, counted: Literal["before", "first"]
) -> dict[fx.Node, bool]:
    """Give a prefix its columns in the biases by distance of these attentions; returns the biases that have them, and
    whether those columns that a task does not have are closed there, as where a bias has the mask in it.

    `before`: the prefix stands at -n … -1, and distances within the text are as they were. `first`: it stands at
    0 … n-1, and the text's keys, not its queries, move up by n. Raises CompositionError where other attentions add the
    same bias.
    """
    live = program.live(prefix, -2)
    biases = {bias: found for bias in _biases(sites) if (found := _distance(bias)) is not None}
    _refuse_others(program, sites, {distance for distance, _ in biases.values()})
    grown: dict[fx.Node, bool] = {}
    for distance, keys in dict.fromkeys(biases.values()):
        own = [bias for bias, found in biases.items() if found == (distance, keys)]
        way = {distance, *own} | (descendants(distance) & set().union(*map(ancestors, own)))
        distance.replace_input_with(keys, program.insert(_counted(counted), [keys, live], before=distance))
        closing = _widen_what_is_met(program, sorted(way), own[0], live)
        program.propagate(way)
        grown |= {bias: any(node is bias or node in ancestors(bias) for node in closing) for bias in own}
    return grown


def countable(sites: Sequence[Attention]) -> bool:
    """Whether these attentions, as they are in the base, have a bias by distance that can count a prefix."""
    return any(_distance(bias) is not None for bias in _biases(sites))


def _biases(sites: Sequence[Attention]) -> list[fx.Node]:
    return list(dict.fromkeys(term for site in sites for term in terms(site)))


def _refuse_others(program: Program, sites: Sequence[Attention], distances: set[fx.Node]) -> None:
    for other in program.anatomy.attentions:
        if other not in sites and any(distances & ancestors(term) for term in terms(other)):
            raise CompositionError(
                f"{other.label} adds the same bias by distance as {sites[0].label}, and has no part in this prefix",
                try_="one item for all attentions of a stack: `where: encoder/attention`, or none",
            )


def _widen_what_is_met(program: Program, way: Sequence[fx.Node], bias: fx.Node, live: fx.Node) -> list[fx.Node]:
    """Whatever else goes into a bias, such as a mask, gets neutral columns; returns where some are closed."""
    wide: dict[tuple[fx.Node, Columns], fx.Node] = {}
    closing = []
    for node in way:
        if node.target is EXPAND and _as_wide(node.args[0], bias):
            node.args = (node.args[0], [*node.args[1][:-1], -1])  # type: ignore[index,misc]
        for operand in node.all_input_nodes:
            if operand not in way and _as_wide(operand, bias):
                met = operand, neutral(node, operand)
                if met not in wide:
                    wide[met] = program.insert(widened(*met[1]), [operand, live], before=node)
                node.replace_input_with(operand, wide[met])
                closing += [node] * (operand.meta["val"].dtype == torch.bool or met[1][1] != 0.0)
    return closing


def _distance(bias: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The one difference of a key's number and a query's that a bias is looked up by, and the numbers of the keys."""
    found = []
    for node in ancestors(bias):
        sides = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
        if node.target is not SUB or len(sides) != 2 or node.meta["val"].is_floating_point():
            continue
        if not any(n.target is LOOKUP for n in descendants(node) & ancestors(bias)):
            continue
        own = [s for s in sides if _as_wide(s, bias) and s.meta["val"].dim() > 1 and s.meta["val"].shape[-2] == 1]
        if len(own) == 1 and next(s for s in sides if s is not own[0]).meta["val"].shape[-1] == 1:
            found.append((node, own[0]))
    return found[0] if len(found) == 1 else None


def _as_wide(node: object, bias: fx.Node) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[-1] == bias.meta["val"].shape[-1]


def _counted(counted: Literal["before", "first"]) -> Callable[[Tensor, Tensor], Tensor]:
    """Numbers of the keys `[…, n + keys]`; where tasks of several lengths share a batch, of those columns that live."""

    def places(keys: Tensor, live: Tensor) -> Tensor:
        own, n = live.cumsum(-1) - 1, live.sum(-1, keepdim=True)
        front, text = (own - n, keys) if counted == "before" else (own, keys + n)
        return torch.cat([front.to(keys.dtype).expand(*keys.shape[:-1], -1), text], -1)

    return places
