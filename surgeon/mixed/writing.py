"""Writing a graph node by node, the shape of every value with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from surgeon.errors import InvariantError


class Writing:
    """A graph that grows at its end."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self.mode = mode
        self.graph = fx.Graph()

    def call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> fx.Node:
        """A node that calls an operator."""
        node = self.graph.call_function(target, args, kwargs or {})
        given, named = fx.node.map_arg((args, kwargs or {}), lambda n: n.meta["val"])
        with self.mode, enable_python_dispatcher():
            node.meta["val"] = target(*given, **named)
        return node

    def splice(self, fn: Callable[..., Any], operands: Sequence[fx.Node], *, whole: bool = True) -> Any:
        """`fn(*operands)` as nodes: with `whole`, of the operators it calls, else of those they are made of."""
        fakes = [node.meta["val"] for node in operands]
        body = make_fx(lambda *values: fn(*values), pre_dispatch=whole, tracing_mode="real")(*fakes)  # noqa: PLW0108
        env = dict(zip(body.graph.find_nodes(op="placeholder"), operands, strict=True))
        for inner in body.graph.nodes:
            if inner.op == "output":
                return fx.node.map_arg(inner.args[0], env.__getitem__)
            if inner.op == "get_attr":
                raise InvariantError(f"rows of their own: a constant was captured, {inner.target}")
            if inner.op != "placeholder":
                env[inner] = self.graph.node_copy(inner, env.__getitem__)
                env[inner].meta = {"val": inner.meta.get("val")}
        raise AssertionError("a graph without an output")
