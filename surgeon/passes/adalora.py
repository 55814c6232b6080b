"""AdaLoRA: a low-rank product in the form of a singular value decomposition, whose ranks a shared budget prunes.

    y = x·W + b   becomes   y = x·W + b + s · ((drop(x)·A)·diag(E))·B     A [in, r], E [r], B [r, out], E starts at zero

with s = alpha / (r + 1e-5), r being the initial rank of the spec. Training adds γ · mean(‖AᵀA - I‖, ‖BBᵀ - I‖, …) to
the loss: Frobenius norms, not squared, their mean over all matrices, as in the authors' code and PEFT; the paper's
equation 4 has the sum of their squares. After each step (t from 1 to T)

    I = |w · ∂L/∂w|     Ī ← β₁·Ī + (1 - β₁)·I     U ← β₂·U + (1 - β₂)·|I - Ī|     s(w) = Ī·U
    S = s(E) + mean s(A) + mean s(B)                                       of each triplet: a column, a value, a row
    b(t) = b_T + (b_0 - b_T) · (1 - (t - t_i) / (T - t_f - t_i))³          triplets of all sites together

and the E of all triplets but the best b(t) is set to zero. Those that are zero at the end are not in the task's file.

Zhang et al., "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", ICLR 2023 (arXiv:2303.10512), section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator
from torch import Tensor

from surgeon.anatomy import Projection, Where, select
from surgeon.errors import DeltaError, SelectorError, SpecError
from surgeon.ledger import Schedule
from surgeon.passes import Pass, PassResult
from surgeon.passes.product import beside, check_rank, part_of
from surgeon.program import Program
from surgeon.starts import normal, zeros


class Triplets(NamedTuple):
    """Names of what is trained at one site."""

    a: str
    e: str
    b: str


class AdaLoRA(Pass):
    """Add a pruned low-rank product at every selected projection; up to r · (in + out) deployed parameters each.

    `target_rank` is the mean over the sites in the end: one may keep all its ranks and another none. The budget falls
    while a task is trained, by `surgeon train` or by `transformers.Trainer` with `ScheduleCallback`; a task whose
    training did not prune is not packed. Raises SpecError where the ranks do not fit, or the training is too short.
    """

    name: ClassVar[str] = "adalora"
    title: ClassVar[str] = "AdaLoRA"
    paper: ClassVar[str] = "arXiv:2303.10512"
    identity_at_birth: ClassVar[bool] = True

    rank: PositiveInt = Field(
        12, description="Initial rank r of every product; half more than the target in the paper."
    )
    target_rank: PositiveInt = Field(8, description="Mean rank of the products in the end.")
    alpha: PositiveFloat = Field(16.0, description="Scale numerator: products are multiplied by alpha / rank.")
    warmup: NonNegativeFloat = Field(
        0.1, description="Steps before the budget falls: a share of the training below 1, else a number of steps."
    )
    final: NonNegativeFloat = Field(
        0.5, description="Steps at the end with the final ranks: a share below 1, else a number of steps."
    )
    interval: PositiveInt = Field(10, description="Steps between two allocations.")
    beta1: float = Field(0.85, gt=0, lt=1, description="Decay of the mean sensitivity.")
    beta2: float = Field(0.85, gt=0, lt=1, description="Decay of its mean deviation.")
    orthogonal: NonNegativeFloat = Field(0.5, description="Weight of the regulariser that keeps A and B orthogonal.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the product's input, in training only.")
    where: Where | None = Field(
        None, description="Projections to adapt; unset it is all of attention and feed-forward, as in the paper."
    )

    @field_validator("warmup", "final")
    @classmethod
    def _whole(cls, steps: float) -> float:
        if steps >= 1 and steps != int(steps):
            raise ValueError("below 1 it is a share of the training, from 1 on a whole number of steps")
        return steps

    def call(self, program: Program) -> PassResult:
        if self.target_rank > self.rank:
            raise SpecError(
                f"adalora.target_rank {self.target_rank} is above the initial rank {self.rank}: ranks are only taken",
                try_=f"a rank of {self.target_rank * 3 // 2}, half more than the target",
            )
        sites = tuple(dict.fromkeys(self._adapt(program, site) for site in self._sites(program)))
        if self.orthogonal:
            program.penalty([name for t in sites for name in (t.a, t.b)], self._regulariser)
        program.schedule(lambda: Allocation(self, sites))
        return PassResult(program, modified=True)

    def _sites(self, program: Program) -> tuple[Projection, ...]:
        if self.where is not None:
            return select(program.anatomy, self.where, Projection)
        wanted = ("attention", "cross_attention", "ffn")
        found = tuple(p for p in program.anatomy.projections if p.role.partition(".")[0] in wanted)
        if not found:
            raise SelectorError("adalora: this base has no projections in attention or feed-forward")
        return found

    def _adapt(self, program: Program, site: Projection) -> Triplets:
        r, free = self.rank, "rank"
        check_rank("adalora.rank", r, site.label, site.in_features, site.out_features)
        part = part_of(site)
        a = program.delta(site, "lora_A", (site.in_features, r), normal(0.02), free={1: free}, qualifier=part)
        b = program.delta(site, "lora_B", (r, site.out_features), normal(0.02), free={0: free}, qualifier=part)
        e = program.trained(a.name.removesuffix("A") + "E", (r,), zeros, free={0: a.free[1]})
        scale = self.alpha / (r + 1e-5)

        def folded(a: Tensor, e: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            return a, b * (e * scale).unsqueeze(-1)

        program.fold((a.name, e.name, b.name), (a.name, b.name), folded, _survivors)
        beside(program, site, a, b, self.dropout)
        return Triplets(a.name, e.name, b.name)

    def _regulariser(self, *matrices: Tensor) -> Tensor:
        """`matrices` are A and B of every site in turn."""
        grams = [m.T @ m if i % 2 == 0 else m @ m.T for i, m in enumerate(matrices)]
        norms = [torch.linalg.matrix_norm(g - torch.eye(len(g), dtype=g.dtype, device=g.device)) for g in grams]
        return self.orthogonal * torch.stack(norms).mean()


def _survivors(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Without the ranks whose E is zero."""
    kept = (b != 0).any(-1)
    return a[:, kept], b[kept]


