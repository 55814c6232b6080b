"""BitFit: train the bias vectors, and nothing else.

    y = x·W + b   with b a delta that starts at the base's b

Ben Zaken et al., "BitFit", ACL 2022 (arXiv:2106.10199), section 3.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, NoReturn

import torch
from pydantic import Field
from torch import Tensor

from surgeon.anatomy import Norm, Projection, Site, Where, select
from surgeon.errors import SelectorError
from surgeon.passes import Pass, PassResult
from surgeon.passes.slices import fused_width
from surgeon.program import Program
from surgeon.starts import value


class BitFit(Pass):
    """Make biases deltas: of projections, norms and the pooler, wherever the base has them.

    The paper's small variant is `where: [attention.query, ffn.up]`; its code adds the pooler, `head.dense`, to any
    choice. `head.out` is the base's own classifier; that of a task with labels is the head's business.
    Raises SelectorError where a selector finds no bias: adding biases to a base without them is another method.
    """

    name: ClassVar[str] = "bitfit"
    title: ClassVar[str] = "BitFit"
    paper: ClassVar[str] = "arXiv:2106.10199"
    identity_at_birth: ClassVar[bool] = True

    where: Where | None = Field(
        None, description="Projections and norms whose biases are trained; unset it is all of them but the classifier."
    )

    def call(self, program: Program) -> PassResult:
        biased = self._sites(program)
        for site in biased:
            assert site.bias is not None
            if isinstance(site, Projection) and site.features is not None and not self._whole(site, biased):
                self._train_slice(program, site, site.bias)
            else:
                program.take_over(site, "bias", site.bias)
        return PassResult(program, modified=True)

    def _sites(self, program: Program) -> list[Projection | Norm]:
        """The selected sites that have a bias, of which every selector must name one."""
        if self.where is None:
            biased = [s for s in _biased(program.anatomy.sites()) if s.role != "head.out"]
            if not biased:
                self._refuse(program, "no selected site has a bias")
            return biased
        for selector in self.where:
            if not _biased(select(program.anatomy, (selector,), Site)):
                self._refuse(program, f"'{selector}' selects no site that has a bias")
        return _biased(select(program.anatomy, self.where, Site))

    def _refuse(self, program: Program, what: str) -> NoReturn:
        with_bias = sorted({s.role for s in _biased(program.anatomy.sites())})
        raise SelectorError(
            f"bitfit: {what}",
            there_is=f"roles with biases: {', '.join(with_bias) or 'none, this base has no biases at all'}",
            try_="another `where`, or lora or adapter: they need no biases in the base",
        )

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


def _biased(sites: Iterable[Site]) -> list[Projection | Norm]:
    return [s for s in sites if isinstance(s, Projection | Norm) and s.bias is not None]
