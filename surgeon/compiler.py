"""The driver: spec and base in, a compiled program out, ready to train and to save."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import fx

from surgeon.anatomy import find
from surgeon.base import Base, open_base
from surgeon.errors import SpecError, did_you_mean
from surgeon.model import TaskModel
from surgeon.module import switchable
from surgeon.passes import Pass
from surgeon.pipeline import run_passes
from surgeon.plan import Plan, plan
from surgeon.program import Program
from surgeon.registry import technique
from surgeon.spec import Spec, read_spec
from surgeon.trace import text_inputs, trace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[str], None]


@dataclass
class Compiled:
    """A base after surgery, and one trainable model per task."""

    spec: Spec
    base: Base
    program: Program
    _graph: fx.GraphModule = field(init=False)
    _models: dict[str, TaskModel] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._graph = switchable(self.program.graph_module)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the spec's tasks."""
        return tuple(self.spec.tasks)

    def model(self, task: str) -> TaskModel:
        """The trainable module of `task`, always the same object. Raises SpecError for an unknown task."""
        if task not in self.spec.tasks:
            raise SpecError(f"there is no task '{task}'", there_is=self.tasks, try_=did_you_mean(task, self.tasks))
        if task not in self._models:
            self._models[task] = TaskModel(
                self._graph,
                self.program.ledger,
                self.program.inputs,
                self.program.config,
                self.base.head,
                labels=self.spec.tasks[task].labels,
                seed=f"{self.spec.seed}/{task}",
                kept=self._kept(task),
            )
        return self._models[task]

    def _kept(self, task: str) -> frozenset[str]:
        """A task without labels keeps the base's own head, unless the spec trains one for all."""
        if self.spec.tasks[task].labels is not None or any(step.name == "head" for step in self.spec.steps):
            return frozenset()
        return frozenset(name for name, d in self.program.ledger.deltas.items() if d.technique == "head")

    @property
    def plan(self) -> Plan:
        """What was inserted: sites, parameters and bytes."""
        return plan(self.program)

    def save(self, out: str | Path, *, progress: Progress | None = None) -> Path:
        """Write the build directory `out`, which must be absent or empty."""
        from surgeon.build import write_build

        return write_build(self, Path(out), progress or (lambda _: None))


def compile(
    spec: Spec | str | Path | Mapping[str, Any],
    base: PreTrainedModel | None = None,
    *,
    out: str | Path | None = None,
    weights: bool = True,
    progress: Progress | None = None,
) -> Compiled:
    """Compile `spec` for its base, or for `base` in hand; with `out` also write the build there.

    `weights=False` works on the meta device: enough for a plan, of a base of any size.
    """
    report = progress or (lambda _: None)
    spec = read_spec(spec)
    source = base if base is not None else spec.base
    if source is None:
        raise SpecError("the spec names no base, and none was given", try_="write `base: {model: …}` or pass a model")
    if out is not None:
        from surgeon.build import check_writable

        check_writable(Path(out))
    report("reading the base")
    opened = open_base(source, weights=weights, seed=spec.seed)
    report("tracing")
    inputs = text_inputs(opened.model)
    graph_module = trace(opened.model, inputs)
    report("finding the anatomy")
    program = Program(
        graph_module=graph_module,
        anatomy=find(graph_module),
        inputs=inputs,
        config=opened.model.config,
        head=opened.head,
        frozen=frozenset(n for n, _ in [*graph_module.named_parameters(), *graph_module.named_buffers()]),
    )
    report("operating")
    run_passes(program, list(passes(spec)), lambda i: spec.locate(("surgery", i)))
    compiled = Compiled(spec, opened, program)
    if out is not None:
        compiled.save(out, progress=report)
    return compiled


def passes(spec: Spec) -> Iterator[Pass]:
    """The spec's passes; tasks with labels need a head, which comes last where the spec does not place it."""
    yield from spec.steps
    if any(t.labels is not None for t in spec.tasks.values()) and not any(s.name == "head" for s in spec.steps):
        yield technique("head")()