class Allocation(Schedule):
    """The budget of one task: scores of the triplets at every step, and the E of the worst set to zero."""

    def __init__(self, options: AdaLoRA, sites: tuple[Triplets, ...]) -> None:
        self.options, self.sites = options, sites
        self.steps = self.first = self.last = 0
        self.mean: dict[str, Tensor] = {}
        self.spread: dict[str, Tensor] = {}
        self.kept: dict[str, Tensor] = {}

    def begin(self, model: Any, steps: int) -> None:
        first, last = (int(s * steps) if s < 1 else int(s) for s in (self.options.warmup, self.options.final))
        if first >= steps - last:
            raise SpecError(
                f"adalora: {first} steps of warm-up and {last} final ones leave none of {steps} to prune in",
                try_="a longer training, or smaller `warmup` and `final`; below 1 they are shares of it",
            )
        self.steps, self.first, self.last = steps, first, steps - last
        self.kept = {}
        names = [name for site in self.sites for name in site]
        self.mean, self.spread = ({n: torch.zeros_like(model.get_parameter(n)) for n in names} for _ in range(2))

    def budget(self, step: int, initial: int) -> int:
        """Triplets that may be left after a step, of `initial` ones."""
        target = min(self.options.target_rank * len(self.sites), initial)
        if step <= self.first:
            return initial
        left = max(1 - (step - self.first) / (self.last - self.first), 0.0)
        return int((initial - target) * left**3 + target)

    def before(self, model: Any, step: int) -> None:
        if step > self.last and not self.kept:  # a trainer that keeps no state of ours went on from its checkpoint
            self.kept = {site.e: (model.get_parameter(site.e) != 0).detach() for site in self.sites}

    @torch.no_grad()
    def after(self, model: Any, step: int) -> None:
        if step < self.last:
            self._observe(model)
        if step == self.last or (self.first < step < self.last and step % self.options.interval == 0):
            self._allocate(model, step)
        elif step > self.last:
            for name, kept in self.kept.items():
                model.get_parameter(name).masked_fill_(~kept, 0.0)

    def _observe(self, model: Any) -> None:
        for name, mean in self.mean.items():
            w = model.get_parameter(name)
            sensitivity = torch.zeros_like(w) if w.grad is None else (w * w.grad).abs()
            mean.mul_(self.options.beta1).add_((1 - self.options.beta1) * sensitivity)
            spread = (1 - self.options.beta2) * (sensitivity - mean).abs()
            self.spread[name].mul_(self.options.beta2).add_(spread)

    def _allocate(self, model: Any, step: int) -> None:
        scores = [self._scores(site) for site in self.sites]
        every = torch.cat(scores)
        pruned = len(every) - self.budget(step, len(every))
        if pruned > 0:
            threshold = every.kthvalue(pruned).values
            self.kept = {site.e: score > threshold for site, score in zip(self.sites, scores, strict=True)}
            for name, kept in self.kept.items():
                model.get_parameter(name).masked_fill_(~kept, 0.0)

    def _scores(self, site: Triplets) -> Tensor:
        a, e, b = (self.mean[name] * self.spread[name] for name in site)
        return e + a.mean(0) + b.mean(1)

    def settled(self, step: int) -> bool:
        return step >= self.last

    def check(self, model: Any) -> None:
        left = sum(int((model.get_parameter(site.e) != 0).sum()) for site in self.sites)
        budget = self.options.target_rank * len(self.sites)
        if left > budget:
            raise DeltaError(
                f"adalora: {left} ranks are left in the task, and its budget is {budget}: it was not pruned to the end",
                try_="`surgeon train`, or `ScheduleCallback(model)` among the callbacks of `transformers.Trainer`",
            )

    def state(self) -> dict[str, Tensor]:
        parts = {"mean": self.mean, "spread": self.spread, "kept": self.kept}
        return {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.kept = {}
        for path, tensor in state.items():
            part, _, name = path.partition("/")
            getattr(self, part)[name] = tensor.to(self.mean[name].device, copy=True)
