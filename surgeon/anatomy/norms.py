"""Third step of anatomy: normalisations over the last axis, as one op or spelled out."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from surgeon.anatomy.facts import CASTS, Facts
from surgeon.anatomy.shapes import width

STATISTICS = frozenset({"mean", "sum", "var", "linalg_vector_norm", "norm"})
SCALAR_STEPS = frozenset({"add", "clamp", "div", "mul", "to", "sqrt"})


@dataclass(frozen=True, eq=False)
class NormOp:
    """A normalisation with its gain and bias, where it has them."""

    input: Node
    output: Node
    weight: Node | None
    bias: Node | None


def norm_ops(facts: Facts) -> dict[Node, NormOp]:
    """All normalisations by output node, in graph order."""
    found = [norm for node in facts.nodes if (norm := _fused(facts, node) or _spelled_out(facts, node)) is not None]
    return {norm.output: norm for norm in found}


def _fused(facts: Facts, node: Node) -> NormOp | None:
    op = facts.op[node]
    places = {"layer_norm": (2, 3), "rms_norm": (2, None), "group_norm": (2, 3), "batch_norm": (1, 2)}.get(op)
    if places is None:
        return None
    weight, bias = (_parameter(facts, _argument(node, at)) for at in places)
    return NormOp(facts.inputs[node][0], node, weight, bias)


def _argument(node: Node, at: int | None) -> object:
    return node.args[at] if at is not None and at < len(node.args) else None


def _parameter(facts: Facts, operand: object) -> Node | None:
    weight = facts.weight(operand) if isinstance(operand, Node) and operand in facts.fixed else None
    return weight.node if weight else None


def _spelled_out(facts: Facts, node: Node) -> NormOp | None:
    """x / sqrt(mean(x²) + ε), anchored on the inverse root of a statistic whose last axis is 1."""
    op = facts.op[node]
    root = op in {"rsqrt", "sqrt", "linalg_vector_norm"} or (op == "pow" and node.args[1] in (-0.5, 0.5))
    if not root or width(node) != 1 or node not in facts.activations:
        return None
    source = _normalised(facts, node)
    if source is None:
        return None
    scaled = [u for u in facts.users[node] if facts.op[u] in {"mul", "div"} and width(u) == width(source)]
    return _with_gain(facts, source, scaled[0]) if scaled else None


def _normalised(facts: Facts, root: Node) -> Node | None:
    """The wide value under the statistic that `root` is taken of."""
    node = root
    while width(node) == 1:
        flow = facts.flow(node)
        if not flow or (node is not root and facts.op[node] not in STATISTICS | SCALAR_STEPS):
            return None
        node = flow[0]
    while facts.op[node] in {"pow", "square", "mul", "abs"} and len(set(facts.flow(node))) == 1:
        node = facts.flow(node)[0]
    centred = facts.op[node] == "sub" and len(facts.flow(node)) == 2 and width(facts.flow(node)[1]) == 1
    return facts.flow(node)[0] if centred else node


def _with_gain(facts: Facts, source: Node, scaled: Node) -> NormOp:
    """Walk forward over casts, the gain (also as 1 + w) and the bias."""
    output, weight, bias = scaled, None, None
    node = scaled
    while (user := facts.only_user(node)) is not None:
        op = facts.op[user]
        other = next((a for a in user.args if isinstance(a, Node) and a is not node), None)
        parameter = _parameter(facts, other) if op in {"mul", "add"} else None
        if parameter is not None and op == "mul" and weight is None:
            weight = parameter
        elif parameter is not None and op == "add" and bias is None and weight is not None:
            bias = parameter
        elif op not in CASTS:
            break
        node = user
        if parameter is not None or op == "type_as" or weight is not None:
            output = node
    return NormOp(_uncast(facts, source), output, weight, bias)


def _uncast(facts: Facts, node: Node) -> Node:
    while facts.op[node] in CASTS:
        node = facts.inputs[node][0]
    return node
