"""A decoder's cache as one buffer that is written in place: its attention as ONNX Runtime's GroupQueryAttention.

Row r of a buffer `[rows, kv heads, room, width]` holds columns 0 … len_r - 1, and new ones go behind them. The operator
takes the lengths from the mask, whose rows begin with ones. A prefix is what the buffer begins with: it is written
there once, and costs no more than being attended to.

The operator knows the triangle of a text, a window of its last columns, and no other mask. So every attention is
rewritten where its structure fits, and the result is compared, in torch: with the graph as it was, and rows of
different lengths together with each alone.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import functional_call

from surgeon.cached import PAST, PRESENT
from surgeon.dataflow import ancestors
from surgeon.errors import InvariantError
from surgeon.exporters.attending import onnx_attend, torch_attend
from surgeon.exporters.masks import windows
from surgeon.exporters.rotary import torch_turn, turned
from surgeon.mixed import TASKS
from surgeon.module import copied
from surgeon.program import Program
from surgeon.rewriting import LIVE

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
VIEWS = {
    *(aten.unsqueeze.default, aten.expand.default, aten.reshape.default, aten.view.default, aten.slice.Tensor),
    *(aten.clone.default, aten.contiguous.default, aten.flatten.using_ints, aten.dropout.default),
}
"""What may lie between a cache or a prefix and the product; in eval mode dropout is nothing."""
LENGTHS, ROOM = (5, 3), 9
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Place:
    """An attention over a cache: the names of its two pasts, the new columns, and the prefix in front, if any."""

    core: fx.Node
    query: fx.Node
    new: tuple[fx.Node, fx.Node]
    past: tuple[str, str]
    start: tuple[str, str] | None


def starts(program: Program) -> dict[str, str]:
    """The delta that a past begins with, by the past's name, of a program whose cache is shared."""
    pairs = [pair for p in _places(program.graph, program) if p.start for pair in zip(p.past, p.start, strict=True)]
    return dict(pairs)


def shareable(program: Program) -> str | None:
    """Why the cache cannot be one buffer, if it cannot."""
    places = list(_places(program.graph, program))
    cached = {i.name for i in program.inputs if i.cached}
    if {name for place in places for name in place.past} != cached:
        return "not every attention is a product that ONNX Runtime's GroupQueryAttention could be"
    if any(t.meta["val"].shape[-1] % 8 for place in places for t in (place.query, *place.new)):
        return "GroupQueryAttention takes heads whose width is a multiple of 8"
    if len({place.start is None for place in places}) > 1:
        return "some layers have a prefix and others none"
    if any(delta.once for delta in program.ledger.deltas.values()):
        return "a task acts where a text begins alone"
    if (reason := _blind(program, places)) is not None:
        return reason
    found = _difference(program)
    return None if found <= TOLERANCE else f"rows of different lengths would answer otherwise (by {found:.1g})"


def _blind(program: Program, places: list[Place]) -> str | None:
    """What an attention sees that the operator would not, or the other way round."""
    seen = windows(program, [place.core for place in places])
    if seen is None:
        return "an attention sees neither all that was before nor the last of it"
    if any(seen[place.core] and place.start for place in places):
        return "a prefix stays in sight of what sees only the last columns before it"
    return None


def shared(
    graph_module: fx.GraphModule,
    program: Program,
    attend: Callable[..., Any] | None = None,
    *,
    masks: Program | None = None,
) -> fx.GraphModule:
    """Let attentions over the cache be the operator; `graph_module` is the program's graph or a copy of it.

    What an attention sees is read from `masks`, where the program is that one with a task a row.
    """
    graph, attend, masks = graph_module.graph, attend or onnx_attend, masks or program
    own = list(_places(masks.graph, masks))
    seen = windows(masks, [place.core for place in own]) or {}
    window = {place.past: seen.get(place.core, 0) for place in own}
    mask = next(n for n in graph.nodes if n.op == "placeholder" and n.name == "attention_mask")
    out, places = graph.output_node(), list(_places(graph, program))
    if {name for place in places for name in place.past} != {i.name for i in program.inputs if i.cached}:
        raise InvariantError("the cache was one buffer, and is none for a task a row", try_="`export: {cache: grown}`")
    for place in places:
        names = {n.name: n for n in graph.nodes if n.op == "placeholder"}
        with graph.inserting_before(place.core):
            pasts = [names[name] for name in place.past]
            start = _front(graph, program, place.start[0]) if place.start else None
            scale = place.core.kwargs.get("scale") or place.query.meta["val"].shape[-1] ** -0.5
            given = place.query, place.new, tuple(pasts), mask, start
            both = graph.call_function(attend, given, {"scale": scale, "window": window[place.past]})
            parts = [graph.call_function(operator.getitem, (both, at)) for at in range(3)]
        vals = [place.core.meta["val"], *(_joined(past).meta["val"] for past in pasts)]
        both.meta["val"] = tuple(vals)
        for part, val in zip(parts, vals, strict=True):
            part.meta["val"] = val
        _result(place.core).replace_all_uses_with(parts[0])
        for past, part in zip(pasts, parts[1:], strict=True):
            out.replace_input_with(_joined(past), part)
        if (last := _result(place.core)) is not place.core:
            graph.erase_node(last)
        graph.erase_node(place.core)  # as it may drop out, it would be kept for its effects
    graph.eliminate_dead_code()
    graph_module.recompile()
    return graph_module


