"""A task put into the base for good: a base with other numbers, and nothing beside them.

No technique says how. Between the input of a projection and what the passes made of its output, the graph computes a
function f of the input alone. Where f is affine, a projection can do it: its bias is f(0), its matrix f(I) - f(0), both
in double precision. So LoRA, DoRA, IA3, VeRA, biases and heads merge, in any combination; a bottleneck does not, and
what is at no projection, as a prefix, has no place to go to.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, fx, nn

from surgeon.anatomy import Embedding, Projection
from surgeon.base import write_base
from surgeon.build import check_writable
from surgeon.compiler import Compiled, compile, load
from surgeon.errors import DeltaError, InvariantError, SpecError, did_you_mean, shorten
from surgeon.inputs import sample_inputs, vocabulary
from surgeon.model import TaskModel, on_cpu, task_config
from surgeon.module import switchable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AFFINE = 1e-9
"""How far f may be from what its projection computes, relative, in double precision."""
ROUNDED = 1e-5
"""The same where the base's tensors come in another form, as NF4, and f is computed in the base's precision."""
FORMATS = ("transformers", "onnx")
EXACT = 1e-4
"""How far the merged base may answer from the task, relative: float32 in another order of sums."""


def merge(compiled: Compiled, task: str) -> PreTrainedModel:
    """The base of `compiled` with the weights of `task` in it, as a plain model of transformers.

    Raises DeltaError where the base cannot hold what the task does, and says why.
    """
    model = compiled.model(task)
    with on_cpu([model]):
        return _merged(compiled, task, model)


def _merged(compiled: Compiled, task: str, model: TaskModel) -> PreTrainedModel:
    merged: Any = copy.deepcopy(compiled.base.model)
    merged.eval()
    tensors = _Merging(compiled, {n: t.detach() for n, t in model.deployed().items()}).tensors()
    for name in compiled.program.stored:
        tensors.setdefault(name, compiled.program.tensor(name))
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        module = merged.get_submodule(owner)
        module.register_parameter(leaf, nn.Parameter(tensor.detach().clone(), requires_grad=False))
        if isinstance(module, nn.Linear):
            module.out_features = module.weight.shape[0]
    merged.config = task_config(merged.config, model.label_names)
    if model.label_names is not None and hasattr(merged, "num_labels"):
        merged.num_labels = len(model.label_names)
    _compare(compiled, task, merged)
    return cast("PreTrainedModel", merged)


def merge_task(
    build: str | Path,
    task: str,
    out: str | Path,
    *,
    to: str = "transformers",
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Write a task of a build, merged into its base, into the folder `out`, absent or empty.

    `to` is `transformers`, a checkpoint, or `onnx`, a build of the merged base that has no tasks.
    """
    out, report = Path(out), progress or (lambda _: None)
    if to not in FORMATS:
        raise SpecError(f"there is no format '{to}'", there_is=FORMATS, try_=did_you_mean(to, FORMATS))
    check_writable(out)
    compiled = load(build, writes=False, progress=progress)
    report(f"merging {task}")
    merged = merge(compiled, task)
    source = f"{compiled.base.source}, with {task} merged"
    if to == "transformers":
        write_base(replace(compiled.base, model=merged, source=source), out)
        return out
    spec, export = compiled.spec, compiled.spec.export.model_copy(update={"modes": ("switch",)})
    plain = spec.model_copy(update={"base": None, "surgery": (), "tasks": {}, "export": export})
    again = compile(plain, merged, progress=progress)
    return replace(again, base=replace(again.base, source=source)).save(out, progress=progress)


@dataclass
class _Merging:
    """The base's tensors that change, found one by one."""

    compiled: Compiled
    deltas: Mapping[str, Tensor]
    found: dict[str, tuple[Tensor, set[fx.Node]]] = field(default_factory=dict)
    merged: set[str] = field(default_factory=set)

    def tensors(self) -> dict[str, Tensor]:
        """Name to tensor. Raises DeltaError for a delta that none of them can hold."""
        program = self.compiled.program
        projections = sorted(program.anatomy.projections, key=lambda p: p.node.name)
        for _, parts in groupby(projections, key=lambda p: p.node):
            self._project(next(iter(parts)))
        for table in program.anatomy.embeddings:
            self._look_up(table)
        for name, (tensor, readers) in self.found.items():
            self._check_shared(name, tensor, readers)
        tensors = {name: tensor for name, (tensor, _) in self.found.items()}
        for name, delta in program.taken.items():
            tensors.setdefault(name, self.deltas.get(delta, program.ledger.deltas[delta].default))
            self.merged.add(delta)
        if left := [d for d in program.ledger.deltas.values() if d.name not in self.merged and d.name in self.deltas]:
            techniques = sorted({d.technique for d in left})
            raise DeltaError(
                f"a base has no place for what {' and '.join(techniques)} {'does' if len(techniques) == 1 else 'do'}",
                there_is=shorten(d.name for d in left),
                try_="serve the task beside the base, as the build does",
            )
        return tensors

    def _project(self, site: Projection) -> None:
        region = _Region(self.compiled, site.input, self.compiled.program.current(site.output), self.deltas)
        if not region.own:
            return
        shift = region(torch.zeros(1, site.in_features))[0]
        weight = region(torch.eye(site.in_features)) - shift
        probe = torch.randn(5, site.in_features, generator=torch.Generator().manual_seed(0))
        wanted = region(probe)
        limit = ROUNDED if self.compiled.program.stored else AFFINE
        if (wanted - (probe.to(wanted.dtype) @ weight + shift)).abs().max() > limit * wanted.abs().max().clamp(min=1):
            raise self._refuse(region, site.label, "is not linear")
        self._enter(site.weight, weight if site.in_first else weight.T, site.node)
        if site.bias is not None:
            self._enter(site.bias, shift, site.node)
        elif shift.abs().max() > limit:
            raise self._refuse(region, site.label, "adds a bias, and the base has none there")
        self.merged |= region.own

    def _look_up(self, site: Embedding) -> None:
        region = _Region(self.compiled, site.index, self.compiled.program.current(site.node), self.deltas)
        if region.own:
            self._enter(site.weight, region(torch.arange(site.rows)), site.node)
            self.merged |= region.own

    def _enter(self, name: str, tensor: Tensor, reader: fx.Node) -> None:
        former, readers = self.found.get(name, (tensor, set()))
        if former.shape != tensor.shape or not torch.allclose(former, tensor, AFFINE, AFFINE):
            raise self._shared(name)
        self.found[name] = (former, readers | {reader})

    def _check_shared(self, name: str, tensor: Tensor, readers: set[fx.Node]) -> None:
        """Does everything that reads the tensor want the new one?"""
        nodes = [n for n in self.compiled.program.graph.nodes if n.op == "get_attr" and n.target == name]
        others = {reader for node in nodes for reader in node.users} - readers
        base = self.compiled.program.tensor(name)
        if any(reader.meta.get("surgeon") is None for reader in others) and base.shape == tensor.shape:
            raise self._shared(name)
        self.found[name] = (tensor.to(base.dtype), readers)

    def _shared(self, name: str) -> DeltaError:
        return DeltaError(
            f"{name} is read in several places of the base, and the task changes it in some of them only",
            try_="serve the task beside the base, as the build does",
        )

    def _refuse(self, region: _Region, label: str, why: str) -> DeltaError:
        deltas = self.compiled.program.ledger.deltas
        techniques = sorted({deltas[name].technique for name in region.own})
        return DeltaError(
            f"what {' and '.join(techniques)} {'does' if len(techniques) == 1 else 'do'} at {label} {why}",
            there_is=shorten(sorted(region.own)),
            try_="serve the task beside the base, as the build does",
        )


