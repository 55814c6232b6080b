"""Head: a classifier of the task's own, in place of the base's.

logits = h·W + b      W [d, labels], b [labels]; the number of labels is free per task, but of a head that answers
                      questions: its two columns are the start and the end of a span; and of one whose logits the base
                      adds a tensor of its own to (BART's vocabulary)
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, fx

from surgeon.anatomy import Projection, Where, select, selectors
from surgeon.errors import SelectorError, SpecError
from surgeon.passes import Pass, PassResult
from surgeon.program import Program
from surgeon.starts import normal, zeros


class Head(Pass):
    """Replace the base's last projection by one that belongs to the task.

    Its default is the base's own, so no task is the base. A task with `labels` gets that many outputs, started at
    N(0, std) with zero bias; with `hidden` the dense layer before it (BERT's pooler, say) is trained as well.
    """

    name: ClassVar[str] = "head"
    title: ClassVar[str] = "Task head"
    paper: ClassVar[str] = ""
    identity_at_birth: ClassVar[bool] = False

    labels: PositiveInt | None = Field(None, description="Outputs of a task that does not say; unset it is the base's.")
    std: float = Field(0.02, gt=0, description="Standard deviation of the fresh weights.")
    rate: float = Field(1.0, gt=0, description="Learning rate of the head, as a multiple of the trainer's.")
    hidden: bool = Field(False, description="Train the dense layer before the classifier too.")
    where: Where = Field(selectors("head.out"), description="The projection that gives the logits.")

    def call(self, program: Program) -> PassResult:
        sites = select(program.anatomy, self.where, Projection)
        if len(sites) != 1:
            raise SelectorError(
                f"head: {len(sites)} projections selected, one is needed", there_is=[s.label for s in sites]
            )
        self._replace(program, sites[0])
        if self.hidden:
            self._train_hidden(program)
        return PassResult(program, modified=True)

    def _replace(self, program: Program, site: Projection) -> None:
        d, labels = site.in_features, self.labels or site.out_features
        spans, added = program.head == "question-answering", _added(site)
        fixed = spans or added is not None
        if fixed and labels != site.out_features:
            why = (
                "a span is a start and an end, not classes"
                if spans
                else f"the base adds '{added}' to its own {site.out_features}"
            )
            raise SpecError(f"head.labels: {why}", try_="leave `labels` out")
        base = program.tensor(site.weight)
        weight = program.delta(
            site,
            "head.weight",
            (d, labels),
            normal(self.std),
            free={} if fixed else {1: "=labels"},
            default=base if site.in_first else base.T,
            rate=self.rate,
            optional=True,
        )
        base_bias = program.tensor(site.bias) if site.bias else torch.zeros(site.out_features, dtype=base.dtype)
        free = {} if fixed else {0: "=labels"}
        bias = program.delta(
            site, "head.bias", (labels,), zeros, free=free, default=base_bias, rate=self.rate, optional=True
        )

        def classified(y: Tensor, h: Tensor, w: Tensor, b: Tensor) -> Tensor:
            return (h.unsqueeze(-2) @ w).squeeze(-2) + b if h.dim() == 2 else h @ w + b

        program.replace(site.output, classified, (weight, bias), also=(site.input,))

    def _train_hidden(self, program: Program) -> None:
        for site in select(program.anatomy, selectors("head.dense"), Projection):
            for part, name in (("weight", site.weight), ("bias", site.bias)):
                if name is not None:
                    program.take_over(site, part, name, rate=self.rate, optional=True)


def _added(site: Projection) -> fx.Node | None:
    """What the base adds to the answers with a number for each of its own labels."""
    sums = [user for user in site.output.users if user.target is torch.ops.aten.add.Tensor]
    operands = [n for user in sums for n in user.all_input_nodes if n is not site.output]
    sizes = {n: value.shape[-1] for n in operands if isinstance(value := n.meta["val"], Tensor) and value.dim()}
    return next((n for n, size in sizes.items() if isinstance(size, int) and size == site.out_features), None)