def _front(graph: fx.Graph, program: Program, start: str) -> fx.Node:
    """What tells how many columns a prefix has: itself, `[heads, n, width]`; for a task a row, what counts its columns
    in each row, `[rows, n]`.
    """
    for node in graph.find_nodes(op="get_attr", target=start):
        for user in node.users:
            if user.target is aten.index_select.default:
                symbols = set(program.ledger.deltas[start].free.values())
                counts = [d.name for d in program.ledger.deltas.values() if d.part == LIVE]
                name = next(c for c in counts if symbols & set(program.ledger.deltas[c].free.values()) - {TASKS})
                return graph.call_function(aten.index_select.default, (graph.get_attr(name), 0, user.args[2]))
    return graph.get_attr(start)


def _places(graph: fx.Graph, program: Program) -> Iterator[Place]:
    """The attentions whose keys and values are the cache and what is new, perhaps behind a prefix."""
    for core in graph.nodes:
        if core.target is SDPA and len(core.args) > 2:
            sides = [_side(operand, program) for operand in core.args[1:3]]
            if all(side is not None for side in sides):
                (k, past_k, start_k), (v, past_v, start_v) = sides  # type: ignore[misc]
                if (start_k is None) == (start_v is None) and _joined(past_k) in graph.output_node().all_input_nodes:
                    start = None if start_k is None or start_v is None else (start_k, start_v)
                    yield Place(core, core.args[0], (k, v), (past_k.name, past_v.name), start)


def _side(node: fx.Node, program: Program) -> tuple[fx.Node, fx.Node, str | None] | None:
    """New columns, past and prefix of the keys or values that a product reads."""
    cached = {i.name for i in program.inputs if i.cached}
    node, start = _behind_views(node), None
    pair = _pair(node)
    if pair is not None and (name := _behind_views(pair[0], aten.index_select.default).target) in program.ledger.deltas:
        start, node = str(name), _behind_views(pair[1])
        pair = _pair(node)
    if pair is None or pair[0].name not in cached:
        return None
    return pair[1], pair[0], start


def _pair(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """What a node puts together along the columns."""
    if node.target is not aten.cat.default or len(node.args) < 2:
        return None
    parts: Any = node.args[0]
    axis: Any = node.args[1]
    if axis % (rank := node.meta["val"].dim()) != rank - 2:
        return None
    return (parts[0], parts[1]) if len(parts) == 2 else None


def _behind_views(node: fx.Node, *also: Any) -> fx.Node:
    while node.target in VIEWS or node.target in also:
        node = node.all_input_nodes[0]
    return node


def _result(core: fx.Node) -> fx.Node:
    """What an attention gives: transformers puts zero where a token sees nothing, which no token of a text does."""
    users = list(core.users)
    guarded = len(users) == 1 and users[0].target is aten.where.self and core not in ancestors(users[0].args[0])  # type: ignore[arg-type]
    return users[0] if guarded else core


def _joined(past: fx.Node) -> fx.Node:
    """Where a past and its new columns are put together."""
    return next(user for user in past.users if _pair(user) is not None)


def _difference(program: Program) -> float:
    """How far logits are from those of the graph as it is, relative to the largest: two prompts, and a token more."""
    plain, other = program.graph_module, shared(copied(program.graph_module), program, torch_attend)
    other = turned(other, torch_turn)
    cached = [i for i in program.inputs if i.cached]
    begin = starts(program)
    front = {i.name: program.tensor(begin[i.name]).detach() if i.name in begin else None for i in cached}
    ids = torch.randint(3, 50, (2, max(LENGTHS) + 1), generator=torch.Generator().manual_seed(0))
    gaps, wanted, buffers = [], [], []
    for row, length in enumerate(LENGTHS):
        past = {i.name: i.absent(ids[:1]) for i in cached}
        read = {"input_ids": ids[row : row + 1, :length], "attention_mask": torch.ones(1, length, dtype=torch.long)}
        room = {name: _room(past[name], front[name]) for name in past}
        one, two = _run(plain, {**read, **past}), _run(other, {**read, **room})
        gaps.append(_gap(two["logits"], one["logits"]))
        buffers.append(two)
        grown = {name: one[name.replace(PAST, PRESENT, 1)] for name in past}
        more = {
            "input_ids": ids[row : row + 1, length : length + 1],
            "attention_mask": torch.ones(1, length + 1).long(),
        }
        wanted.append(_run(plain, {**more, **grown})["logits"])
    mask = torch.arange(max(LENGTHS) + 1) <= torch.tensor(LENGTHS).unsqueeze(1)
    both = {name: torch.cat([b[name.replace(PAST, PRESENT, 1)] for b in buffers]) for name in past}
    last = torch.stack([ids[row, length] for row, length in enumerate(LENGTHS)]).unsqueeze(1)
    found = _run(other, {"input_ids": last, "attention_mask": mask.long(), **both})["logits"]
    return max(*gaps, _gap(found, torch.cat(wanted)))


def _room(past: Tensor, front: Tensor | None) -> Tensor:
    """A buffer of one row that begins with a prefix."""
    columns = 0 if front is None else front.shape[1]
    buffer = past.new_zeros([1, past.shape[1], columns + ROOM, past.shape[3]])
    if front is not None:
        buffer[0, :, :columns] = front
    return buffer


def _run(module: fx.GraphModule, feed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        output: dict[str, Tensor] = functional_call(module.eval(), {}, (), dict(feed))
    return output


def _gap(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1))
