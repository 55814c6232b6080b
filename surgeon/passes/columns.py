"""Masks and biases of attention scores that grow by the columns of a prefix.

Whatever meets the scores gets neutral columns in front: open in a mask, zero in a bias, one in a factor. Where tasks of
several lengths share a batch, the columns that a task does not have are closed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, fx

from surgeon.anatomy import Attention
from surgeon.dataflow import ancestors, descendants
from surgeon.errors import CompositionError, InvariantError
from surgeon.ledger import Delta
from surgeon.program import Program

NONE: Mapping[fx.Node, bool] = MappingProxyType({})
HIDDEN = -1e4
"""Whatever is below it hides a key from a query."""
PRODUCTS = ("matmul", "bmm", "baddbmm", "einsum")
SDPA = torch.ops.aten.scaled_dot_product_attention.default


Columns = tuple[float, float]
"""What a column in front of a mask or bias is, and what one is that a task does not have."""

Extend = Callable[[fx.Node, fx.Node, Columns], None]


def open_columns(
    program: Program, sites: Sequence[Attention], prefix: Delta, grown: Mapping[fx.Node, bool] = NONE
) -> None:
    """Extend the masks and biases of `sites` by the length of `prefix`, each distinct one once; but not those that have
    `grown` already, of which some close the columns that a task does not have.
    """
    live = program.live(prefix, -2)
    extended: dict[tuple[fx.Node, Columns], fx.Node] = {}

    def extend(reader: fx.Node, operand: fx.Node, columns: Columns) -> None:
        if operand in grown and (grown[operand] or reader.target is not SDPA):
            return
        if (operand, columns) not in extended:
            wide = closed if operand in grown else widened(*columns)
            extended[operand, columns] = program.insert(wide, [program.current(operand), live], before=reader)
        reader.replace_input_with(operand, extended[operand, columns])

    _refuse_sums(program, sites)
    for site in sites:
        if site.core.target is SDPA:
            _open_fused(program, site.core, live, extend)
        else:
            _open_spelled_out(program, site, live, extend, grown)


def _refuse_sums(program: Program, sites: Sequence[Attention]) -> None:
    """Raise CompositionError where scores meet those of another attention, which have no such columns."""
    ways = {
        site.scores: {site.scores} | (descendants(site.scores) & ancestors(site.core))
        for site in program.anatomy.attentions
        if site.core.target is not SDPA
    }
    for site in sites:
        own = ways.get(site.scores, set())
        met = {n for node in own for n in node.all_input_nodes} - own
        for other in program.anatomy.attentions:
            if not met.isdisjoint(ways.get(other.scores, ())):
                raise CompositionError(
                    f"{site.label} adds the scores of {other.label} to its own, and a prefix would meet none there",
                    try_="other techniques, or `where` with attentions that have scores of their own",
                )
        beside = {n for node in own if _name(node) == "cat" for n in node.all_input_nodes} - own
        if any(_name(n) in PRODUCTS and site.query in n.all_input_nodes for b in beside for n in ancestors(b)):
            raise CompositionError(
                f"{site.label} has its queries meet other keys as well, in one softmax, and a prefix would meet half",
                try_="other techniques, or `where` with attentions of one kind of keys",
            )


def biased(program: Program, sites: Sequence[Attention]) -> bool:
    """Whether scores meet a bias beside the mask, such as one by distance.

    Told by value, for a text without padding: a mask then adds nothing, or hides.
    """
    met = list(dict.fromkeys(term for site in sites for term in terms(site)))
    text = {"input_ids": torch.arange(3, 11).unsqueeze(0)}
    return any(bool(((t != 0) & (t > HIDDEN)).any()) for t in (program.evaluate(met, text) if met else ()))


def terms(site: Attention) -> list[fx.Node]:
    """What is added to the scores of an attention."""
    core = site.core
    if core.target is SDPA:
        mask = core.args[3] if len(core.args) > 3 else core.kwargs.get("attn_mask")
        return [mask] if isinstance(mask, fx.Node) and mask.meta["val"].is_floating_point() else []
    path = {site.scores} | (descendants(site.scores) & ancestors(core))
    found = [n for node in path for n in node.all_input_nodes if n not in path and _meets_columns(node, n, site)]
    return [n for n in found if isinstance(v := n.meta.get("val"), Tensor) and v.dim() > 0 and v.is_floating_point()]


def widened(opened: float, closed: float) -> Callable[[Tensor, Tensor], Tensor]:
    def widened(mask: Tensor, live: Tensor) -> Tensor:
        if mask.dtype == torch.bool:
            front = live > 0 if opened else live <= 0
        else:
            limit = torch.finfo(mask.dtype).max if mask.is_floating_point() else 0
            front = (opened + (1 - live) * (closed * limit)).to(mask.dtype)
        return torch.cat([front.expand(*mask.shape[:-1], -1), mask], -1)

    return widened


def _open_fused(program: Program, core: fx.Node, live: fx.Node, extend: Extend) -> None:
    arguments = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), core.args, strict=False))
    arguments |= core.kwargs
    mask = arguments.get("attn_mask")
    if isinstance(mask, fx.Node):
        extend(core, mask, (1.0, 0.0) if mask.meta["val"].dtype == torch.bool else (0.0, -1.0))
    else:
        # With more keys than queries SDPA's own triangle is aligned top-left, which would hide the text's tail.
        body = _causal if arguments.get("is_causal") else _all
        explicit = program.insert(body, [core.args[0], core.args[1], live])  # type: ignore[list-item]
        rest = {k: v for k, v in arguments.items() if k not in ("query", "key", "value", "is_causal")}
        core.args = core.args[:3]
        core.kwargs = {**rest, "attn_mask": explicit}


def _causal(query: Tensor, _: Tensor, live: Tensor) -> Tensor:
    rows = query.shape[-2]
    seen = torch.ones(rows, rows, dtype=torch.bool, device=query.device).tril()
    return torch.cat([(live > 0).expand(rows, -1), seen], -1)


def _all(query: Tensor, key: Tensor, live: Tensor) -> Tensor:
    rows = query.shape[-2]
    seen = query.new_ones([rows, key.shape[-2] - live.shape[-1]], dtype=torch.bool)
    return torch.cat([(live > 0).expand(rows, -1), seen], -1)


def closed(scores: Tensor, live: Tensor) -> Tensor:
    front = ((1 - live) * torch.finfo(scores.dtype).min).to(scores.dtype)
    return scores + torch.nn.functional.pad(front, (0, scores.shape[-1] - live.shape[-1]))


def _open_spelled_out(
    program: Program, site: Attention, live: fx.Node, extend: Extend, grown: Mapping[fx.Node, bool]
) -> None:
    """Walk from the score product to the softmax and widen every operand that has the key axis, and every view."""
    keys = site.scores.meta["val"].shape[-1]
    path = {site.scores} | (descendants(site.scores) & ancestors(site.mixed))
    for node in path - {site.scores, site.mixed}:
        _free_size(program, node, keys)
    closes = any(grown.get(n, False) for node in path for n in node.all_input_nodes)
    for node in sorted(path - {site.core, site.mixed}):
        for operand in list(node.all_input_nodes):
            value = operand.meta.get("val")
            if operand in path or not isinstance(value, Tensor) or value.dim() == 0:
                continue
            if value.shape[-1] == keys and _meets_columns(node, operand, site):
                columns = neutral(node, operand)
                closes = closes or value.dtype == torch.bool or columns[1] != 0.0
                extend(node, operand, columns)
    if not closes:
        if str(keys).isdigit():  # of an image: the number of keys is written into the body, and it has grown
            program.propagate(descendants(site.key) & ancestors(site.scores))
        program.replace(site.scores, closed, also=(live,))


def _meets_columns(node: fx.Node, operand: fx.Node, site: Attention) -> bool:
    """The score product's own factors have their columns already; only baddbmm's first operand is a bias."""
    bias = node.target is torch.ops.aten.baddbmm.default and node.args[0] is operand
    return node is not site.scores or bias


def neutral(node: fx.Node, operand: fx.Node) -> Columns:
    """What leaves a score as it is at `node`, and (in units of the largest number) what closes it."""
    name = _name(node).rstrip("_")
    if node.target is torch.ops.aten.baddbmm.default or name in ("add", "sub"):
        return 0.0, 1.0 if name == "sub" and node.args[1] is operand else -1.0
    if name in ("mul", "div"):
        return 1.0, 0.0
    if name == "masked_fill":
        return 0.0, 0.0
    if name == "expand_as" and node.args[0] is operand:  # what it is neutral to is its reader
        return neutral(next(iter(node.users)), node)
    if name == "where" and node.args[0] is operand:
        return (1.0 if node.args[1] in node.all_input_nodes and _is_scores(node, 1) else 0.0), 0.0
    raise InvariantError(
        f"no neutral column is known for '{node.target}' on the way of attention scores", where=str(node)
    )


def _name(node: fx.Node) -> str:
    """The operator without namespace and overload; of what is none, as `getitem`, the function's own name."""
    schema = getattr(node.target, "_schema", None)
    return str(schema.name).split("::")[1] if schema else str(getattr(node.target, "__name__", node.target))


def _is_scores(node: fx.Node, position: int) -> bool:
    """The operand at `position` is as wide as the result, not a fill value."""
    operand = node.args[position]
    return isinstance(operand, fx.Node) and operand.meta["val"].dim() == node.meta["val"].dim()


def _free_size(program: Program, node: fx.Node, keys: int | torch.SymInt) -> None:
    """Let a `view` on the path take the key axis as it is now, grown."""
    if _name(node) not in ("view", "reshape", "_unsafe_view"):
        return
    source, sizes = node.args[0], list(node.args[1])  # type: ignore[arg-type]
    last = sizes[-1].meta["val"] if isinstance(sizes[-1], fx.Node) else sizes[-1]
    if not isinstance(source, fx.Node) or last != keys:
        return
    if -1 not in sizes:
        node.args = (source, [*sizes[:-1], -1])
        return
    with program.graph.inserting_before(node):
        grown = program.graph.call_function(torch.ops.aten.sym_size.int, (source, -1))
    grown.meta = {"val": source.meta["val"].shape[-1], "surgeon": node.meta.get("surgeon")}
    node.args = (source, [*sizes[:-1], grown])
