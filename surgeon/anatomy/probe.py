"""A tool of anatomy: run a piece of the graph alone on made-up values, to learn what no pattern tells.

Which output features of a fused projection feed the query, the key or the value is exact for every layout this
way: cut the graph behind the projection, run up to the operand, differentiate, and see where the gradient is.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node
from torch.fx.node import map_aggregate

from surgeon.anatomy.facts import Facts
from surgeon.errors import TraceError


def features(
    facts: Facts, source: Node, target: Node, written: Node | None = None, cuts: Collection[Node] = ()
) -> tuple[int, ...]:
    """Indices on the last axis of `source` that `target` depends on, after the in-place write `written` to it.

    Ways through `cuts` do not count. Pieces alike, as those of layers alike are, are run once.
    """
    runner = Runner(facts, source, cuts=cuts)
    wanted = [written or target, target]
    key = runner.text(wanted)
    if key not in facts.probed:
        with torch.enable_grad(), torch.device("cpu"):
            runner.start()
            _, result = [runner.value(node) for node in wanted]
            (gradient,) = torch.autograd.grad((result * _random(result, 0.5)).sum(), runner.cut)
        used = gradient.reshape(-1, gradient.shape[-1]).ne(0).any(0)
        facts.probed[key] = tuple(used.nonzero().flatten().tolist())
    return facts.probed[key]


def integers(facts: Facts, node: Node, fill: int) -> Tensor | None:
    """The integers that `node` computes when every input is `fill`; None where that cannot be known."""
    if any(facts.op[i] == "embedding" for i in facts.inputs[node]):
        return None
    try:
        with torch.device("cpu"):
            value = Runner(facts, None, fill).value(node)
    except (TraceError, IndexError, RuntimeError):  # to the model a text of this one token may be padding, all of it
        return None
    return value if isinstance(value, Tensor) else None


class Runner:
    """Evaluates nodes backwards from what is asked, on the sizes that the trace was made with.

    Floating values that do not come from `source` are made up: only the way from it is of interest. Made-up
    values are positive, so that no rectifier hides a dependence.
    """

    def __init__(self, facts: Facts, source: Node | None, fill: int = 1, cuts: Collection[Node] = ()) -> None:
        self.facts = facts
        self.source = source
        self.fill = fill
        self.cuts = cuts
        self.known: dict[Node, Any] = {} if source is None else {source: None}
        self.way = 0 if source is None else facts.below[facts.position[source]]
        self.cut = torch.empty(0)

    def start(self) -> None:
        """Make up the source, with a gradient."""
        assert self.source is not None
        self.cut = _made_up(self.source).requires_grad_()
        self.known[self.source] = self.cut.clone()  # a clone, for the region may write to it in place

    def text(self, targets: Collection[Node]) -> str:
        """What is run for `targets`, before anything is: equal for pieces that compute the same."""
        names = {node: str(i) for i, node in enumerate([*self.known, *dict.fromkeys(self._needed(targets))])}
        lines = [f"{_value(node)}" if node in self.known else self._line(node, names) for node in names]
        return "\n".join([*lines, *(names[node] for node in targets)])

    def _line(self, node: Node, names: dict[Node, str]) -> str:
        if self._is_made_up(node) or not isinstance(node.meta.get("val"), (Tensor, list, tuple)):
            return _value(node)
        if node.op in {"placeholder", "get_attr"}:
            return f"{node.target}"
        args = map_aggregate((node.args, node.kwargs), lambda a: f"%{names[a]}" if isinstance(a, Node) else a)
        return f"{node.target}{args}"

    def value(self, target: Node) -> Any:
        """The value of one node."""
        for node in self._needed([target]):
            self.known[node] = self._evaluate(node)
        return self.known[target]

    def _needed(self, targets: Collection[Node]) -> list[Node]:
        needed, todo = set(), [*targets]
        while todo:
            node = todo.pop()
            if node in needed or node in self.known:
                continue
            needed.add(node)
            if not self._is_made_up(node):
                todo.extend(dict.fromkeys([*node.all_input_nodes, *self.facts.inputs[node]]))
        return sorted(needed, key=self.facts.position.__getitem__)

    def _is_made_up(self, node: Node) -> bool:
        """Floating and not on the way; buffers that hold real numbers are read instead."""
        if self.way & self.facts.bit(node) and node not in self.cuts:
            return False
        value = node.meta.get("val")
        return isinstance(value, Tensor) and value.is_floating_point() and bool(self.way)

    def _evaluate(self, node: Node) -> Any:
        if self._is_made_up(node):
            return _made_up(node)
        if node.op == "placeholder":
            return torch.full_like(_made_up(node), self.fill)
        if node.op == "get_attr":
            return self._buffer(node)
        value = node.meta.get("val")
        if not isinstance(value, (Tensor, list, tuple)):
            return _number(value)
        if self.facts.op[node] == "dropout":
            return self.known[self.facts.inputs[node][0]]
        args, kwargs = map_aggregate((node.args, node.kwargs), self._argument)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def _argument(self, argument: Any) -> Any:
        """Nodes become their values; whatever the base was traced on, a probe runs on the CPU."""
        if isinstance(argument, Node):
            return self.known[argument]
        return torch.device("cpu") if isinstance(argument, torch.device) else argument

    def _buffer(self, node: Node) -> Tensor:
        tensor = self.facts.tensor(node).detach()
        if tensor.is_meta or isinstance(tensor, FakeTensor):
            raise TraceError(f"the layout around {node.target} cannot be read: the base holds no numbers there")
        return tensor.cpu().clone()


def _made_up(node: Node) -> Tensor:
    value = node.meta["val"]
    return _random(torch.empty(_sizes(value), dtype=value.dtype, device="cpu"), 0.5)


def _random(like: Tensor, low: float) -> Tensor:
    rng = torch.Generator("cpu").manual_seed(like.numel())
    return (torch.rand(like.shape, generator=rng, device="cpu") + low).to(like.dtype)


def _value(node: Node) -> str:
    """Type and sizes of a value, or the number that it is."""
    value = node.meta.get("val")
    return f"{value.dtype}{_sizes(value)}" if isinstance(value, Tensor) else f"{_number(value)}"


def _sizes(value: Tensor) -> list[int]:
    return [_number(size) for size in value.shape]


def _number(value: Any) -> Any:
    """A size as the trace's own sample had it."""
    if not isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value
    return value.node.maybe_as_int() if value.node.maybe_as_int() is not None else value.node.hint
