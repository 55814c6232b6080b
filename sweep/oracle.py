"""What anatomy must find in any model, told by the configuration, by arithmetic and by the model itself; no names.

Each check returns what is wrong, in a line each.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from transformers import PretrainedConfig, PreTrainedModel

from surgeon.anatomy import Anatomy, Attention, Join, Projection
from surgeon.dataflow import ancestors, descendants
from surgeon.inputs import base_inputs, sample_inputs, vocabulary
from sweep.shrinking import depths

aten = torch.ops.aten

PICKS = (aten.index.Tensor, aten.view.default, aten.to.dtype, aten.reshape.default, aten.unsqueeze.default)

KINDS = ("attention", "cross_attention", "mixer", "ffn")
SIDES = ("query", "key", "value", "output")


def faults(model: PreTrainedModel, graph_module: fx.GraphModule, anatomy: Anatomy) -> list[str]:
    """Everything that is wrong with an anatomy; where nothing was understood, what it says of it."""
    if not anatomy.joins:
        return [f"refused: {note}" for note in anatomy.notes]
    return [
        *counts(model, anatomy),
        *widths(anatomy),
        *_twice(anatomy),
        *removal(model, graph_module, anatomy),
        *peft_targets(model, graph_module, anatomy),
    ]


def _twice(anatomy: Anatomy) -> Iterator[str]:
    """No product has roles in two places."""
    homes: dict[fx.Node, set[tuple[str, int | None]]] = defaultdict(set)
    for p in anatomy.projections:
        homes[p.node].add((p.stack, p.layer))
    yield from (f"{node} stands in {sorted(map(str, home))}" for node, home in homes.items() if len(home) > 1)


def counts(model: PreTrainedModel, anatomy: Anatomy) -> Iterator[str]:
    """One mixing sublayer a layer of the configuration, and a whole number of feed-forwards.

    Attention and another mixer side by side in one join are one; a family may feed forward twice a layer (macarons,
    gates by layer) or convolve after its attention, or have one sublayer a layer; where nothing attends, each layer
    mixes and feeds forward once or not at all. An attention may be told to add to no
    stream. What stands apart from encoder and
    decoder (a second stream beside the first) is counted where the layers are not the others' alone (a stack that runs
    again and again).
    """
    stages = getattr(model.config, "depths", None)
    total, crossed = (sum(stages), None) if stages else wanted(model)
    if total is None:
        return
    main = [s for s in anatomy.layers if s in {"encoder", "decoder"}]
    told = [_counted(anatomy, stacks, total, max(len(stages or ()) - 1, 0)) for stacks in ([*anatomy.layers], main)]
    crossing = len({(j.stack, j.skip) for j in anatomy.joins if j.role == "residual.cross_attention"})
    # Where a decoder attends to itself and to the encoder in one, it is called a decoder for that.
    merged = not crossing and {"encoder", "decoder"} <= anatomy.layers.keys()
    if crossed is not None and crossing != crossed and not merged:
        yield f"{crossing} cross-attentions in {crossed} decoder layers"
    if not stages and None not in told:
        yield from (said for said in told[-1:] if said)
    elif stages and told[0]:
        yield told[0]
    deep = [sum(anatomy.layers[s] for s in stacks) for stacks in ([*anatomy.layers], main)]
    if total not in (deep[:1] if stages else deep):
        yield f"layers by stack are {anatomy.layers}, by configuration {total}"


def _counted(anatomy: Anatomy, stacks: Sequence[str], total: int, between: int) -> str | None:
    """What is wrong with the number of sublayers in some stacks; one may feed forward `between` stages as well."""
    found = {
        kind: {(j.stack, j.skip) for j in anatomy.joins if j.role == f"residual.{kind}" and j.stack in stacks}
        for kind in KINDS
    }
    inside = {(j.stack, j.skip) for j in anatomy.joins if j.layer is not None}
    alone = {
        (a.stack, a.layer)
        for a in anatomy.attentions
        if a.stack in stacks and f"layer {a.layer} of {a.stack}: its attention adds to no residual" in anatomy.notes
    }
    attending, feeding = (len(found[kind] & inside) for kind in ("attention", "ffn"))
    attending += len(alone)
    mixing = attending + len((found["mixer"] - found["attention"]) & inside)
    each = mixing == total or (attending == total and mixing % total == 0)
    if (each and (feeding % total == 0 or feeding == total + between)) or mixing + feeding == total:
        return None
    within = [j for j in anatomy.joins if j.stack in stacks and j.layer is not None]
    mixed, fed = ([(j.stack, j.layer) for j in within if j.role == f"residual.{k}"] for k in ("mixer", "ffn"))
    if not attending and len(set(mixed)) == total and len(fed) == len(set(fed)):
        return None
    return f"{mixing} mixing and {feeding} feed-forward sublayers in {total} layers"


def wanted(model: PreTrainedModel) -> tuple[int | None, int | None]:
    """The layers that a configuration says, in encoder and decoder together; and those that attend to the encoder.

    A classifier may be of an encoder alone: its decoder is then what the encoder is in.
    """
    config = model.config
    if not config.is_encoder_decoder:
        return depths(config).get("num_hidden_layers"), None
    within = [getattr(config, side, None) for side in ("encoder", "decoder")]
    sides = [depths(part) for part in within if isinstance(part, PretrainedConfig)]
    if len(sides) == 2:
        encoder, decoder = (side.get("num_hidden_layers") for side in sides)
    else:
        fields = depths(config)
        encoder = fields.get("encoder_layers") or fields.get("num_encoder_layers") or fields.get("num_hidden_layers")
        decoder = fields.get("decoder_layers") or fields.get("num_decoder_layers")
    if encoder is None or decoder is None or model.get_encoder() in model.get_decoder().modules():
        return encoder, None
    return encoder + decoder, decoder


def widths(anatomy: Anatomy) -> Iterator[str]:
    """Query, key, value and output of every attention, as wide as its heads together.

    Where weights are told to be no sites, such as those of three axes, sides may be missing.
    """
    told = any("are no sites" in note for note in anatomy.notes)
    by_place: dict[tuple[str, int | None, str], list[Projection]] = defaultdict(list)
    for p in anatomy.projections:
        kind, _, side = p.role.partition(".")
        if side in SIDES:
            by_place[p.stack, p.layer, kind].append(p)
    for place, group in _by_place(anatomy.attentions).items():
        sides = {side: [p for p in by_place[place] if p.role.endswith(side)] for side in SIDES}
        at = f"{place[2]} of layer {place[1]} in {place[0]}"
        if missing := [side for side, found in sides.items() if not found]:
            if not told:
                yield f"{at} has no {', '.join(missing)}"
            continue
        site = group[0]
        experts = any(p.weight_node.meta["val"].ndim > 2 for found in sides.values() for p in found)
        if len(group) > 1 or len(sides["key"]) > 1 or experts:
            continue  # differential and low-rank attention, heads of experts: put together of several
        wanted = {
            "query": site.heads * site.head_dim,
            "key": site.kv_heads * site.head_dim,
            "value": site.kv_heads * site.value_dim,
        }
        if _gates(sides["query"][0], sides["key"][0], site):
            wanted["query"] *= 2
        for side, width in wanted.items():
            if sides[side][0].out_features != width:
                yield f"{at}: {side} gives {sides[side][0].out_features} features, its heads take {width}"


def _gates(query: Projection, key: Projection, site: Attention) -> bool:
    """Whether a query's projection gives a gate as well, for what its heads have mixed to be multiplied by.

    What depends on the keys too is no gate: a sink multiplies by the share that it leaves of the scores.
    """
    mixed = descendants(site.mixed) | {site.mixed}
    own = descendants(query.output) - descendants(key.output) - mixed
    products = (n for n in mixed if n.target is aten.mul.Tensor)
    return any(not mixed.isdisjoint(n.all_input_nodes) and not own.isdisjoint(n.all_input_nodes) for n in products)


def _by_place(attentions: Iterable[Attention]) -> dict[tuple[str, int | None, str], list[Attention]]:
    found: dict[tuple[str, int | None, str], list[Attention]] = defaultdict(list)
    for a in attentions:
        found[a.stack, a.layer, a.role].append(a)
    return found


class _Without(fx.Interpreter):
    """Runs a trace without dropout and with some branches taken for zero."""

    def __init__(self, graph_module: fx.GraphModule, joins: Iterable[Join]) -> None:
        super().__init__(graph_module)
        self.dropped = {(j.add, j.branch) for j in joins}

    def run_node(self, n: fx.Node) -> object:
        if n.target is aten.dropout.default:
            return self.env[n.args[0]]  # type: ignore[index]
        left = [b for a, b in self.dropped if a is n]
        kept = {b: self.env[b] for b in left}
        self.env.update({b: torch.zeros_like(self.env[b]) for b in left})
        result = super().run_node(n)
        self.env.update(kept)
        return result

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is aten.scaled_dot_product_attention.default:
            args = args[:4] + ((0.0,) if len(args) > 4 else ()) + args[5:]
            kwargs = {name: a for name, a in kwargs.items() if name != "dropout_p"}
        return super().call_function(target, args, kwargs)


def removal(model: PreTrainedModel, graph_module: fx.GraphModule, anatomy: Anatomy) -> Iterator[str]:
    """A sublayer taken out at its join is the model itself with the weights of its last projections at zero."""
    inputs = base_inputs(model)
    sample = sample_inputs(inputs, vocabulary(model), torch.device("cpu"))
    parameters = dict(graph_module.named_parameters())
    with torch.no_grad():
        whole = _logits(model(**sample))
        gap = _gap(_logits(_Without(graph_module, []).run(*sample.values())), whole)
        if gap > 1e-4:
            yield f"the trace is not the model: {gap:.1e}"
            return
        for names, joins in _groups(anatomy).items():
            saved = {name: parameters[name].clone() for name in names if name in parameters}
            without = _logits(_Without(graph_module, joins).run(*sample.values()))
            for name in saved:
                parameters[name].zero_()
            wanted = _logits(model(**sample))
            for name, tensor in saved.items():
                parameters[name].copy_(tensor)
            if _gap(wanted, whole) < 1e-6:
                yield f"{joins[0].label}: its weights change nothing"
            elif _gap(without, wanted) > 1e-3:
                yield f"{joins[0].label}: taken out, the answer is {_gap(without, wanted):.1e} off"


def _groups(anatomy: Anatomy) -> dict[tuple[str, ...], list[Join]]:
    """Joins by the parameters that end their branches; layers that share weights are one group.

    These are the last projections', and what is added or multiplied on the way from there to the join.
    """
    groups: dict[tuple[str, ...], list[Join]] = defaultdict(list)
    for join in anatomy.joins:
        kind = join.role.partition(".")[2]
        roles = {"ffn": ("ffn.down", "moe.down")}.get(kind, (f"{kind}.output",))
        last = [p for p in anatomy.projections if (p.stack, p.layer) == (join.stack, join.layer) and p.role in roles]
        same = [j for j in anatomy.joins if (j.stack, j.layer, j.role) == (join.stack, join.layer, join.role)]
        if last and len(same) == 1:
            names = {n for p in last for n in (p.weight, p.bias) if n}
            for p in last:
                way = (descendants(p.node) & ancestors(join.branch)) - {p.node}
                names |= {n for node in way for i in node.all_input_nodes if i not in way and (n := _parameter(i))}
            names |= _banks(join) - {n for p in anatomy.projections for n in (p.weight, p.bias)}
            groups[tuple(sorted(names))].append(join)
        elif kind == "mixer" and (names := _last_weights(join)):
            groups[tuple(sorted(names))].append(join)
    return groups


def _last_weights(join: Join) -> set[str]:
    """The weights that a branch ends with, convolutions' among them, and what is added or multiplied behind them."""
    names: set[str] = set()
    todo, seen = [join.branch], {join.branch}
    while todo:
        node = todo.pop()
        if node is join.skip or node.op == "placeholder":
            return set()  # of no weights
        read = [i for i in node.all_input_nodes if i.op == "get_attr" or node.target in PICKS]
        own = {n for i in read if (n := _parameter(i))}
        names |= own
        if any(i.meta["val"].ndim > 1 and min(i.meta["val"].shape[:2]) > 1 for i in read if _parameter(i)):
            continue
        todo += [i for i in node.all_input_nodes if i not in seen and i.op != "get_attr"]
        seen.update(node.all_input_nodes)
    return names


