"""Bottleneck adapter: a small MLP with a residual of its own at a residual join.

    houlsby    branch -> branch + f(branch)                       before the join, after both sublayers
    pfeiffer   join   -> join + f(norm(join))                     after the feed-forward's join, norm = its post-norm
    parallel   branch -> branch + s · f(entry)                    beside the sublayer, entry = its direct input
    f(z) = act(z·W_down + b_down)·W_up + b_up                     d -> m -> d

Houlsby et al., ICML 2019 (arXiv:1902.00751), section 2.1; Pfeiffer et al. (arXiv:2005.00247), appendix A.2;
He et al. (arXiv:2110.04366), section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, fx

from surgeon.anatomy import Join, Where, select, selectors
from surgeon.errors import SpecError
from surgeon.ledger import Delta
from surgeon.passes import Pass, PassResult
from surgeon.passes.norm_tuning import train_norms
from surgeon.passes.product import call_of
from surgeon.program import Program
from surgeon.starts import Init, truncated_normal, zeros

Placement = Literal["houlsby", "pfeiffer", "parallel"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": torch.nn.functional.gelu,
    "relu": torch.nn.functional.relu,
    "silu": torch.nn.functional.silu,
    "tanh": torch.tanh,
}


class Adapter(Pass):
    """Insert an adapter at every selected residual join; 2·d·m + m + d parameters each.

    `up.weight` starts at zero, so a fresh task is exactly the base; the paper starts near it. Houlsby's recipe
    trains the layer norms too (`norms`), each a delta `weight` and `bias`.
    """

    name: ClassVar[str] = "adapter"
    title: ClassVar[str] = "Bottleneck adapter"
    paper: ClassVar[str] = "arXiv:1902.00751"
    identity_at_birth: ClassVar[bool] = True

    bottleneck: PositiveInt = Field(64, description="Width m between the two projections; free per task at run time.")
    placement: Placement = Field("houlsby", description="Where the adapter sits: see the equations above.")
    activation: Literal["gelu", "relu", "silu", "tanh"] = Field("gelu", description="Between the two projections.")
    scale: PositiveFloat | None = Field(
        None, description="Factor s of the adapter's output; unset it is 4 for `parallel` (He et al.) and 1 else."
    )
    shared: bool = Field(
        True, description="One adapter for all calls of a module that layers share (ALBERT); else each has its own."
    )
    norms: bool | None = Field(
        None, description="Train the layer norms too; unset it is true for `houlsby`, as in the paper, false else."
    )
    where: Where | None = Field(
        None,
        description="Joins to adapt; unset it is every attention and feed-forward for `houlsby`, `residual.ffn` else.",
    )

    def call(self, program: Program) -> PassResult:
        for join in self._joins(program):
            self._adapt(program, join)
        if self.placement == "houlsby" if self.norms is None else self.norms:
            train_norms(program, program.anatomy.norms)
        return PassResult(program, modified=True)

    def _joins(self, program: Program) -> tuple[Join, ...]:
        if self.where is not None:
            return select(program.anatomy, self.where, Join)
        wanted = {"residual.ffn"}
        if self.placement == "houlsby":
            wanted |= {"residual.attention"}
        found = {join.role for join in program.anatomy.joins}
        if self.placement == "houlsby" and "residual.cross_attention" in found:
            wanted |= {"residual.cross_attention"}
        return select(program.anatomy, selectors(*sorted(wanted)), Join)

    def _adapt(self, program: Program, join: Join) -> None:
        deltas = self._weights(program, join)
        f = self._across(join, join.axis)
        if self.placement == "houlsby":
            program.replace_operand([join.add], join.branch, lambda b, *w: b + f(b, *w), deltas)
        elif self.placement == "parallel":
            check_entry(join)
            f = self._across(join, join.entry_axis)
            program.replace_operand([join.add], join.branch, lambda b, x, *w: b + f(x, *w), deltas, also=(join.entry,))
        else:
            self._after_join(program, join, deltas)

    def _weights(self, program: Program, join: Join) -> tuple[Delta, ...]:
        """`down.weight`, `down.bias`, `up.weight` and `up.bias`, each trained as it is."""
        down, down_bias, up, up_bias = self._deltas(program, join, truncated_normal(0.01, 0.02), zeros)
        if self.factor != 1.0:
            names = (up.name, up_bias.name)
            program.fold(names, names, lambda u, b: (u * self.factor, b * self.factor))
        return down, down_bias, up, up_bias

    def _deltas(
        self, program: Program, join: Join, start_down: Init | None, start_up: Init | None
    ) -> tuple[Delta, Delta, Delta, Delta]:
        """The four tensors at a join; a weight without a start comes from a fold."""
        d, m, free = join.width, self.bottleneck, "bottleneck"
        call = "" if self.shared else call_of(program, join)
        make: Callable[..., Delta] = partial(program.delta, join, qualifier=call, droppable=True)
        return (
            make("down.weight", (d, m), start_down, free={1: free}),
            make("down.bias", (m,), zeros, free={0: free}),
            make("up.weight", (m, d), start_up, free={0: free}),
            make("up.bias", (d,), zeros),
        )

    @property
    def factor(self) -> float:
        """The scale s."""
        return self.scale or (4.0 if self.placement == "parallel" else 1.0)

    def _after_join(self, program: Program, join: Join, deltas: tuple[Delta, ...]) -> None:
        """Pfeiffer's layout: the norm behind the join is used twice, on the join and on the sum."""
        f, before = self._across(join, join.axis), set(program.current(join.add).users)
        z = normed(program, join)
        if z is program.current(join.add):
            program.replace(join.add, lambda j, *w: j + f(j, *w), deltas)
        else:
            program.replace(
                join.add, lambda j, z, *w: j + f(z, *w), deltas, also=(z,), keep=added(program, join, before)
            )

    def _across(self, join: Join, axis: int) -> Callable[..., Tensor]:
        """f on a value whose features stand on `axis`, laid out as the join is."""
        return lambda z, *weights: features_back(join, self._mlp(features_last(z, axis), *weights))

    def _mlp(self, z: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor) -> Tensor:
        return ACTIVATIONS[self.activation](z @ down + down_bias) @ up + up_bias


