"""The delta ledger: which tensors belong to a task, and how what is trained becomes what is deployed.

Passes write it; everything after them (training, saving, ONNX, switching, reports) reads it and knows no technique.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from surgeon.errors import CompositionError, DeltaError, shorten
from surgeon.starts import ByLabels, Init, generator


@dataclass(frozen=True, kw_only=True)
class Delta:
    """A deployed tensor of a task: an input of the ONNX graph with a default that leaves the base as it is.

    `shape` is as this spec sizes it; the axes in `free` may have another size in every task, those that share
    a symbol the same one. Without `init` the tensor is not trained itself: a fold computes it.
    `rate` multiplies the learning rate. A task may leave an `optional` delta to the base, as it may keep the base's own
    head; a `droppable` one can be left out layer by layer at run time (AdapterDrop). `padding` fills up its free axes
    where tasks of several sizes share a batch: what leaves the larger task's function as it is. One that acts `once` is
    read where a text begins, and has its default where a later part of the text goes on from a cache.
    """

    name: str
    technique: str
    site: str
    part: str
    role: str
    stack: str = ""
    layer: int | None = None
    shape: tuple[int, ...]
    free: Mapping[int, str]
    dtype: torch.dtype
    default: Tensor
    init: Init | None
    rate: float = 1.0
    optional: bool = False
    droppable: bool = False
    padding: float = 0.0
    once: bool = False

    def sample(self, device: torch.device | None = None) -> Tensor:
        """Zeros to trace with: free axes of at least two, since sizes 0 and 1 are frozen by a trace."""
        shape = [max(s, 2) if a in self.free else s for a, s in enumerate(self.shape)]
        return torch.zeros(shape, dtype=self.dtype, device=device)

    @property
    def least(self) -> dict[int, int]:
        """The free axes that no task may empty: those of which the default, the base, has something."""
        return {axis: 1 for axis in self.free if self.default.shape[axis]}

    def sized(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape where the free symbols named in `sizes` take that size."""
        return tuple(sizes.get(self.free.get(axis, ""), size) for axis, size in enumerate(self.shape))


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A tensor that is trained but not deployed, such as a weight of a prefix's reparametrisation.

    A `frozen` one belongs to the task and is saved with it, but keeps its starting value: an adapter under a fusion.
    `free` names the axes whose size a task may choose, as in `Delta`.
    """

    name: str
    technique: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    init: Init
    free: Mapping[int, str] = field(default_factory=dict)
    rate: float = 1.0
    frozen: bool = False


class Start(NamedTuple):
    """How a tensor of a task begins, and how it is trained."""

    shape: tuple[int, ...]
    init: Init
    dtype: torch.dtype
    rate: float = 1.0
    frozen: bool = False


@dataclass(frozen=True)
class Fold:
    """Computes the deployed tensors `outputs` from the trained tensors `inputs`; differentiable.

    A name may stand on both sides: the trained `lora_B` is unscaled, the deployed one scaled. `shrink` takes the
    outputs to smaller tensors of the same function for the task file, say without the ranks that were pruned.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    fn: Callable[..., tuple[Tensor, ...]]
    shrink: Callable[..., tuple[Tensor, ...]] | None = None


@dataclass(frozen=True)
class Penalty:
    """A term that training adds to the loss: a scalar from trained tensors."""

    inputs: tuple[str, ...]
    fn: Callable[..., Tensor]


class Schedule:
    """What a technique does between the steps of a training run; each task has one of its own.

    Steps count from 1 to `steps`. Whatever the steps to come depend on is in `state`, so that a run can be resumed.
    """

    def begin(self, model: Any, steps: int) -> None:
        """Before the first step; forgets an earlier run. Raise SpecError where a run of so many steps does not fit."""

    def before(self, model: Any, step: int) -> None:
        """Before the forward pass of a step."""

    def after(self, model: Any, step: int) -> None:
        """After the optimiser's step, while its gradients are there."""

    def settled(self, step: int) -> bool:
        """Whether weights after this step may be kept as the best ones."""
        return True

    def check(self, model: Any) -> None:
        """Before the task is written. Raise DeltaError where its weights are not such as a whole run leaves them."""

    def state(self) -> dict[str, Tensor]:
        """Tensors of a checkpoint."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint's tensors."""


