"""AdapterFusion: attention over adapters that other tasks have trained.

    join -> join + Σₙ sₙ · zₙV       s = softmaxₙ((uQ + q)·(zₙK + k))       zₙ = act(u·Dₙ + dₙ)·Uₙ + eₙ

u is what the adapters read: the join through its norm (the join itself where there is none), as in `pfeiffer`. The
adapters D, d, U, e are frozen; Q, K, V are trained. Linear up to the activation, so nothing d × d is deployed:

    aₙ = act(u·Dₙ + dₙ)       sₙ = softmaxₙ(aₙ·(u·Pₙ + pₙ) + u·wₙ + bₙ)       Σₙ sₙ · zₙV = Σₙ (sₙ·aₙ)·(UₙV) + sₙ·(eₙV)
    Pₙ = Q(UₙK)ᵀ       pₙ = q(UₙK)ᵀ       wₙ = Q(eₙK + k)ᵀ       bₙ = q·(eₙK + k)

Deployed, the N adapters stand side by side as C = Σ mₙ columns of one matrix, and G `[C, N]` says which are whose.

Pfeiffer et al., "AdapterFusion: Non-Destructive Task Composition for Transfer Learning" (arXiv:2005.00247),
section 3.2.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    PrivateAttr,
    StrictInt,
    StrictStr,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError
from torch import Tensor

from surgeon.anatomy import Join, Where, select, selectors
from surgeon.errors import SpecError
from surgeon.ledger import Delta
from surgeon.passes import Pass, PassResult
from surgeon.passes.adapter import ACTIVATIONS, added, features_back, features_last, normed
from surgeon.passes.trained_adapters import Source, check_sites, read_sources, stacked
from surgeon.probes import Probe
from surgeon.program import Program
from surgeon.starts import Init, normal, truncated_normal, value, zeros

CLOSED = -3e4
"""The score of an adapter that a task does not have, where tasks with more share a batch."""


def _of(value: object) -> object:
    """Names and paths, or how many."""
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 2:
            raise PydanticCustomError("fused", "must be at least 2 adapters, got {count}", {"count": value})
        return value
    if isinstance(value, list | tuple) and all(isinstance(entry, str) and entry for entry in value):
        return tuple(value)
    raise PydanticCustomError("fused", "must be a list of tasks or a number, got {got}", {"got": repr(value)[:60]})


Of = Annotated[
    tuple[StrictStr, ...] | StrictInt,
    BeforeValidator(_of),
    WithJsonSchema({"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "integer", "minimum": 2}]}),
]


class Fusion(Pass):
    """Mix trained adapters at every selected join by attention over them; 3·d² + 2·d parameters each.

    The adapters are kept with the task and stay as they are. Raises SpecError for fewer than two, DeltaError for
    adapters of another base.
    """

    name: ClassVar[str] = "fusion"
    title: ClassVar[str] = "AdapterFusion"
    paper: ClassVar[str] = "arXiv:2005.00247"
    identity_at_birth: ClassVar[bool] = False

    of: Of = Field(
        2, description="Trained tasks of `build`, or paths to `.safetensors` files; a number fuses so many random ones."
    )
    build: StrictStr | None = Field(None, description="The build of the tasks in `of`: Pfeiffer adapters of this base.")
    bottleneck: PositiveInt = Field(48, description="Width m of random adapters; trained ones bring their own.")
    activation: Literal["gelu", "relu", "silu", "tanh"] = Field("relu", description="That of the adapters.")
    scale: PositiveFloat = Field(1.0, description="Factor of the adapters' output, as they were trained with.")
    regularization: NonNegativeFloat = Field(0.01, description="Weight of ‖I − V‖² in the loss, summed over the sites.")
    where: Where | None = Field(
        None, description="Joins with adapters; unset it is `residual.ffn`, and the adapters must have no others."
    )

    _packed: bool = PrivateAttr(default=False)

    def reopened(self) -> Self:
        """The adapters are in the build's own weights: where they came from is not needed any more."""
        again = self.model_copy()
        again._packed = True
        return again

    @property
    def adapters(self) -> tuple[str, ...]:
        """What the fused adapters are called."""
        return tuple(f"adapter {i}" for i in range(self.of)) if isinstance(self.of, int) else self.of

    def call(self, program: Program) -> PassResult:
        joins = select(program.anatomy, self.where or selectors("residual.ffn"), Join)
        sources = self._sources(program)
        for source in sources:
            check_sites(source, joins, every=self.where is None)
        paths: set[str] = set()
        for join in joins:
            self._fuse(program, join, self._fold(program, join, sources, again=join.path in paths))
            paths.add(join.path)
        return PassResult(program, modified=True)

    def _sources(self, program: Program) -> tuple[Source, ...]:
        if isinstance(self.of, int):
            if self.build is not None:
                raise SpecError(
                    "`of` is a number and takes nothing from a build", try_="leave `build` out, or name tasks"
                )
            return ()
        made = {"placement": "pfeiffer", "activation": self.activation, "scale": self.scale}
        return () if self._packed else read_sources(self.of, self.build, program.fingerprint, made)

    def _fuse(self, program: Program, join: Join, deltas: dict[str, Delta]) -> None:
        """Three bodies, so that the attention weights are a value of the graph that one can look at."""
        before = set(program.current(join.add).users)
        u = normed(program, join)
        activation = ACTIVATIONS[self.activation]

        def narrow(u: Tensor, down: Tensor, bias: Tensor) -> Tensor:
            return activation(features_last(u, join.axis) @ down + bias)

        def attend(a: Tensor, u: Tensor, *of: Tensor) -> Tensor:
            u, (p, p_bias, w, b, groups) = features_last(u, join.axis), of
            return torch.softmax((a * (u @ p + p_bias)) @ groups + (u @ w + b), -1)

        def mix(x: Tensor, a: Tensor, s: Tensor, *of: Tensor) -> Tensor:
            up, bias, groups = of
            return x + features_back(join, (a * (s @ groups.transpose(-1, -2))) @ up + s @ bias)

        def read(*parts: str) -> list[Delta]:
            return [deltas[part] for part in parts]

        a = program.insert(narrow, [u], read("down.weight", "down.bias"))
        s = program.insert(attend, [a, u], read("score.weight", "score.bias", "prior.weight", "prior.bias", "groups"))
        index = f"{join.path}.fusion.adapter.index"
        program.probe(s, Probe(join, deltas["groups"].free[1], self.adapters, index))
        after = read("up.weight", "up.bias", "groups")
        program.replace(join.add, mix, after, also=(a, s), keep=added(program, join, before))

    def _fold(self, program: Program, join: Join, sources: tuple[Source, ...], *, again: bool) -> dict[str, Delta]:
        """The deployed tensors of a site, and how they come from the adapters and Q, K, V."""
        frozen = self._frozen(join, sources, program.dtype)
        (n, d, m), _ = frozen["adapter.down.weight"]
        adapters, columns = "adapters", "columns"
        deltas = {
            part: program.delta(
                join, part, shape, None, free=free, droppable=True, padding=CLOSED if part == "prior.bias" else 0.0
            )
            for part, shape, free in (
                ("down.weight", (d, n * m), {1: columns}),
                ("down.bias", (1, n * m), {1: columns}),
                ("score.weight", (d, n * m), {1: columns}),
                ("score.bias", (1, n * m), {1: columns}),
                ("prior.weight", (d, n), {1: adapters}),
                ("prior.bias", (1, n), {1: adapters}),
                ("up.weight", (n * m, d), {0: columns}),
                ("up.bias", (n, d), {0: adapters}),
                ("groups", (n * m, n), {0: columns, 1: adapters}),
            )
        }
        own = f"{join.path}.fusion"
        symbols = {"N": deltas["groups"].free[1], "M": f"{own}.bottleneck"}
        axes = {"adapter.down.weight": "N.M", "adapter.down.bias": "NM", "adapter.up.weight": "NM."}
        names = {}
        for part, (shape, init) in frozen.items():
            free = {axis: symbols[x] for axis, x in enumerate(axes.get(part, "N")) if x in symbols}
            names[part] = program.trained(f"{own}.{part}", shape, init, free=free, frozen=True).name
        for part, init in (("query", normal(0.02)), ("key", normal(0.02)), ("value", _near_identity)):
            names[f"{part}.weight"] = program.trained(f"{own}.{part}.weight", (d, d), init).name
            if part != "value":
                names[f"{part}.bias"] = program.trained(f"{own}.{part}.bias", (d,), zeros).name
        if not again:
            program.fold(list(names.values()), [delta.name for delta in deltas.values()], self._deployed)
            if self.regularization:
                program.penalty([names["value.weight"]], self._penalty)
        return deltas

    def _frozen(
        self, join: Join, sources: tuple[Source, ...], dtype: torch.dtype
    ) -> dict[str, tuple[tuple[int, ...], Init]]:
        """The adapters of a site, and their numbers: a pruned task knows by them which are left."""
        count, d, m = len(self.adapters), join.width, self.bottleneck
        index = torch.arange(float(count))
        parts = ("adapter.down.weight", "adapter.down.bias", "adapter.up.weight", "adapter.up.bias")
        if sources:
            found = {
                part: (tuple(t.shape), value(t)) for part, t in zip(parts, stacked(sources, join, dtype), strict=True)
            }
        else:
            start = truncated_normal(0.01, 0.02)
            shapes = ((count, d, m), (count, m), (count, m, d), (count, d))
            inits = (start, zeros, start, zeros)
            found = dict(zip(parts, zip(shapes, inits, strict=True), strict=True))
        return {**found, "adapter.index": ((count,), value(index))}

    def _deployed(
        self, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor, _index: Tensor, *trained: Tensor
    ) -> tuple[Tensor, ...]:
        q, q_bias, k, k_bias, v = trained
        rows, ends = up.flatten(0, 1) * self.scale, up_bias * self.scale
        keys, ends_keys = rows @ k, ends @ k + k_bias
        groups = torch.eye(len(up)).to(up).repeat_interleave(up.shape[1], 0)
        return (
            down.transpose(0, 1).flatten(1),
            down_bias.reshape(1, -1),
            q @ keys.T,
            (keys @ q_bias).unsqueeze(0),
            q @ ends_keys.T,
            (ends_keys @ q_bias).unsqueeze(0),
            rows @ v,
            ends @ v,
            groups,
        )

    def _penalty(self, v: Tensor) -> Tensor:
        return self.regularization * (v - torch.eye(len(v)).to(v)).square().sum()


def _near_identity(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """One on the diagonal, and 1e-6 off it (section 4.1)."""
    return torch.where(torch.eye(shape[0]).bool(), 1.0, 1e-6 * torch.randn(shape, generator=rng))
