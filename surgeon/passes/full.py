"""Full fine-tuning: every parameter of the base is the task's own. The yardstick, not a small technique.

    θ_task starts at θ_base      as many numbers as the base has

What Houlsby et al. (arXiv:1902.00751, section 3) and nearly every paper here compare with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

from pydantic import Field

from surgeon.anatomy import Embedding, Norm, Projection, Site, Where, select
from surgeon.errors import SelectorError
from surgeon.passes import Pass, PassResult
from surgeon.program import Program

Owner = Projection | Norm | Embedding


class Full(Pass):
    """Make parameters of the base deltas: all that are read, or those of the selected sites; a tied one once.

    A classifier is left to `head`. Raises SelectorError where `where` selects a part of a fused weight only: it is one
    tensor, and the rest of it would be trained as well.
    """

    name: ClassVar[str] = "full"
    title: ClassVar[str] = "Full fine-tuning"
    paper: ClassVar[str] = ""
    identity_at_birth: ClassVar[bool] = True

    where: Where | None = Field(
        None, description="Projections, norms and embeddings to train; unset it is every parameter of the base."
    )

    def call(self, program: Program) -> PassResult:
        homes = _homes(program)
        for name in self._chosen(program, homes):
            owner, _, leaf = name.rpartition(".")
            stranger = Site(role="other", stack="", layer=None, path=owner)
            program.take_over(replace(homes.get(name, [stranger])[0], path=owner), leaf, name)
        return PassResult(program, modified=True)

    def _chosen(self, program: Program, homes: Mapping[str, list[Site]]) -> list[str]:
        if self.where is None:
            return _parameters(program, homes)
        chosen = [s for s in select(program.anatomy, self.where, Site) if isinstance(s, Owner)]
        names = dict.fromkeys(name for site in chosen for name in _tensors(site))
        if not names:
            raise SelectorError(
                "full: nothing that was selected has parameters",
                try_="projections, norms or embeddings; `surgeon inspect` shows them",
            )
        for name in names:
            left = {site.role for site in homes[name] if site not in chosen and _slice(site)}
            if left and any(_slice(site) for site in homes[name] if site in chosen):
                raise SelectorError(
                    f"full: {name} is one tensor of several roles, and not all of them are selected",
                    there_is=f"left out: {', '.join(sorted(left))}",
                    try_="select them too, or lora, which can adapt one role of a fused projection",
                )
        return list(names)


def _parameters(program: Program, homes: Mapping[str, list[Site]]) -> list[str]:
    """Parameters of the base that the graph reads, but those of a classifier alone: that is the head's business."""
    known = {name for name, _ in program.graph_module.named_parameters()} & program.frozen
    if program.head.endswith("-classification"):
        known -= {name for name, sites in homes.items() if {site.role for site in sites} == {"head.out"}}
    read = dict.fromkeys(str(n.target) for n in program.graph.nodes if n.op == "get_attr" and n.users)
    return [name for name in read if name in known]


def _homes(program: Program) -> dict[str, list[Site]]:
    """The sites that each parameter belongs to."""
    homes: dict[str, list[Site]] = {}
    anatomy = program.anatomy
    sites: tuple[Owner, ...] = (*anatomy.projections, *anatomy.norms, *anatomy.embeddings)
    for site in sites:
        for name in _tensors(site):
            homes.setdefault(name, []).append(site)
    return homes


def _tensors(site: Owner) -> list[str]:
    bias = None if isinstance(site, Embedding) else site.bias
    return [name for name in (site.weight, bias) if name is not None]


def _slice(site: Site) -> bool:
    return isinstance(site, Projection) and site.features is not None