@dataclass
class Ledger:
    """All deltas of a program, in the order the passes made them."""

    deltas: dict[str, Delta] = field(default_factory=dict)
    trained: dict[str, Trained] = field(default_factory=dict)
    folds: list[Fold] = field(default_factory=list)
    penalties: list[Penalty] = field(default_factory=list)
    schedules: list[Callable[[], Schedule]] = field(default_factory=list)
    positions: dict[str, str] = field(default_factory=dict)
    """Free symbols that take so many positions of the base from an input's axis: of a prompt, say, from `sequence`."""

    def add(self, entry: Delta | Trained) -> None:
        """Enter one tensor. Raises CompositionError where the name is taken or a shared free size differs."""
        taken = self.deltas.get(entry.name) or self.trained.get(entry.name)
        if taken:
            raise CompositionError(
                f"'{entry.technique}' makes a tensor that '{taken.technique}' before it has made: {entry.name}",
                try_="leave one of the two out, or give them different sites with `where`",
            )
        if isinstance(entry, Delta):
            self._check_sizes(entry)
            self.deltas[entry.name] = entry
        else:
            self.trained[entry.name] = entry

    def _check_sizes(self, entry: Delta) -> None:
        """Raise CompositionError where a free size that several sites share would have two values."""
        known = symbols(self.deltas.values())
        for axis, symbol in entry.free.items():
            size = known.get(symbol, entry.shape[axis])
            if size != entry.shape[axis]:
                raise CompositionError(
                    f"'{entry.technique}' wants {symbol} to be {entry.shape[axis]}, and it is {size} already",
                    there_is="one size for all sites that share it",
                    try_="the same size in both items, or one item for both",
                )

    def parameters(self, sizes: Mapping[str, int] | None = None) -> dict[str, Start]:
        """How every trained tensor starts, for a task with these free sizes."""
        own = {d.name: Start(d.sized(sizes or {}), d.init, d.dtype, d.rate) for d in self.deltas.values() if d.init}
        return own | {t.name: Start(t.shape, t.init, t.dtype, t.rate, t.frozen) for t in self.trained.values()}

    def free(self, name: str) -> Mapping[int, str]:
        """The free axes of a trained tensor."""
        return (self.deltas.get(name) or self.trained[name]).free

    def least(self, name: str) -> Mapping[int, int]:
        """Of a trained tensor, the free axes that no task may empty."""
        return self.deltas[name].least if name in self.deltas else {}

    def deploy(
        self, trained: Mapping[str, Tensor], dropped: Mapping[str, Tensor] = MappingProxyType({})
    ) -> dict[str, Tensor]:
        """Fold trained tensors into deployed ones, in the ledger's order; `dropped` ones are as given."""
        folded: dict[str, Tensor] = {}
        for fold in self.folds:
            if dropped.keys() >= set(fold.outputs):
                continue
            folded.update(zip(fold.outputs, fold.fn(*(trained[n] for n in fold.inputs)), strict=True))
        every = {**trained, **folded, **dropped}
        return {n: every[n] for n in self.deltas}

    def shrink(self, deployed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The deployed tensors as a task file holds them."""
        smaller = dict(deployed)
        for fold in self.folds:
            if fold.shrink is not None:
                smaller.update(zip(fold.outputs, fold.shrink(*(deployed[n] for n in fold.outputs)), strict=True))
        return smaller

    def dropped(self, layers: int) -> frozenset[str]:
        """The deltas that AdapterDrop leaves out: droppable ones below layer `layers` of their stack."""
        return frozenset(n for n, d in self.deltas.items() if d.droppable and d.layer is not None and d.layer < layers)

    def idle(self, dropped: Collection[str]) -> frozenset[str]:
        """Tensors that have no effect where the deltas `dropped` are left out."""
        live: set[str] = set()
        dead = set(dropped)
        for fold in self.folds:
            (dead if dead.issuperset(fold.outputs) else live).update(fold.inputs)
        return frozenset(dead - live)

    def forget(self, names: Collection[str]) -> frozenset[str]:
        """Have these deltas no more, nor what has no effect without them. Returns all that is gone."""
        gone = self.idle(names) | set(names)
        self.folds = [fold for fold in self.folds if not gone.issuperset(fold.outputs)]
        self.penalties = [penalty for penalty in self.penalties if not gone.issuperset(penalty.inputs)]
        for entries in (self.deltas, self.trained):
            for name in gone & entries.keys():
                del entries[name]
        return gone

    @property
    def depth(self) -> int:
        """Layers there are to drop from: fewer than these may be left out, so that every stack keeps something."""
        tops: dict[str, int] = {}
        for delta in self.deltas.values():
            if delta.droppable and delta.layer is not None:
                tops[delta.stack] = max(tops.get(delta.stack, 0), delta.layer + 1)
        return min(tops.values(), default=0)

    def defaults(self) -> dict[str, Tensor]:
        """The deployed tensors with which the program is the base."""
        return {n: d.default for n, d in self.deltas.items()}


def initial(
    ledger: Ledger, seed: str, sizes: Mapping[str, int] | None = None, labels: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Fresh trained tensors; each depends on `seed` and its own name only, so specs can grow without reshuffling.

    `labels` are the names of the task's labels: see `ByLabels`.
    """
    fresh = {}
    for name, start in ledger.parameters(sizes).items():
        init = ByLabels(start.init.fn, labels) if isinstance(start.init, ByLabels) else start.init
        fresh[name] = init(start.shape, generator(f"{seed}/{name}")).to(start.dtype)
    return fresh


def symbols(deltas: Iterable[Delta]) -> dict[str, int]:
    """Every free symbol with the size this spec gives it."""
    return {symbol: delta.shape[axis] for delta in deltas for axis, symbol in delta.free.items()}


def check_trained(
    ledger: Ledger, wanted: Mapping[str, Start], tensors: Mapping[str, Tensor], sizes: Mapping[str, int]
) -> None:
    """Raise DeltaError unless `tensors` are exactly those wanted, finite and of fitting shapes.

    Free axes of one symbol must be of one size, and of the one that `sizes` gives it.
    """
    missing, extra = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
    if missing or extra:
        raise DeltaError(
            f"{len(missing)} of {len(wanted)} tensors are missing and {len(extra)} do not belong here",
            there_is=f"missing: {shorten(missing) or 'none'}; unexpected: {shorten(extra) or 'none'}",
            try_="compile the spec these weights were trained with",
        )
    known = dict(sizes)
    for name, start in wanted.items():
        tensor = tensors[name]
        free = ledger.free(name)
        fits = tensor.dim() == len(start.shape) and all(
            got == (known.setdefault(free[axis], got) if axis in free else size)
            for axis, (got, size) in enumerate(zip(tensor.shape, start.shape, strict=True))
        )
        if not fits:
            raise DeltaError(f"{name} has shape {list(tensor.shape)}, expected {_shape(start.shape, free, known)}")
        empty = [free[axis] for axis in ledger.least(name) if not tensor.shape[axis]]
        if empty:
            raise DeltaError(f"{empty[0]} is 0 in {name}, and must be 1 at least")
        if not torch.isfinite(tensor).all():
            bad = (~torch.isfinite(tensor)).sum().item()
            raise DeltaError(f"NaN or infinity in {name} ({bad} of {tensor.numel()} values)")


def _shape(shape: tuple[int, ...], free: Mapping[int, str], known: Mapping[str, int]) -> str:
    return f"[{', '.join(str(known.get(free[a], 'any') if a in free else s) for a, s in enumerate(shape))}]"
