"""A plain torch function as graph nodes. Traced once for sites alike, since most of a pass's time is this tracing."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx

from surgeon.errors import InvariantError

Symbols = dict[Any, Any]
"""Of sympy."""

NESTED = 6
"""How deep a function may close over functions and tuples before it counts as one of a kind."""


@dataclass(frozen=True)
class Body:
    """A traced function. Sizes are kept as they were then: symbols may be found equal to others later."""

    graph: fx.Graph
    makers: tuple[Callable[[Symbols], Any], ...]
    """For every node, its value under other symbols."""
    free: tuple[Any, ...]
    """Symbols of the deltas' free sizes."""
    found: tuple[Any, ...]
    """What tracing made of `free`: ranks that must be equal are one symbol then."""

    def again(self, sizes: Sequence[Any]) -> Iterator[tuple[fx.Node, Any]]:
        """The nodes for deltas of other free `sizes`, which are made to agree as `free` were."""
        names = dict(zip(self.free, sizes, strict=True))
        for mine, size in zip(self.found, sizes, strict=True):
            other = names[mine] if mine in names else _sized(size, mine)
            if size is not other and not size == other:
                raise InvariantError(f"sizes of one body disagree: {size} and {other}")
        symbols = {mine: size.node.expr for mine, size in names.items()}
        for node, make in zip(self.graph.nodes, self.makers, strict=True):
            yield node, make(symbols)


@dataclass
class Bodies:
    """What was traced so far, by function and by shapes up to the names of the deltas' symbols."""

    _known: dict[Hashable, Body] = field(default_factory=dict)

    def trace(
        self, fn: Callable[..., Any], values: Sequence[FakeTensor], deltas: Sequence[FakeTensor]
    ) -> Iterator[tuple[fx.Node, Any]]:
        """The nodes of `fn(*values, *deltas)` in order, each with its value for just these arguments.

        A delta's free axes are symbols of its own; those of `values` are the graph's.
        """
        key, sizes = _key(fn, values, deltas), _free(deltas)
        if key in self._known:
            yield from self._known[key].again(sizes)
            return
        free = tuple(size.node.expr for size in sizes)
        # make_fx counts a bound method's `self` as an argument, so it gets a plain function.
        traced = make_fx(lambda *v: fn(*v), pre_dispatch=True, tracing_mode="real")(*values, *deltas)  # noqa: PLW0108
        made = [(node, node.meta.get("val")) for node in traced.graph.nodes]
        if key is not None:
            found = tuple(size.node.expr for size in sizes)
            self._known[key] = Body(traced.graph, tuple(_maker(value) for _, value in made), free, found)
        yield from made


def _key(fn: Callable[..., Any], values: Sequence[FakeTensor], deltas: Sequence[FakeTensor]) -> Hashable:
    """None where `fn` holds on to what cannot be compared."""
    does = _meaning(fn)
    if does is None:
        return None
    own = {size.node.expr: i for i, size in enumerate(_free(deltas))}
    shapes = [
        (t.dtype, t.device, t.requires_grad, *(_written(n, own) for n in (*t.shape, *t.stride())))
        for t in (*values, *deltas)
    ]
    return does, len(values), tuple(shapes)


def _meaning(value: object, depth: int = NESTED) -> Hashable:
    """A function as its code and what it closes over, a plain value as itself; None for all else."""
    if isinstance(value, FunctionType) and depth and not value.__kwdefaults__:
        held = [*(cell.cell_contents for cell in value.__closure__ or ()), *(value.__defaults__ or ())]
        inner = _meaning(tuple(held), depth - 1)
        return inner and (value.__code__, inner)
    if isinstance(value, tuple | list) and depth:
        meanings = [_meaning(one, depth - 1) for one in value]
        return None if None in meanings else (type(value), *meanings)
    return (type(value), value) if value is None or isinstance(value, int | float | str) else None


def _free(tensors: Sequence[FakeTensor]) -> list[Any]:
    """The free sizes, SymInts, in order."""
    return [size for t in tensors for size in t.shape if isinstance(size, torch.SymInt)]


def _written(size: int | torch.SymInt, symbols: Symbols) -> str:
    return str(size.node.expr.xreplace(symbols) if isinstance(size, torch.SymInt) else size)


def _sized(like: torch.SymInt, expression: Any) -> torch.SymInt:
    """An expression as a size of the same graph."""
    size: torch.SymInt = like.node.shape_env.create_symintnode(expression, hint=None)
    return size


def _maker(value: Any) -> Callable[[Symbols], Any]:
    """Makes the value anew under other symbols."""
    if isinstance(value, torch.SymInt):
        expression = value.node.expr
        return lambda symbols: _sized(value, expression.xreplace(symbols))
    if isinstance(value, tuple | list):
        makers = [_maker(one) for one in value]
        return lambda symbols: type(value)(make(symbols) for make in makers)
    if not isinstance(value, FakeTensor):
        return lambda symbols: value
    size, stride = [_maker(n) for n in value.shape], [_maker(n) for n in value.stride()]

    def tensor(symbols: Symbols) -> Tensor:
        with value.fake_mode:
            axes = ([make(symbols) for make in makers] for makers in (size, stride))
            return torch.empty_strided(*axes, dtype=value.dtype, device=value.device)

    return tensor