def _banks(join: Join) -> set[str]:
    """Weights of three dimensions that a product of the branch reads whole: of experts that all tokens go to, say."""
    inside = ancestors(join.branch) & descendants(join.entry)
    ways = [ancestors(n.args[1]) for n in inside if n.target is aten.bmm.default]  # type: ignore[arg-type]
    fixed = [way for way in ways if all(i.op != "placeholder" for i in way)]
    return {str(i.target) for way in fixed for i in way if i.op == "get_attr"}


def _parameter(node: fx.Node) -> str | None:
    """The parameter that an operand is, picked by an index or as it stands."""
    while node.op == "call_function" and node.target in PICKS:
        node = node.all_input_nodes[0]
    value = node.meta.get("val")
    return str(node.target) if node.op == "get_attr" and getattr(value, "requires_grad", False) else None


def _logits(output: object) -> Tensor:
    logits = output["logits"] if isinstance(output, dict) else getattr(output, "logits", None)
    assert isinstance(logits, Tensor)
    return logits


def _gap(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6))


def peft_targets(model: PreTrainedModel, graph_module: fx.GraphModule, anatomy: Anatomy) -> Iterator[str]:
    """What PEFT adapts by default in this family is found as a projection of an attention or a feed-forward.

    What the model never calls is left out: a decoder alone keeps weights that would attend to an encoder.
    """
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TARGETS

    wanted = TARGETS.get(model.config.model_type)
    if not isinstance(wanted, (list, tuple)):
        return
    roles = {p.path: p.role for p in anatomy.projections}
    read = {id(p) for p in graph_module.parameters()}
    called = [n for n, m in model.named_modules() if any(id(p) in read for p in m.parameters(recurse=False))]
    modules = [n for n in called if any(n == w or n.endswith(f".{w}") for w in wanted)]
    odd = [
        n
        for n in modules
        if roles.get(n, "nothing").split(".")[0] not in {"attention", "cross_attention", "ffn", "moe"}
    ]
    if odd:
        yield f"PEFT adapts {odd[0]}, which is {roles.get(odd[0], 'no site')}"
