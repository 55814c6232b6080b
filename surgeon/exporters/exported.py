"""From a rewritten graph to an `ExportedProgram` whose inputs are the model's and the deltas, without tracing again.

The graph is flat, and its operators are the dispatcher's already. So it is only written anew: in eval mode, with a
placeholder for every tensor, without what does nothing, and with one symbol for each free size in the shapes.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from types import FunctionType
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._export.verifier import TrainingIRVerifier
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils import _pytree as pytree

from surgeon.errors import TraceError
from surgeon.exporters.settled import CASTS, IDLE, Settled
from surgeon.inputs import sizes_of
from surgeon.program import Program

aten = torch.ops.aten

NUMBER_FIRST = (aten.rsub.Scalar, aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor)
SYNONYMS = {
    aten.__and__.Tensor: aten.bitwise_and.Tensor,
    aten.__or__.Tensor: aten.bitwise_or.Tensor,
    aten.min.other: aten.minimum.default,
    aten.max.other: aten.maximum.default,
}


def exported(program: Program, graph_module: fx.GraphModule, outputs: Collection[str]) -> ExportedProgram:
    """The program in eval mode as a function of its inputs and its deltas, in this order, to those `outputs` it has.

    `graph_module` is its graph as it is to be deployed; a product in it may be a plain function that says what it is
    by operators of ONNX. Raises TraceError where a size that should be free is not.
    """
    writer = _Writer(program, graph_module)
    results = writer.write(outputs)
    own = {i.name for i in program.inputs} | set(program.ledger.deltas)
    specs = [
        InputSpec(InputKind.USER_INPUT, TensorArgument(node.name), None)
        if name in own
        else InputSpec(InputKind.BUFFER, TensorArgument(node.name), name, persistent=True)
        for name, node in writer.placeholders.items()
    ]
    returned = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(n.name), None) for n in results.values()]
    arguments = dict.fromkeys(node.name for name, node in writer.placeholders.items() if name in own)
    call = ModuleCallSignature(
        [], [], pytree.tree_structure(((), arguments)), pytree.tree_structure(dict.fromkeys(results, 0))
    )
    return Settled(
        nn.Module(),
        writer.graph,
        ExportGraphSignature(specs, returned),
        writer.state,
        {},
        [ModuleCallEntry("", call)],
        verifiers=[TrainingIRVerifier],
    )


class _Writer:
    """Writes the graph anew, and the fake tensor of every value with it."""

    def __init__(self, program: Program, source: fx.GraphModule) -> None:
        self.program = program
        self.source = source
        self.graph = fx.Graph()
        self.placeholders: dict[str, fx.Node] = {}
        self.state: dict[str, Tensor] = {}
        self._env: dict[fx.Node, Any] = {}
        self._shapes = ShapeEnv()
        self._mode = FakeTensorMode(shape_env=self._shapes)
        self._sizes: dict[str, torch.SymInt] = {}
        self._hints = sizes_of(
            program.inputs, {n.name: n.meta["val"] for n in source.graph.find_nodes(op="placeholder")}
        )
        self._computed: dict[fx.Node, fx.Node] = {}

    def write(self, outputs: Collection[str]) -> dict[str, fx.Node]:
        """Write it all; returns the nodes of those `outputs` there are, by name."""
        self._place()
        source = self.source.graph
        with self._mode, enable_python_dispatcher(), torch.no_grad():
            for node in source.nodes:
                if node.op == "call_module":  # an `Either`, the only module of a graph
                    self._env[node] = self._env[node.args[1]]
                elif node not in self._env and node.op == "call_function":
                    self._env[node] = self._written(node)
        self._check_free()
        spec = source._codegen.pytree_info.out_spec  # type: ignore[attr-defined]
        places = pytree.tree_unflatten(range(spec.num_leaves), spec)
        values: Any = source.output_node().args[0]
        results = {n: self._env[values[places[n]]] for n in outputs if places.get(n) is not None}
        self.graph.output(tuple(results.values()))
        self.graph.eliminate_dead_code()
        return results

    def _place(self) -> None:
        """A placeholder for every tensor: the base's, the inputs, the deltas."""
        program = self.program
        computed = self._compute()
        for node in self.source.graph.nodes:
            if node.op != "get_attr" or node.target in program.ledger.deltas or node in computed:
                continue
            tensor = self.state.get(node.target)
            if tensor is None:
                tensor = _attribute(self.source, node.target)
            if not isinstance(tensor, Tensor):
                self._env[node] = self.graph.node_copy(node)
            elif node.target not in self.placeholders:
                self.state[node.target] = tensor
                self._add(node.target, self._mode.from_tensor(tensor, static_shapes=True))
        for given in program.inputs:
            self._add(given.name, self._empty([self._axis(axis) for axis in given.axes], given.dtype))
        for name, delta in program.ledger.deltas.items():
            hints = delta.sample().shape
            shape = [self._size(delta.free[a], s) if a in delta.free else s for a, s in enumerate(hints)]
            self._add(name, self._empty(shape, delta.dtype))
        for node in self.source.graph.nodes:
            if node.op == "placeholder" or node.target in self.placeholders:
                self._env[node] = self.placeholders[node.target]

    def _compute(self) -> set[fx.Node]:
        """Take the place of operators of constants that are computed when exporting; returns what only they read.

        A result takes the name of its first operand.
        """
        operators = self.program.operators
        absorbed: set[fx.Node] = set()
        for node in self.source.graph.nodes:
            if node.target in operators and operators[node.target] is None:
                first, *others = node.args
                if first.target not in self.state:
                    values = (_attribute(self.source, n.target) for n in node.args)
                    self.state[first.target] = node.target(*values)
                self._computed[node] = first
                absorbed.update(n for n in others if all(user in self._computed or user is node for user in n.users))
        return absorbed

    def _add(self, name: str, fake: Tensor) -> None:
        node = self.graph.placeholder(name.replace(".", "_"))
        node.meta["val"] = fake
        self.placeholders[name] = node

    def _empty(self, shape: list[Any], dtype: torch.dtype) -> Tensor:
        with self._mode:
            return torch.empty(shape, dtype=dtype)

    def _axis(self, axis: str | int) -> Any:
        return axis if isinstance(axis, int) else sum(self._size(word, self._hints[word]) for word in axis.split("+"))

    def _size(self, word: str, hint: int) -> torch.SymInt:
        if word not in self._sizes:
            source = ConstantSource(f"size_{len(self._sizes)}")
            symbol = self._shapes.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC)
            self._sizes[word] = self._shapes.create_symintnode(symbol, hint=hint, source=source)  # type: ignore[assignment]
        return self._sizes[word]

    def _written(self, node: fx.Node) -> Any:  # noqa: PLR0911 - one for each kind of node
        """What stands for `node`: a copy with its value, or its operand where it does nothing in eval mode."""
        if node in self._computed:
            return self._env[self._computed[node]]
        target: Any = SYNONYMS.get(node.target, node.target)  # type: ignore[call-overload]
        args: Any
        kwargs: Any
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self._env[n])
        target = self.program.operators.get(target, target)
        if isinstance(target, FunctionType) and isinstance(node.meta["val"], Tensor | tuple):
            return self._spelled(target, args, kwargs)
        if target is operator.getitem and isinstance(args[0], tuple | list):  # one of several results
            return args[0][args[1]]
        if target is aten.dropout.default:
            return args[0]
        if target is aten.scaled_dot_product_attention.default:
            args = args[:4] + ((0.0,) if len(args) > 4 else ()) + args[5:]
            kwargs = {n: a for n, a in kwargs.items() if n != "dropout_p"}
        if target is aten.batch_norm.default and not args[5]:
            return self._normed(args, node.name)
        value = target(*_values(args), **_values(kwargs))
        if target in NUMBER_FIRST and not all(isinstance(a, fx.Node) for a in args):
            args = self._promoted(args, value)
        if target is aten.contiguous.default:
            return self._contiguous(args[0])
        if target in IDLE:
            before = args[0].meta["val"]
            if value.dtype == before.dtype and _extent(value) == _extent(before):
                return args[0]
            if target in CASTS:
                target, args, kwargs = aten._to_copy.default, args[:1], {"dtype": value.dtype}
        if target is aten.reshape.default:  # to ONNX, size 0 is the operand's size in a `reshape`, and zero in a `view`
            copied = self._contiguous(args[0])
            target, args, kwargs = aten.view.default, (copied, args[1]), {}
            value = copied.meta["val"].view(_values(args[1]))
        return self._node(target, args, kwargs, value, node.name)

    def _normed(self, args: tuple[Any, ...], name: str) -> fx.Node:
        """Batch norm by its running statistics, as ONNX has it: input, weight, bias, mean, variance, momentum, eps."""
        target, given = aten._native_batch_norm_legit_no_training.default, (*args[:5], *args[6:8])
        value = target(*_values(given))
        results = self._node(target, given, {}, value)
        return self._node(operator.getitem, (results, 0), {}, value[0], name)

    def _promoted(self, args: tuple[Any, ...], value: Tensor) -> tuple[Any, ...]:
        """Integers beside a number with a fraction as numbers of the result's type.

        To ONNX the exporter would promote them itself, and knows no operator with the number in front.
        """
        if not value.is_floating_point():
            return args
        cast = {"dtype": value.dtype}
        whole = [isinstance(a, fx.Node) and not a.meta["val"].is_floating_point() for a in args]
        return tuple(
            self._node(aten._to_copy.default, (a,), cast, a.meta["val"].to(value.dtype)) if promote else a
            for a, promote in zip(args, whole, strict=True)
        )

    def _spelled(self, fn: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """An operator that torch does not have, as the technique that brought it writes it for exporters."""
        read: dict[fx.Node, None] = {}
        fx.node.map_arg((args, kwargs), read.setdefault)
        nodes = list(read)

        def of(*values: Any) -> Any:
            given = dict(zip(nodes, values, strict=True))
            own, named = fx.node.map_arg((args, kwargs), given.__getitem__)
            return fn(*own, **named)

        body = make_fx(of, pre_dispatch=True)(*_values(nodes))
        env: dict[fx.Node, Any] = dict(zip(body.graph.find_nodes(op="placeholder"), nodes, strict=True))
        for inner in body.graph.nodes:
            if inner.op == "call_function":
                env[inner] = self.graph.node_copy(inner, env.__getitem__)
        return fx.node.map_arg(body.graph.output_node().args[0], env.__getitem__)

    def _contiguous(self, node: fx.Node) -> fx.Node:
        """What every later `view` can read, as it stands in a graph that is decomposed; nothing to ONNX."""
        form = {"memory_format": torch.contiguous_format}
        return self._node(aten.clone.default, (node,), form, node.meta["val"].clone(**form))

    def _node(self, target: Any, args: Any, kwargs: Any, value: Any, name: str | None = None) -> fx.Node:
        node = self.graph.create_node("call_function", target, args, kwargs, name)
        node.meta["val"] = value
        return node

    def _check_free(self) -> None:
        """Shapes were computed under the condition that no free size is a certain number."""
        for word, size in self._sizes.items():
            if not isinstance(size.node.expr, sympy.Symbol):
                raise TraceError(f"the rewritten graph works only where the size {word} is {size.node.expr}")


def _values(arguments: Any) -> Any:
    return fx.node.map_arg(arguments, lambda n: n.meta["val"])


def _extent(tensor: Tensor) -> list[Any]:
    """The shape as expressions: comparing sizes themselves would bind one to the other."""
    return [size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size) for size in tensor.shape]


def _attribute(root: nn.Module, name: str) -> Any:
    found: Any = root
    for part in name.split("."):
        found = getattr(found, part)
    return found