def check_entry(join: Join) -> None:
    """Raise SpecError where what a sublayer reads and what it gives are of other sizes."""
    given, wanted = (
        features_last(node.meta["val"], axis).shape
        for node, axis in ((join.entry, join.entry_axis), (join.branch, join.axis))
    )
    fixed = all(a == b or not (str(a) + str(b)).isdigit() for a, b in zip(given, wanted, strict=False))
    if len(given) != len(wanted) or not fixed:
        raise SpecError(
            f"a parallel adapter at {join.label} would read {list(map(str, given))} and add {list(map(str, wanted))}",
            try_="another placement there, or a `where` that leaves it out",
        )


def features_last(z: Tensor, axis: int) -> Tensor:
    """A value with the features of `axis` on the last one."""
    return z if axis == -1 else z.movedim(axis, -1)


def features_back(join: Join, z: Tensor) -> Tensor:
    """A value whose features are last, laid out as a join is."""
    return z if join.axis == -1 else z.movedim(-1, join.axis)


def normed(program: Program, join: Join) -> fx.Node:
    """What Pfeiffer's adapter reads: a join through a copy of the norm behind it, or the join where there is none."""
    add, norm = program.current(join.add), join.post_norm
    return add if norm is None or norm.weight_node is None else program.copy_region(add, norm.output)


def added(program: Program, join: Join, before: set[fx.Node]) -> set[fx.Node]:
    """Who reads a join now and did not before: what a pass put beside it."""
    return set(program.current(join.add).users) - before
