"""Writes the spec whose graph holds several foreign checkpoints: the union of their sites, the largest of their sizes.

Ranks, lengths and labels are free for every task, so the sizes here are only what a fresh task would start with.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypeVar

from surgeon.anatomy import Anatomy, Attention, Embedding, Join, Norm, Projection, Selector, Site, select
from surgeon.base import Base
from surgeon.errors import DeltaError, SpecError
from surgeon.foreign.pieces import Bottleneck, Checkpoint, Fused, Piece, Prefix, Product, Prompt, Scaling, Shared, Whole
from surgeon.foreign.sites import form, join_at, module_names, projections, stack_of
from surgeon.passes.columns import biased
from surgeon.passes.distances import countable
from surgeon.program import Program

S = TypeVar("S", bound=Site)
P = TypeVar("P", bound=Piece)

HEAD = ("head.out", "head.dense")


def union(checkpoints: Mapping[str, Checkpoint], base: Base, program: Program) -> dict[str, Any]:
    """`surgery` and `tasks` of a spec for these checkpoints. Raises SpecError where no graph holds them all."""
    view = _View(checkpoints, base, program)
    inserted = (view.prompt(), view.prefix(), *view.lora(), view.vera(), view.ia3(), view.adapter(), view.fusion())
    steps = (*inserted, *view.parameters(), view.head())
    return {"surgery": [step for step in steps if step], "tasks": {task: view.task(task) for task in checkpoints}}


class _View:
    """What several checkpoints need of one base."""

    def __init__(self, checkpoints: Mapping[str, Checkpoint], base: Base, program: Program) -> None:
        self.checkpoints = checkpoints
        self.base = base
        self.program = program
        self.anatomy = program.anatomy

    def pieces(self, kind: type[P]) -> Iterator[tuple[P, str]]:
        """Every piece of a kind, with the folder it comes from."""
        for checkpoint in self.checkpoints.values():
            yield from ((p, checkpoint.where) for p in checkpoint.pieces if isinstance(p, kind))

    def sites(self, path: str, where: str) -> list[Projection]:
        return list(projections(self.anatomy, self.base.model, path, where))

    def where(self, sites: Collection[S], kind: type[S]) -> list[str]:
        return where(self.anatomy, sites, kind)

    def prompt(self) -> dict[str, Any] | None:
        lengths = [len(p.rows) for p, _ in self.pieces(Prompt)]
        return {"prompt": {"length": max(lengths), "place": "front"}} if lengths else None

    def prefix(self) -> dict[str, Any] | None:
        found = list(self.pieces(Prefix))
        if not found:
            return None
        if len({p.shift for p, _ in found}) > 1:
            raise SpecError(
                "the prefixes of these folders move the text's positions in some and not in others",
                there_is=[f"{where}: {'yes' if p.shift else 'no'}" for p, where in found],
                try_="one build for each kind",
            )
        sites = [
            site
            for piece, where in found
            for site in self.anatomy.attentions
            if site.stack == stack_of(self.anatomy, piece.stack, where) and site.cross == piece.cross
        ]
        options: dict[str, Any] = {"length": max(len(p.keys[0]) for p, _ in found), "shift": found[0][0].shift}
        if biased(self.program, sites):
            if not countable(sites):
                raise DeltaError(
                    "the base adds a bias by distance to its scores, which is looked up in no table",
                    where=found[0][1],
                    there_is="a prefix whose keys have such a bias too where it was trained, and none here",
                    try_="train it again with `prefix`",
                )
            options["distances"] = found[0][0].distances
        return {"prefix": {**options, "where": self.where(sites, Attention)}}

    def lora(self) -> Iterator[dict[str, Any]]:
        """One item for plain products, one for those with a bias, one for those with a magnitude (DoRA)."""
        products = list(self.pieces(Product))
        if not products:
            return
        targets = [(p, target) for p, folder in products for target in self._targets(p, folder)]
        kinds = {
            "dora": {t for p, t in targets if p.magnitude is not None},
            "bias": {t for p, t in targets if p.bias is not None},
        }
        if both := kinds["dora"] & kinds["bias"]:
            raise SpecError(f"lora at {both.pop().label} has a bias in one folder and a magnitude in another")
        rank = max(p.a.shape[1] for p, _ in products) or 1
        options = {
            "rank": rank,
            **self._scale([p for p, _ in products if p.values is None] or [p for p, _ in products]),
        }
        plain = {t for _, t in targets} - kinds["dora"] - kinds["bias"]
        for kind, chosen in (("", plain), *kinds.items()):
            if chosen:
                yield {"lora": options | self._lora_at(chosen, rank) | ({kind: True} if kind else {})}

    def _targets(self, piece: Product, folder: str) -> list[Projection | Embedding]:
        if not piece.table:
            return [*self.sites(piece.path, folder)]
        found = [e for e in self.anatomy.embeddings if e.path == piece.path]
        if not found:
            raise DeltaError(f"the base has no table {piece.path}", where=folder)
        return [*found]

    def _scale(self, products: list[Product]) -> dict[str, Any]:
        """The scale that most have: their tensors stay as they are, byte for byte. The others' are multiplied."""
        alphas = Counter((p.scale * p.a.shape[1], False) for p in products)
        alphas += Counter((p.scale * math.sqrt(p.a.shape[1]), True) for p in products)
        (alpha, stabilised), _ = max(alphas.items(), key=lambda item: (item[1], not item[0][1]))
        return {"alpha": float(f"{alpha:.12g}") or 1.0, "rslora": stabilised}

    def _lora_at(self, targets: Collection[Projection | Embedding], rank: int) -> dict[str, Any]:
        """`where`, and `ranks` for matrices that are narrower than the rank."""
        linear = [t for t in targets if isinstance(t, Projection)]
        tables = [t for t in targets if isinstance(t, Embedding)]
        limits = {t.path: min(t.in_features, t.out_features) for t in linear}
        limits |= {t.path: min(t.rows, t.width) for t in tables}
        texts = self.where(linear, Projection) + self.where(tables, Embedding)
        narrow = {f"name:{path}": limit for path, limit in limits.items() if limit < rank}
        return {"where": texts, **({"ranks": narrow} if narrow else {})}

    def vera(self) -> dict[str, Any] | None:
        found = list(self.pieces(Shared))
        if not found:
            return None
        forms = {(len(p.between), p.key): folder for p, folder in found}
        if len(forms) > 1:
            raise SpecError(
                "VeRA's matrices are shared by all tasks of a build, and these folders have others each",
                there_is=[f"{folder}: rank {rank}, key {key}" for (rank, key), folder in forms.items()],
                try_="one build for each rank and key",
            )
        ((rank, key),) = forms
        sites = self.where([site for p, folder in found for site in self.sites(p.path, folder)], Projection)
        return {"vera": {"rank": rank, "projection_key": key, "where": sites}}

    def ia3(self) -> dict[str, Any] | None:
        found = [(p.inward, site) for p, folder in self.pieces(Scaling) for site in self.sites(p.path, folder)]
        both = {site.path for inward, site in found if inward} & {site.path for inward, site in found if not inward}
        if both:
            raise SpecError(f"ia3 scales the input of {min(both)} in one folder and its output in another")
        if not found:
            return None
        if down := [s.label for inside, s in found if not inside and s.role.endswith(".down")]:
            raise SpecError(
                f"ia3 scales the output of {down[0]} in these folders",
                there_is="`ia3` scales what a projection that leads down takes, as the paper does",
                try_="train it again with `ia3`; of a Llama, AdapterHub's IA3 is not the paper's",
            )
        inward = self.where([site for inside, site in found if inside], Projection)
        options = {"where": self.where([s for _, s in found], Projection)}
        return {"ia3": options | ({"inputs": inward} if inward else {})}

    def adapter(self) -> dict[str, Any] | None:
        found = [(p, join_at(self.anatomy, p.path, folder)) for p, folder in self.pieces(Bottleneck)]
        if not found:
            return None
        forms = {form(piece) for piece, _ in found}
        if len(forms) > 1:
            raise SpecError(
                "the adapters of these folders sit in different places or have different activations",
                there_is=sorted(" ".join(own) for own in forms),
                try_="one build for each kind",
            )
        ((placement, activation),) = forms
        scale = Counter(p.scale for p, _ in found).most_common(1)[0][0]
        options = {"bottleneck": max(len(p.weights[1]) for p, _ in found), "scale": scale, "norms": False}
        joins = self.where([join for _, join in found], Join)
        return {"adapter": options | {"placement": placement, "activation": activation, "where": joins}}

    def fusion(self) -> dict[str, Any] | None:
        found = list(self.pieces(Fused))
        if not found:
            return None
        adapters = [adapter for p, _ in found for adapter in p.adapters]
        activations = {adapter.activation for adapter in adapters}
        if len(activations) > 1:
            raise SpecError(
                "the fused adapters have different activations", there_is=sorted(activations), try_="one build for each"
            )
        return {
            "fusion": {
                "of": max(2, *(len(p.adapters) for p, _ in found)),
                "bottleneck": max(len(adapter.weights[1]) for adapter in adapters),
                "activation": activations.pop(),
                "scale": Counter(adapter.scale for adapter in adapters).most_common(1)[0][0],
                "where": self.where([join_at(self.anatomy, p.path, folder) for p, folder in found], Join),
            }
        }

    def parameters(self) -> Iterator[dict[str, Any]]:
        """Norms and biases that belong to a task."""
        names = {p.name: folder for p, folder in self.pieces(Whole) if p.name not in self._head_names()}
        norms = [n for n in self.anatomy.norms if n.weight in names]
        for norm in norms:
            names = {k: v for k, v in names.items() if k not in (norm.weight, norm.bias)}
        candidates: tuple[Projection | Norm, ...] = (*self.anatomy.projections, *self.anatomy.norms)
        biased = [s for s in candidates if s.bias in names]
        left = set(names) - {s.bias for s in biased}
        if left:
            name = min(left)
            raise DeltaError(
                f"{name} is a parameter that no technique gives a task",
                where=names[name],
                there_is="heads, norms and biases",
            )
        if norms:
            yield {"norm_tuning": {"where": self.where(norms, Norm)}}
        if biased:
            yield {"bitfit": {"where": self.where([*biased], Site)}}

    def _head_names(self) -> set[str]:
        """Parameters of the head, and of the dense layer before it, where a folder brings the weight."""
        brought = {p.name for p, _ in self.pieces(Whole)}
        names: set[str] = set()
        for site in self.anatomy.projections:
            weights = set(module_names(self.base.model, site.weight)) if site.role in HEAD else set()
            names |= weights | {site.bias or ""} if weights & brought else set()
        return names & brought

    def head(self) -> dict[str, Any] | None:
        """The head, where a folder brings one, and the dense layer before it where one brings that."""
        names = self._head_names()
        dense = {s.weight for s in self.anatomy.projections if s.role == "head.dense"} & names
        return {"head": {"hidden": bool(dense)}} if names else None

    def task(self, name: str) -> dict[str, Any]:
        """The labels of a task, where its folder brings a head for more than one."""
        checkpoint = self.checkpoints[name]
        if checkpoint.labels is not None:
            return {"labels": list(checkpoint.labels)}
        if self.base.head not in ("sequence-classification", "token-classification"):
            return {}
        heads = [s for s in self.anatomy.projections if s.role == "head.out"]
        widths = [
            p.tensor.shape[1 if s.in_first else 0]
            for p in checkpoint.pieces
            if isinstance(p, Whole)
            for s in heads
            if p.name in module_names(self.base.model, s.weight)
        ]
        return {"labels": widths[0]} if widths and widths[0] > 1 else {}


def where(anatomy: Anatomy, sites: Collection[S], kind: type[S]) -> list[str]:
    """The shortest selectors, in words of roles where possible, that select exactly these sites."""
    left, wanted, found = list(dict.fromkeys(sites)), set(sites), []
    while left:
        site = left[0]
        for text in _candidates(site, wanted):
            selected = select(anatomy, (Selector.parse(text),), kind)
            if set(selected) <= wanted:
                found.append(text)
                left = [s for s in left if s not in selected]
                break
        else:
            raise SpecError(f"no selector selects {site.label} alone", there_is=site.path)
    return sorted(found)


def _candidates(site: Site, wanted: Collection[Site]) -> Iterator[str]:
    yield site.role
    yield f"{site.stack}/{site.role}"
    if site.layer is not None:
        own = (site.stack, site.role)
        alike = sorted({s.layer for s in wanted if (s.stack, s.role) == own and s.layer is not None})
        yield f"{site.stack}/{site.role}@{','.join(map(str, alike))}"
    yield f"name:{site.path}"
