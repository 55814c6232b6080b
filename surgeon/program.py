"""The IR: a graph under rewriting, its anatomy and the ledger of deltas; and the only functions that change them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import functional_call

from surgeon.anatomy import Anatomy, Site
from surgeon.blocks import Quantised
from surgeon.cached import PAST, PRESENT
from surgeon.errors import CompositionError, SpecError
from surgeon.holding import Holding
from surgeon.inputs import Input
from surgeon.ledger import Delta, Fold, Ledger, Penalty, Schedule, Trained, symbols
from surgeon.module import switchable
from surgeon.probes import PROBE, Probe
from surgeon.starts import Init, generator
from surgeon.starts import value as base_value
from surgeon.tokens import tokenize


@dataclass(kw_only=True)
class Program(Holding):
    """A model under surgery.

    `graph_module` holds base parameters under checkpoint names and one example parameter per delta. `drift` is how far
    it moved the answer to hold some of them in another form.
    """

    anatomy: Anatomy
    inputs: tuple[Input, ...]
    config: Any
    head: str
    max_length: int | None = None
    """Positions that the base has for text; None where nothing limits them."""
    tokenizer: Path | None = None
    """A `tokenizer.json`; None where the base has none."""
    quantised: Quantised = field(default_factory=Quantised)
    """Matrices that the base's file holds in fewer bits; the graph has the numbers that these stand for."""
    ledger: Ledger = field(default_factory=Ledger)
    applied: list[str] = field(default_factory=list)
    drift: float | None = None
    shares_cache: bool = False
    """Whether an exporter lets the cache be one buffer that is written in place."""
    _makers: dict[str, tuple[str, str]] = field(default_factory=dict)
    _taken: dict[str, tuple[Delta, tuple[str, str]]] = field(default_factory=dict)

    # -- deltas ---------------------------------------------------------------------------------------------------

    def delta(
        self,
        site: Site,
        part: str,
        shape: Sequence[int],
        init: Init | None,
        *,
        free: Mapping[int, str] | None = None,
        default: Tensor | None = None,
        dtype: torch.dtype | None = None,
        qualifier: str = "",
        rate: float = 1.0,
        optional: bool = False,
        droppable: bool = False,
        padding: float = 0.0,
        once: bool = False,
    ) -> Delta:
        """Make a delta at `site` and enter it in the ledger.

        A module called several times (a shared layer) is several sites of one path: the same pass gets the same delta
        again, as if the module had been replaced; a `qualifier` in the name keeps sites apart.
        `free` maps axes to a word such as `rank`, made a symbol of its own for this site: if sites shared one, ONNX
        Runtime would reuse buffers between them and fail as soon as two sizes differ. A word that starts with `=`
        is a symbol shared by all sites. Without `default` the free axes are empty by default.
        """
        technique = self._author[0]
        leaf = part if part.startswith(technique) else f"{technique}.{part}"
        name = ".".join(filter(None, (site.path, qualifier, leaf)))
        if self._makers.get(name) == self._author:
            return self.ledger.deltas[name]
        free = {
            axis: word[1:] if word.startswith("=") else ".".join(filter(None, (site.path, qualifier, technique, word)))
            for axis, word in (free or {}).items()
        }
        dtype = dtype or self.dtype
        if default is None:
            default = torch.zeros([0 if axis in free else size for axis, size in enumerate(shape)], dtype=dtype)
        delta = Delta(
            name=name,
            technique=technique,
            site=site.path,
            part=part,
            role=site.role,
            stack=site.stack,
            layer=site.layer,
            shape=tuple(shape),
            free=free,
            dtype=dtype,
            default=default.detach().to("cpu", copy=True) if default.device.type != "meta" else default,
            init=init,
            rate=rate,
            optional=optional,
            droppable=droppable,
            padding=padding,
            once=once,
        )
        self.ledger.add(delta)
        self._makers[name] = self._author
        example = self._example(delta).to(dtype)
        self._owner(name).register_parameter(name.rpartition(".")[2], torch.nn.Parameter(example))
        return delta

    def _example(self, delta: Delta) -> Tensor:
        """A value for the graph to hold; of a base without weights it has none either."""
        if next(self.graph_module.parameters()).is_meta:
            return torch.empty(delta.shape, device="meta")
        return delta.init(delta.shape, generator(delta.name)) if delta.init else torch.zeros(delta.shape)

    @property
    def generates(self) -> bool:
        """Whether the graph writes from a cache."""
        return any(i.cached for i in self.inputs)

    @property
    def goes_on(self) -> bool:
        """Whether the text that the passes see may be a part of one: a decoder's, and not the source of two stacks."""
        return any("past+sequence" in i.axes for i in self.inputs)

    @property
    def presents(self) -> list[str]:
        """The outputs that the cache leaves by, in the order of its inputs."""
        return [i.name.replace(PAST, PRESENT, 1) for i in self.inputs if i.cached]

    def maker(self, name: str) -> tuple[str, str]:
        """The technique and the step of the spec that made a delta."""
        return self._makers[name]

    def trained(
        self,
        name: str,
        shape: Sequence[int],
        init: Init,
        *,
        free: Mapping[int, str] | None = None,
        rate: float = 1.0,
        frozen: bool = False,
    ) -> Trained:
        """Enter a tensor that is trained but folded away before deployment. `free` maps axes to whole symbols."""
        entry = Trained(
            name=name,
            technique=self._author[0],
            shape=tuple(shape),
            dtype=self.dtype,
            init=init,
            free=dict(free or {}),
            rate=rate,
            frozen=frozen,
        )
        if self._makers.get(name) == self._author:
            return self.ledger.trained[name]
        self.ledger.add(entry)
        self._makers[name] = self._author
        return entry

    def fold(
        self,
        inputs: Sequence[str],
        outputs: Sequence[str],
        fn: Callable[..., tuple[Tensor, ...]],
        shrink: Callable[..., tuple[Tensor, ...]] | None = None,
    ) -> None:
        """Say how deployed tensors come from trained ones; once for a delta that several sites share."""
        if not any(set(outputs) & set(known.outputs) for known in self.ledger.folds):
            self.ledger.folds.append(Fold(tuple(inputs), tuple(outputs), fn, shrink))

    def penalty(self, inputs: Sequence[str], fn: Callable[..., Tensor]) -> None:
        """Let training add `fn(*trained tensors)`, a scalar, to the loss."""
        self.ledger.penalties.append(Penalty(tuple(inputs), fn))

    def schedule(self, make: Callable[[], Schedule]) -> None:
        """Let every training run of a task do between its steps what `make()` says."""
        self.ledger.schedules.append(make)

    def leave_out(self, layers: int) -> None:
        """Take out of the graph what can be dropped in the first `layers` layers: no task has it."""
        gone = self.ledger.dropped(layers)
        self.withdraw(gone)
        for name in gone | self.ledger.forget(gone):
            del self._makers[name]
        for name in gone:
            del self._owner(name)._parameters[name.rpartition(".")[2]]

    def probe(self, node: fx.Node, probe: Probe) -> None:
        """Mark a value to be looked at."""
        node.meta[PROBE] = probe

    def occupy(self, symbol: str, axis: str) -> None:
        """Say that a free size takes positions of the base from an input's axis. Raises SpecError if none is left."""
        self.ledger.positions[symbol] = axis
        sizes = symbols(self.ledger.deltas.values())
        taken = sum(sizes[s] for s, of in self.ledger.positions.items() if of == axis)
        if self.max_length is not None and taken >= self.max_length:
            raise SpecError(
                f"'{self._author[0]}' leaves no position for the text: {taken} of {self.max_length} are taken",
                try_=f"a shorter one: the base has {self.max_length} positions in all",
            )

    def tokenize(self, text: str) -> list[int]:
        """The base's token ids of some words, without special tokens around them.

        Raises SpecError where the base has no tokenizer, or no token for a part of the text.
        """
        return tokenize(self.tokenizer, text)

    def evaluate(self, nodes: Sequence[fx.Node], inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """What the base computes at some nodes, without dropout; absent inputs are filled as the base would."""
        graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
        graph.graph_copy(self.graph, env)
        graph.output([env[node] for node in nodes])
        graph.eliminate_dead_code()
        module = switchable(fx.GraphModule(self.graph_module, graph)).eval()
        device = next(self.graph_module.parameters()).device
        if (name := self.inputs[0].name) not in inputs:
            raise SpecError(f"'{self._author[0]}' reads what the base makes of words, and this base takes {name}")
        main = inputs[name]
        fills = {i.name: i.absent(main) for i in self.inputs}
        given = {name: inputs.get(name, fill) for name, fill in fills.items()}
        read = {node.target for node in graph.nodes if node.op == "get_attr"}
        defaults = {name: t.to(device) for name, t in self.ledger.defaults().items() if name in read}
        with torch.no_grad():
            found = functional_call(module, defaults, (), {name: t.to(device) for name, t in given.items()})
        return list(found)

    @property
    def taken(self) -> dict[str, str]:
        """The base's parameters that are deltas now, and these."""
        return {name: delta.name for name, (delta, _) in self._taken.items()}

    def take_over(self, site: Site, part: str, name: str, *, rate: float = 1.0, optional: bool = False) -> Delta:
        """Make the base's parameter `name` a delta that starts at its value; every reader reads the delta instead.

        Sites that share the parameter share the delta. Raises CompositionError where another pass has taken it.
        """
        self.refuse_stored(name)
        if name in self._taken:
            delta, author = self._taken[name]
            if author != self._author:
                raise CompositionError(
                    f"'{self._author[0]}' would train {name}, which '{delta.technique}' trains already",
                    try_="leave it out of one of the two with `where`",
                )
            return delta
        base = self.tensor(name)
        start = base_value(base)
        delta = self.delta(site, part, base.shape, start, default=base, dtype=base.dtype, rate=rate, optional=optional)
        self._taken[name] = (delta, self._author)
        for node in self.graph.nodes:
            if node.op == "get_attr" and node.target == name:
                node.target = delta.name
                node.meta["surgeon"] = self._author
        return delta
