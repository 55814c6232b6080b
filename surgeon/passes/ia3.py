"""IA3: learned vectors that scale keys, values and the inner activations of the feed-forward.

    k·l_k,   v·l_v,   (l_ff · act(x·W_up))·W_down      l starts at one

Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", NeurIPS 2022
(arXiv:2205.05638), section 3.3.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from surgeon.anatomy import Projection, Where, select, selectors
from surgeon.errors import SelectorError, SpecError
from surgeon.ledger import Delta
from surgeon.passes import Pass, PassResult
from surgeon.passes.slices import scatter
from surgeon.program import Program
from surgeon.starts import ones


class IA3(Pass):
    """Scale what selected projections give, or what a `down` projection takes; one vector a site.

    A fresh task is exactly the base, for everything is multiplied by one.
    """

    name: ClassVar[str] = "ia3"
    title: ClassVar[str] = "IA3"
    paper: ClassVar[str] = "arXiv:2205.05638"
    identity_at_birth: ClassVar[bool] = True

    where: Where | None = Field(
        None, description="Projections to scale; unset it is the keys and values of every attention and `ffn.down`."
    )
    inputs: Where = Field(
        selectors("*.down"), description="Those of them of which the input is scaled, not the output."
    )

    def call(self, program: Program) -> PassResult:
        for site in self.sites(program):
            inward = self.inward(program, site)
            width = site.in_features if inward else site.out_features
            role = site.role.rpartition(".")[2] if site.features else ""
            delta = program.delta(site, "ia3_l", (width,), ones, default=torch.ones(width), qualifier=role)
            if inward:
                readers = program.readers(site.input, site.node)
                program.replace_operand(readers, site.input, lambda x, scale: x * scale, (delta,))
            else:
                self._scale_output(program, site, delta)
        return PassResult(program, modified=True)

    def inward(self, program: Program, site: Projection) -> bool:
        """Whether the input of `site` is scaled, not its output."""
        return any(selector.matches(site, program.anatomy) for selector in self.inputs)

    def sites(self, program: Program) -> tuple[Projection, ...]:
        """The projections that are scaled."""
        chosen = self._chosen(program)
        for selector in self.inputs if "inputs" in self.model_fields_set else ():
            found = [site for site in select(program.anatomy, (selector,), Projection) if site in chosen]
            if not found:
                raise SpecError(f"ia3.inputs: '{selector}' selects nothing that `where` does")
            if any(site.features for site in found):
                raise SpecError(f"ia3.inputs: {found[0].label} shares its input: it is a part of a fused projection")
        return chosen

    def _chosen(self, program: Program) -> tuple[Projection, ...]:
        if self.where is not None:
            return select(program.anatomy, self.where, Projection)
        wanted = ("attention.key", "attention.value", "cross_attention.key", "cross_attention.value", "ffn.down")
        found = tuple(p for p in program.anatomy.projections if p.role in wanted)
        if not found:
            raise SelectorError("ia3: this base has no keys, values or feed-forward to scale")
        return found

    def _scale_output(self, program: Program, site: Projection, delta: Delta) -> None:
        place = scatter(site)

        def scaled(y: Tensor, scale: Tensor) -> Tensor:
            return y * scale if site.features is None else y * (1 + place(scale - 1))

        program.replace(site.output, scaled, (delta,))