class _Region:
    """What the graph computes from one value to another, as a function `[rows, …] -> [rows, …]`.

    `own` are the task's deltas in it; none where the region also depends on anything else that is no tensor.
    """

    def __init__(self, compiled: Compiled, start: fx.Node, end: fx.Node, deltas: Mapping[str, Tensor]) -> None:
        self._compiled, self._start, self._end, self._deltas = compiled, start, end, deltas
        self._nodes = set(_between(start, end))
        read = {str(node.target) for node in self._nodes if node.op == "get_attr"}
        known = {symbol for size in start.meta["val"].shape for symbol in _free(size)}
        whole = all(
            known.issuperset(_free(node.meta["val"])) if _size(node) else node.op in ("get_attr", "call_function")
            for node in self._nodes
        )
        self.own = read & compiled.program.ledger.deltas.keys() if whole else set[str]()

    def __call__(self, rows: Tensor) -> Tensor:
        shape: tuple[Any, ...] = self._start.meta["val"].shape
        symbols = sorted({s for size in shape for s in _free(size)}, key=str)
        sizes = dict.fromkeys(symbols, 1) | dict.fromkeys(symbols[-1:], len(rows))
        graph, env = fx.Graph(), dict[fx.Node, Any]()
        env[self._start] = graph.placeholder("rows")
        for node in self._start.graph.nodes:
            if _size(node) and node in self._nodes:
                env[node] = int(node.meta["val"].node.expr.subs(sizes))
            elif node in self._nodes:
                env[node] = graph.node_copy(node, env.__getitem__)
        graph.output(env[self._end])
        module = switchable(fx.GraphModule(self._compiled.program.graph_module, graph)).eval()
        given = {n: self._precise(self._value(n)) for n in {str(n.target) for n in graph.nodes if n.op == "get_attr"}}
        lead = [int(size.node.expr.subs(sizes)) if _free(size) else int(size) for size in shape]
        with torch.no_grad():
            out: Tensor = torch.func.functional_call(module, given, (self._precise(rows).reshape(lead),))
        return out.reshape(len(rows), -1)

    def _precise(self, tensor: Tensor) -> Tensor:
        exact = tensor.is_floating_point() and not self._compiled.program.stored
        return tensor.double() if exact else tensor

    def _value(self, name: str) -> Tensor:
        program = self._compiled.program
        if name in program.ledger.deltas:
            return self._deltas.get(name, program.ledger.deltas[name].default)
        return program.tensor(name).detach()


def _between(start: fx.Node, end: fx.Node) -> Iterator[fx.Node]:
    """All nodes that `end` depends on, without what is behind `start`."""
    seen, left = {start}, [end]
    while left:
        node = left.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        if not _size(node):
            left.extend(node.all_input_nodes)


def _size(node: fx.Node) -> bool:
    """Whether it is a size, which the graph computes from shapes."""
    return isinstance(node.meta.get("val"), torch.SymInt)


def _free(size: Any) -> Iterable[Any]:
    return size.node.expr.free_symbols if isinstance(size, torch.SymInt) else ()


def _compare(compiled: Compiled, task: str, merged: PreTrainedModel) -> None:
    """Let both answer. Raises InvariantError where they differ: a fault of Surgeon's."""
    model = compiled.model(task)
    inputs = sample_inputs(compiled.program.inputs, vocabulary(compiled.base.model), torch.device("cpu"))
    training = model.training
    with torch.no_grad():
        wanted = next(iter(model.eval()(**inputs).values()))
        found = next(iter(merged(**inputs).values()))
    model.train(training)
    if wanted.shape != found.shape or (wanted - found).abs().max() > EXACT * wanted.abs().max().clamp(min=1):
        raise InvariantError(f"task '{task}', merged into its base, answers otherwise than beside it")
