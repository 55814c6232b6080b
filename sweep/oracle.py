"""What anatomy must find in any model, told by the configuration, by arithmetic and by the model itself; no names.

Each check returns what is wrong, in a line each.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from transformers import PreTrainedModel

from surgeon.anatomy import Anatomy, Attention, Join, Projection
from surgeon.trace import sample_inputs, text_inputs
from sweep.shrinking import depths

aten = torch.ops.aten

SIDES = ("query", "key", "value", "output")


def faults(model: PreTrainedModel, graph_module: fx.GraphModule, anatomy: Anatomy) -> list[str]:
    """Everything that is wrong with an anatomy."""
    return [*counts(model, anatomy), *widths(anatomy), *removal(model, graph_module, anatomy), *peft_targets(model, anatomy)]


def counts(model: PreTrainedModel, anatomy: Anatomy) -> Iterator[str]:
    """As many mixing and feed-forward sublayers as the configuration has layers."""
    fields = depths(model.config)
    found = Counter(j.role.partition(".")[2] for j in _distinct(anatomy.joins))
    mixing, feeding, crossing = found["attention"] + found["mixer"], found["ffn"], found["cross_attention"]
    deep = [v for k, v in fields.items() if k in {"decoder_layers", "num_decoder_layers"}]
    if model.config.is_encoder_decoder and deep:
        wanted = fields.get("encoder_layers") or fields.get("num_encoder_layers") or fields["num_hidden_layers"]
        wanted += deep[0]
        if crossing != deep[0]:
            yield f"{crossing} cross-attentions in {deep[0]} decoder layers"
    elif "num_hidden_layers" in fields:
        wanted = fields["num_hidden_layers"]
    else:
        return
    each = mixing == wanted and feeding == wanted
    one_each = mixing + feeding == wanted  # a family whose layer is one sublayer
    if not each and not one_each:
        yield f"{mixing} mixing and {feeding} feed-forward sublayers in {wanted} layers"


def _distinct(joins: Iterable[Join]) -> list[Join]:
    """Each sublayer once."""
    return list({(j.add, j.branch): j for j in joins}.values())


def widths(anatomy: Anatomy) -> Iterator[str]:
    """Query, key, value and output of every attention, as wide as its heads together."""
    by_place: dict[tuple[str, int | None, str], list[Projection]] = defaultdict(list)
    for p in anatomy.projections:
        kind, _, side = p.role.partition(".")
        if side in SIDES:
            by_place[p.stack, p.layer, kind].append(p)
    for place, group in _by_place(anatomy.attentions).items():
        sides = {side: [p for p in by_place[place] if p.role.endswith(side)] for side in SIDES}
        at = f"{place[2]} of layer {place[1]} in {place[0]}"
        if missing := [side for side, found in sides.items() if not found]:
            yield f"{at} has no {', '.join(missing)}"
            continue
        site = group[0]
        if len(group) > 1 or len(sides["key"]) > 1:
            continue  # differential and low-rank attention: heads are put together of several
        wanted = {
            "query": site.heads * site.head_dim,
            "key": site.kv_heads * site.head_dim,
            "value": site.kv_heads * site.value_dim,
        }
        for side, width in wanted.items():
            if sides[side][0].out_features != width:
                yield f"{at}: {side} gives {sides[side][0].out_features} features, its heads take {width}"


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
    inputs = text_inputs(model)
    vocabulary = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[index]
    sample = sample_inputs(inputs, vocabulary, torch.device("cpu"))
    parameters = dict(graph_module.named_parameters())
    with torch.no_grad():
        whole = _logits(model(**sample))
        gap = _gap(_logits(_Without(graph_module, []).run(*sample.values())), whole)
        if gap > 1e-4:
            yield f"the trace is not the model: {gap:.1e}"
            return
        for names, joins in _groups(anatomy).items():
            ends = [n for n in anatomy.norms if n.place == "branch-end" and n.bias]
            if any((n.stack, n.layer) == (j.stack, j.layer) for n in ends for j in joins):
                continue  # zero through a norm is the norm's bias
            saved = {name: parameters[name].clone() for name in names}
            without = _logits(_Without(graph_module, joins).run(*sample.values()))
            for name in names:
                parameters[name].zero_()
            wanted = _logits(model(**sample))
            for name, tensor in saved.items():
                parameters[name].copy_(tensor)
            if _gap(wanted, whole) < 1e-6:
                yield f"{joins[0].label}: its weights change nothing"
            elif _gap(without, wanted) > 1e-3:
                yield f"{joins[0].label}: taken out, the answer is {_gap(without, wanted):.1e} off"


def _groups(anatomy: Anatomy) -> dict[tuple[str, ...], list[Join]]:
    """Joins by the weights and biases that end their branches; layers that share weights are one group."""
    groups: dict[tuple[str, ...], list[Join]] = defaultdict(list)
    for join in _distinct(anatomy.joins):
        kind = join.role.partition(".")[2]
        roles = {"ffn": ("ffn.down", "moe.down")}.get(kind, (f"{kind}.output",))
        last = [p for p in anatomy.projections if (p.stack, p.layer) == (join.stack, join.layer) and p.role in roles]
        same = [j for j in anatomy.joins if (j.stack, j.layer, j.role) == (join.stack, join.layer, join.role)]
        if last and len(same) == 1:
            names = tuple(sorted({n for p in last for n in (p.weight, p.bias) if n}))
            groups[names].append(join)
    return groups


def _logits(output: object) -> Tensor:
    logits = output["logits"] if isinstance(output, dict) else getattr(output, "logits", None)
    assert isinstance(logits, Tensor)
    return logits


def _gap(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6))


def peft_targets(model: PreTrainedModel, anatomy: Anatomy) -> Iterator[str]:
    """What PEFT adapts by default in this family is found as a projection of an attention or a feed-forward."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TARGETS

    wanted = TARGETS.get(model.config.model_type)
    if not isinstance(wanted, (list, tuple)):
        return
    roles = {p.path: p.role for p in anatomy.projections}
    modules = [n for n, _ in model.named_modules() if any(n == w or n.endswith(f".{w}") for w in wanted)]
    odd = [n for n in modules if roles.get(n, "nothing").split(".")[0] not in {"attention", "cross_attention", "ffn", "moe"}]
    if odd:
        yield f"PEFT adapts {odd[0]}, which is {roles.get(odd[0], 'no site')}"
