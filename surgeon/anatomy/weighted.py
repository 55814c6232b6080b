"""Second step of anatomy: weighted ops, the call sites where a parameter meets an activation."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from surgeon.anatomy.facts import CONVOLUTIONS, PRODUCTS, RESHAPES, Facts, Weight
from surgeon.anatomy.shapes import rank, shape, width
from surgeon.anatomy.sites import Experts


@dataclass(frozen=True, eq=False)
class WeightedOp:
    """One call site of a weight."""

    node: Node
    input: Node
    output: Node
    weight: Node
    bias: Node | None
    in_first: bool
    in_features: int
    out_features: int
    plain: bool
    """A two-dimensional weight on the last axis: what a delta can be added to."""
    expert: bool
    experts: Experts | None
    static: bool
    """The operand is itself computed of weights: relative positions, say."""
    depthwise: bool

    @property
    def path(self) -> str:
        """Module path of the weight's owner."""
        return str(self.weight.target).rpartition(".")[0]


def weighted_ops(facts: Facts) -> dict[Node, WeightedOp]:
    """All weighted ops by node, in graph order."""
    return {node: op for node in facts.nodes if (op := _weighted(facts, node)) is not None}


def _weighted(facts: Facts, node: Node) -> WeightedOp | None:
    op = facts.op[node]
    if op == "linear" or op in CONVOLUTIONS:
        operand, factor, weight_last = node.args[0], node.args[1], False
    elif op in {"addmm", "baddbmm"}:
        operand, factor, weight_last = node.args[1], node.args[2], True
    elif op in {"matmul", "mm", "bmm"} or "grouped_mm" in op:
        operand, factor, weight_last = node.args[0], node.args[1], True
    elif op == "einsum" and isinstance(node.args[1], (list, tuple)) and len(node.args[1]) == 2:
        (operand, factor), weight_last = node.args[1], True
    else:
        return None
    if op in {"matmul", "mm", "bmm"} and isinstance(operand, Node) and operand in _chosen(facts, operand):
        operand, factor, weight_last = factor, operand, False  # experts that stand on the left, before columns
    if (
        not isinstance(operand, Node)
        or not isinstance(factor, Node)
        or factor not in facts.fixed | _chosen(facts, factor)
    ):
        return None
    static = operand in facts.fixed and bool(facts.parameters[operand])
    weight = facts.weight(factor)
    if weight is None or not (operand in facts.activations or static):
        return None
    return _call_site(facts, node, operand, weight, weight_last=weight_last, static=static)


def _chosen(facts: Facts, factor: Node) -> set[Node]:
    """`factor` where it is picked from a bank of weights by a computed index: not fixed, and yet a weight."""
    weight = facts.weight(factor)
    return {factor} if weight and weight.chosen else set()


def _call_site(
    facts: Facts, node: Node, operand: Node, weight: Weight, *, weight_last: bool, static: bool
) -> WeightedOp:
    op = facts.op[node]
    sizes = [s for s in shape(weight.node) if isinstance(s, int)]
    in_first = weight_last != weight.transposed
    expert = weight.chosen or "grouped_mm" in op
    plain = op not in CONVOLUTIONS and op != "einsum" and (len(sizes) == 2 or (expert and len(sizes) == 3))
    groups = node.args[-1] if op in CONVOLUTIONS else 1
    ends = (sizes[-2], sizes[-1]) if len(sizes) >= 2 else (0, 0)
    if op in CONVOLUTIONS:
        ends = (sizes[0], sizes[1])
    in_features, out_features = ends if in_first else ends[::-1]
    bias = _inner_bias(facts, node, out_features)
    if weight_last or op not in PRODUCTS:
        source, output, bias = _unfold(facts, operand, node, bias, out_features)
    else:
        source, output = _columns(facts, operand, node)
    return WeightedOp(
        node=node,
        input=source,
        output=output,
        weight=weight.node,
        bias=bias,
        in_first=in_first,
        in_features=in_features,
        out_features=out_features,
        plain=plain,
        expert=expert,
        experts=_experts(facts, node, weight) if plain and len(sizes) == 3 else None,
        static=static,
        depthwise=op in CONVOLUTIONS and isinstance(groups, int) and groups > 1 and sizes[1] == 1,
    )


def _experts(facts: Facts, node: Node, weight: Weight) -> Experts | None:
    """How rows are routed, where one tensor holds the weights of several experts."""
    grouped = "grouped_mm" in facts.op[node]
    routing = (node.kwargs.get("offs") or node.args[2]) if grouped else weight.index
    count = shape(weight.node)[0]
    return Experts(count, routing, grouped) if isinstance(routing, Node) and isinstance(count, int) else None


def _inner_bias(facts: Facts, node: Node, features: int) -> Node | None:
    op = facts.op[node]
    if op == "addmm":
        return facts.vector(node.args[0], features)
    if (op == "linear" or op in CONVOLUTIONS) and len(node.args) > 2:
        return facts.vector(node.args[2], features)
    return None


def _columns(facts: Facts, operand: Node, node: Node) -> tuple[Node, Node]:
    """Input and output as rows, where a weight on the left meets them as columns `[N, features, 1]`."""
    user = facts.only_user(node)
    raised = facts.op[operand] == "unsqueeze" and width(operand) == 1
    lowered = user is not None and facts.op[user] == "squeeze" and rank(user) == rank(node) - 1
    return (facts.inputs[operand][0] if raised else operand), (user if lowered and user else node)


def _unfold(
    facts: Facts, operand: Node, node: Node, bias: Node | None, features: int
) -> tuple[Node, Node, Node | None]:
    """Input and output of equal rank: before a flattening view, behind its inverse and the bias."""
    source, output = operand, node
    flattened = facts.op[operand] in RESHAPES and rank(operand) == 2 and rank(facts.inputs[operand][0]) > 2
    for _ in range(2):
        user = facts.only_user(output)
        if user is None:
            break
        before = facts.inputs[operand][0] if flattened else None
        if before and facts.op[user] in RESHAPES and rank(user) == rank(before) and width(user) == features:
            source, output, flattened = before, user, False
        elif bias is None and facts.op[user] == "add" and facts.op[node] in PRODUCTS | {"linear"}:
            other = [a for a in user.args if a is not output]
            bias = facts.vector(other[0], features) if len(other) == 1 else None
            output = user if bias else output
    if width(source) != width(operand):
        return operand, node, bias
    return source, output, bias
