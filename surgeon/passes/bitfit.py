"""BitFit: train the bias vectors, and nothing else.

    y = x·W + b   with b a delta that starts at the base's b

Ben Zaken et al., "BitFit", ACL 2022 (arXiv:2106.10199), section 3.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from surgeon.anatomy import Norm, Projection, Site, Where, select
from surgeon.errors import SelectorError
from surgeon.ledger import value
from surgeon.passes import Pass, PassResult
from surgeon.passes.slices import fused_width
from surgeon.program import Program


class BitFit(Pass):
    """Make biases deltas: of projections, norms and the pooler, wherever the base has them.

    The paper's small variant is `where: [attention.query, ffn.up]`. The classifier is the head's business.
    Raises SelectorError where nothing selected has a bias: adding biases to a base without them is another method.
    """

    name: ClassVar[str] = "bitfit"
    title: ClassVar[str] = "BitFit"
    paper: ClassVar[str] = "arXiv:2106.10199"
    identity_at_birth: ClassVar[bool] = True

    where: Where | None = Field(
        None, description="Projections and norms whose biases are trained; unset it is all of them but the classifier."
    )

    def call(self, program: Program) -> PassResult:
        sites = self._sites(program)
        biased = [s for s in sites if s.bias is not None]
        if not biased:
            with_bias = sorted({s.role for s in _candidates(program) if s.bias is not None})
            raise SelectorError(
                "bitfit: no selected site has a bias",
                there_is=f"roles with biases: {', '.join(with_bias) or 'none, this base has no biases at all'}",
                try_="another `where`, or lora or adapter: they need no biases in the base",
            )
        for site in biased:
            assert site.bias is not None
            if isinstance(site, Projection) and site.features is not None and not self._whole(site, biased):
                self._train_slice(program, site, site.bias)
            else:
                program.take_over(site, "bias", site.bias)
        return PassResult(program, modified=True)

    def _sites(self, program: Program) -> tuple[Projection | Norm, ...]:
        if self.where is None:
            return tuple(s for s in _candidates(program) if s.role != "head.out")
        chosen = select(program.anatomy, self.where, Site)
        return tuple(s for s in chosen if isinstance(s, Projection | Norm))

    def _whole(self, site: Projection, chosen: list[Projection | Norm]) -> bool:
        """All roles of this fused projection are chosen, so its bias is trained as one."""
        own = [s.features or () for s in chosen if isinstance(s, Projection) and s.node is site.node]
        return sum(map(len, own)) >= fused_width(site)

    def _train_slice(self, program: Program, site: Projection, name: str) -> None:
        """The bias of one role of a fused projection: its features come from the delta, the others from the base."""
        assert site.features is not None
        assert site.bias_node is not None
        own = list(site.features)
        base = program.tensor(name)
        start = base.detach()[own] if base.device.type != "meta" else torch.zeros(len(own))
        role = site.role.rpartition(".")[2]
        delta = program.delta(site, "bias", (len(own),), value(start), default=start, dtype=base.dtype, qualifier=role)
        position = {feature: i for i, feature in enumerate(own)}
        order = [position.get(f, len(own) + f) for f in range(base.shape[0])]

        def spliced(b: Tensor, own_bias: Tensor) -> Tensor:
            return _take(torch.cat([own_bias, b], -1), order)

        program.replace_operand([site.node], site.bias_node, spliced, (delta,))


def _take(t: Tensor, order: list[int]) -> Tensor:
    """Pick positions of the last axis, run by run, without an index tensor."""
    pieces, start = [], 0
    for i in range(1, len(order) + 1):
        if i == len(order) or order[i] != order[i - 1] + 1:
            pieces.append(t[..., order[start] : order[i - 1] + 1])
            start = i
    return torch.cat(pieces, -1)


def _candidates(program: Program) -> tuple[Projection | Norm, ...]:
    return (*program.anatomy.projections, *program.anatomy.norms)
