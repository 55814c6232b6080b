"""The driver: spec and base in, a compiled program out, ready to train and to save."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import fx

from surgeon.anatomy import find
from surgeon.base import Base, load_base, open_base
from surgeon.build import BASE, check_writable, pack_tasks, write_build
from surgeon.contents import Contents
from surgeon.errors import BuildError, DeltaError, InvariantError, SpecError, did_you_mean
from surgeon.exporters.generation import generation
from surgeon.exporters.quantise import check_weights, products
from surgeon.exporters.shared import shareable
from surgeon.halves import Halves, halves
from surgeon.inputs import Input, base_inputs, cached_inputs
from surgeon.ledger import Delta, symbols
from surgeon.model import TaskModel, on_cpu
from surgeon.module import switchable
from surgeon.passes import Pass
from surgeon.pipeline import run_passes
from surgeon.plan import Plan, plan
from surgeon.program import Program
from surgeon.registry import technique
from surgeon.runtime.document import read_manifest
from surgeon.runtime.files import hash_file
from surgeon.runtime.manifest import OUTSIDE, Task
from surgeon.spec import BaseSpec, HeadName, Spec, read_spec
from surgeon.trace import LONGEST, trace
from surgeon.weights import read_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[str], None]


@dataclass
class Compiled:
    """A base after surgery, and one trainable model per task."""

    spec: Spec
    base: Base
    program: Program
    served: Program | Halves | None = None
    """What writes texts from a cache, where the spec wants it: another graph, or two, with the same deltas.

    That of a decoder is what is exported. Those of an encoder-decoder stand beside the whole model.
    """
    _graph: fx.GraphModule = field(init=False)
    _models: dict[str, TaskModel] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_weights(self.program, self.spec.export.weights, self.spec.locate(("export", "weights")))
        self._check_checkpoint()
        self._graph = switchable(self.program.graph_module)
        labelled = [name for name, task in self.spec.tasks.items() if task.labels is not None]
        if labelled and "labels" not in symbols(self.program.ledger.deltas.values()):
            raise SpecError(
                f"task '{labelled[0]}' has labels, and what the base's head answers are no classes",
                where=self.spec.locate(("tasks", labelled[0], "labels")),
                there_is=f"head: {self.base.head}",
                try_="leave `labels` out; a `head` item in `surgery` gives every task a head of its own",
            )

    def _check_checkpoint(self) -> None:
        """Raise SpecError where weights are to stay in the files of a base that has none."""
        weights = self.spec.export.weights
        if weights in OUTSIDE and self.spec.base and self.base.fingerprint and not self.base.checkpoint:
            raise SpecError(
                f"export.weights: {weights} reads the base's weights from its checkpoint, and this base has none",
                where=self.spec.locate(("export", "weights")),
                there_is=self.base.source,
                try_="a base from a folder with .safetensors files, or `weights: copy`",
            )

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
        return frozenset(name for name, d in self.program.ledger.deltas.items() if d.optional)

    @property
    def plan(self) -> Plan:
        """What was inserted: sites, parameters and bytes."""
        weights = self.spec.export.weights
        return plan(self.program, weights, set(products(self.program.graph, self.program, weights).values()))

    def save(self, out: str | Path, *, progress: Progress | None = None) -> Path:
        """Write the build directory `out`, which must be absent or empty."""
        if self.spec.export.generate and self.served is None:
            raise SpecError("this was loaded without what writes texts", try_="`load(…)` without `writes=False`")
        models = {task: self.model(task) for task in self.tasks}
        contents = Contents(self.spec, self.base, self.program, models, self.served)
        with on_cpu(models.values()):
            return write_build(contents, Path(out), progress or _silent)

    def pack(self, build: str | Path, *tasks: str) -> None:
        """Put the present weights of `tasks` into an existing build, all at once; the others stay as they are.

        Raises DeltaError for a build over another base.
        """
        pack_tasks(Path(build), {task: self.model(task) for task in tasks}, self.program.fingerprint)

    def renew(self, tasks: Iterable[str]) -> None:
        """Take the base as its weights are now, after they were trained: another base, which `save` writes too.

        The surgery is done anew, for what reads the base then reads the new one. Of the tasks only those named are
        left, those that were trained with it; `model` gives new modules.
        """
        trained = {task: self.model(task).state_dict() for task in self.spec.tasks if task in set(tasks)}
        kept = {task: self.spec.tasks[task] for task in trained}
        spec = self.spec.model_copy(update={"base": None, "tasks": kept})
        steps = [step.reopened() for step in passes(spec)]
        model = self.base.model
        if len({t.device for t in (*model.parameters(), *model.buffers())}) > 1:  # training moved what the graph reads
            model.cpu()
        again = _operate(spec, model, steps, lent=True, report=_silent)
        source = f"{self.base.source}, trained further"
        self.spec, self.base = spec, replace(again.base, source=source)
        self.program, self.served = again.program, again.served
        self._models = {}
        self.__post_init__()
        for task, tensors in trained.items():
            self.model(task).load_state_dict(tensors)


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
    spec = read_spec(spec)
    if out is not None:
        check_writable(Path(out))
    steps = list(passes(spec))
    compiled = _operate(spec, base, steps, lent=base is not None, weights=weights, report=progress or _silent)
    if out is not None:
        compiled.save(out, progress=progress)
    return compiled


def _operate(
    spec: Spec,
    base: PreTrainedModel | None,
    steps: list[Pass],
    *,
    lent: bool,
    weights: bool = True,
    writes: bool = True,
    report: Progress,
) -> Compiled:
    """Open the base, trace it, and run `steps`, the passes of `spec`. A base that the caller `lent` stays whole."""
    source = base if base is not None else spec.base
    if source is None:
        raise SpecError("the spec names no base, and none was given", try_="write `base: {model: …}` or pass a model")
    opened, program = study(source, weights=weights, seed=spec.seed, progress=report)
    report("operating")
    run_passes(program, steps, lambda i: spec.locate(("surgery", i)))
    served = _generating(spec, opened, program, steps, report) if spec.export.generate and writes else None
    if not lent:
        opened.release(program.stored)
    return Compiled(spec, opened, program, served)


def study(
    source: BaseSpec | PreTrainedModel, *, weights: bool = True, seed: int = 0, progress: Progress | None = None
) -> tuple[Base, Program]:
    """Open a base, trace it and find its anatomy: a program that no pass has changed yet."""
    report = progress or _silent
    report("reading the base")
    opened = open_base(source, weights=weights, seed=seed)
    report("tracing")
    graph_module = trace(opened.model)
    report("finding the anatomy")
    program = begin(opened, graph_module)
    return replace(opened, max_length=program.max_length), program


def _generating(spec: Spec, opened: Base, program: Program, steps: list[Pass], report: Progress) -> Program | Halves:
    """The same surgery on the base as it generates. Raises SpecError for a base that does not."""
    where = spec.locate(("export", "generate"))
    if opened.head not in {"causal-lm", "seq2seq-lm"}:
        raise SpecError(
            "export.generate: this base does not write texts",
            where=where,
            there_is=f"head: {opened.head}",
            try_="`head: causal-lm` or `head: seq2seq-lm` under `base`",
        )
    report("tracing with a cache")
    inputs = cached_inputs(opened.model)
    served = begin(opened, trace(opened.model, inputs), inputs)
    report("operating")
    run_passes(served, steps, lambda i: spec.locate(("surgery", i)))
    if [_port(d) for d in served.ledger.deltas.values()] != [_port(d) for d in program.ledger.deltas.values()]:
        raise InvariantError("with a cache the surgery gives other deltas than without", where=where)
    if opened.model.config.is_encoder_decoder:
        both = halves(served)
        generation(opened, both)  # so that what the base asks for and is not done is told now
        return both
    if spec.export.cache == "auto":
        report("comparing the cache as one buffer")
        reason = shareable(served)
        served.shares_cache = reason is None
        if reason is not None:
            report(f"the cache grows from token to token: {reason}")
    return served


def _port(delta: Delta) -> tuple[Any, ...]:
    return delta.name, delta.shape, dict(delta.free), delta.dtype, tuple(delta.default.shape)


def begin(opened: Base, graph_module: fx.GraphModule, inputs: tuple[Input, ...] | None = None) -> Program:
    """The program of a traced base before surgery; it takes texts as long as the base and its trace do."""
    limits = [n for n in (opened.max_length, graph_module.meta.get(LONGEST)) if n is not None]
    return Program(
        graph_module=graph_module,
        anatomy=find(graph_module),
        inputs=inputs or base_inputs(opened.model),
        config=opened.model.config,
        head=opened.head,
        fingerprint=opened.fingerprint,
        max_length=min(limits, default=None),
        tokenizer=opened.tokenizer_path,
        quantised=opened.quantised,
        frozen=frozenset(n for n, _ in [*graph_module.named_parameters(), *graph_module.named_buffers()]),
    )


def load(
    build: str | Path, base: PreTrainedModel | None = None, *, writes: bool = True, progress: Progress | None = None
) -> Compiled:
    """Open a build for more training: its spec on its base, every task with the weights packed last.

    `writes=False` leaves out what writes texts, which `save` needs, and neither training nor `pack`.
    Raises BuildError for a damaged build, DeltaError where the base is not the one it was built from.
    """
    build = Path(build)
    manifest = read_manifest(build)
    spec = read_spec(build / "spec.yaml")
    lent = base is not None
    if base is None and spec.base is None:
        base = load_base(BaseSpec(model=str(build / BASE), head=cast(HeadName, manifest.base.head)), seed=spec.seed)
    steps = [step.reopened() for step in passes(spec)]
    compiled = _operate(spec, base, steps, lent=lent, writes=writes, report=progress or _silent)
    if compiled.program.fingerprint != manifest.base.fingerprint:
        stored = sorted({entry.form for entry in compiled.program.stored.values()})
        raise DeltaError(
            "the base is not the one this build was made from",
            where=str(build),
            there_is=f"the build's: {manifest.base.fingerprint[:16]}; this one's: {compiled.program.fingerprint[:16]}",
            try_="the same checkpoint and revision, or compile the spec again for this base"
            + (f"; another version of what wrote its {', '.join(stored)} makes another base too" if stored else ""),
        )
    for name, task in manifest.tasks.items():
        path = build / task.weights
        if hash_file(path) != task.weights_sha256:
            raise BuildError("has other content than the manifest says", where=str(path))
        compiled.model(name).load_state_dict(read_weights(path, manifest.base.fingerprint))
    return compiled


def pack_weights(build: str | Path, task: str, weights: str | Path, *, progress: Progress | None = None) -> Task:
    """Put weights that were trained elsewhere into a build; returns the task's entry in the manifest.

    Raises DeltaError for tensors that do not fit or another base; the build is then as it was.
    """
    build, weights = Path(build), Path(weights)
    tensors = read_weights(weights, read_manifest(build).base.fingerprint)
    compiled = load(build, writes=False, progress=progress)
    try:
        compiled.model(task).load_state_dict(tensors)
    except DeltaError as error:
        raise DeltaError(error.what, where=str(weights), there_is=error.there_is, try_=error.try_) from error
    (progress or _silent)(f"packing {task}")
    compiled.pack(build, task)
    return read_manifest(build).tasks[task]


def passes(spec: Spec) -> Iterator[Pass]:
    """The spec's passes; tasks with labels need a head, which comes last where the spec does not place it."""
    yield from spec.steps
    if any(t.labels is not None for t in spec.tasks.values()) and not any(s.name == "head" for s in spec.steps):
        yield technique("head")()


def _silent(_: str) -> None:
    """No progress wanted."""
