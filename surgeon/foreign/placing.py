"""Puts the pieces of a foreign checkpoint into the deltas of one task; what finds no place is an error.

A file's module path is our site's path, so the match is by structure: no model's and no layer's name is known here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from surgeon.anatomy import Projection, Site
from surgeon.compiler import Compiled
from surgeon.errors import DeltaError
from surgeon.foreign import inserted
from surgeon.foreign.meaning import own_scale, scales_input, times
from surgeon.foreign.pieces import Bottleneck, Fused, Piece, Prefix, Product, Prompt, Same, Scaling, Shared, Whole
from surgeon.foreign.sites import module_names, parameter, projections
from surgeon.ledger import Delta


class Placing:
    """The trained tensors of one task, filled piece by piece."""

    def __init__(self, compiled: Compiled, where: str) -> None:
        self.compiled = compiled
        self.program = compiled.program
        self.ledger = compiled.program.ledger
        self.where = where
        self.tensors: dict[str, Tensor] = {}

    def place(self, piece: Piece) -> None:
        """Fill the deltas that `piece` is made of. Raises DeltaError where the build has none for it."""
        match piece:
            case Product():
                self._product(piece)
            case Scaling():
                self._scaling(piece)
            case Whole():
                self._whole(piece)
            case Same():
                self._same(piece)
            case Shared():
                inserted.shared(self, piece)
            case Prefix():
                inserted.prefix(self, piece)
            case Prompt():
                inserted.prompt(self, piece)
            case Bottleneck():
                inserted.bottleneck(self, piece)
            case Fused():
                inserted.fused(self, piece)
            case _:
                raise TypeError(type(piece).__name__)

    # -- looking up ---------------------------------------------------------------------------------------------

    def delta(self, site: Site, part: str, technique: str | None = None) -> Delta | None:
        """The delta of this part that a pass made for `site`; where several did, that of `technique`."""
        found = [d for d in self.deltas(part) if (d.site, d.role, d.stack) == (site.path, site.role, site.stack)]
        return min(found, key=lambda d: d.technique != technique, default=None)

    def deltas(self, part: str) -> list[Delta]:
        """All deltas of this part."""
        return [d for d in self.ledger.deltas.values() if d.part == part]

    def projections(self, path: str) -> Sequence[Projection]:
        """The roles of the module at `path`, each once."""
        found = projections(self.program.anatomy, self.compiled.base.model, path, self.where)
        return list({site.role: site for site in reversed(found)}.values())[::-1]

    def lacking(self, what: str, path: str, technique: str) -> DeltaError:
        """The build has no place for something."""
        applied = [d.site for d in self.ledger.deltas.values() if d.technique == technique]
        return DeltaError(
            f"the build has no `{technique}` for {what} of {path}",
            where=self.where,
            there_is=list(dict.fromkeys(applied)) or f"techniques {', '.join(self.program.applied) or 'none'}",
            try_="compile a spec that has it; `surgeon import FOLDER --base BASE -o BUILD` writes one",
        )

    def put(self, delta: Delta, tensor: Tensor) -> None:
        """Fill one delta. Raises DeltaError for a shape that the base does not have there, or a second value."""
        fits = tensor.dim() == len(delta.shape) and all(
            axis in delta.free or size == got
            for axis, (size, got) in enumerate(zip(delta.shape, tensor.shape, strict=True))
        )
        if not fits:
            raise DeltaError(
                f"{delta.name} would be {list(tensor.shape)} and is "
                f"{['any' if a in delta.free else s for a, s in enumerate(delta.shape)]}",
                where=self.where,
                try_="was it trained on another base?",
            )
        if delta.name in self.tensors and not self.tensors[delta.name].equal(tensor):
            raise DeltaError(f"{delta.name} would have two values", where=self.where)
        self.tensors[delta.name] = tensor.contiguous()

    # -- pieces -------------------------------------------------------------------------------------------------

    def _product(self, piece: Product) -> None:
        """A product of a fused projection is one for each of its roles, with the same factor `a`: exact."""
        if piece.table:
            self._table(piece)
            return
        sites = self.projections(piece.path)
        width = sum(site.out_features for site in sites)
        if piece.b.shape[1] != width or piece.a.shape[0] != sites[0].in_features:
            raise DeltaError(
                f"{piece.path} goes from {piece.a.shape[0]} to {piece.b.shape[1]} in the file "
                f"and from {sites[0].in_features} to {width} in the base",
                where=self.where,
                try_="was it trained on another base?",
            )
        own_technique = "lora" if piece.values is None else "adalora"  # where a site has both; the other stays empty
        for site in sites:
            own = piece if site.features is None else sliced(piece, list(site.features))
            a, b = (self.delta(site, part, own_technique) for part in ("lora_A", "lora_B"))
            if a is not None and b is not None:
                self._factors(own, site, a, b)
            elif own.b.any() or own.bias is not None or own.magnitude is not None:
                raise self.lacking(site.role, piece.path, "lora")

    def _factors(self, piece: Product, site: Projection, a: Delta, b: Delta) -> None:
        """Fill what the build has at one site: its values between the factors, its magnitude, its bias."""
        ratio = piece.scale / own_scale(self.ledger, b.name, len(piece.b))
        stem = a.name.removesuffix("lora_A")
        values = torch.ones(len(piece.b)) if piece.values is None else piece.values
        self.put(a, piece.a)
        if f"{stem}lora_E" in self.ledger.trained:
            self.put(b, piece.b)
            self.tensors[f"{stem}lora_E"] = times(values, ratio)
        else:
            self.put(b, times(piece.b if piece.values is None else piece.b * values[:, None], ratio))
        if f"{stem}lora_magnitude" in self.ledger.trained:
            self.tensors[f"{stem}lora_magnitude"] = self._magnitude(piece, site)
        elif piece.magnitude is not None:
            raise self.lacking(f"the magnitude of {site.role}", piece.path, "lora: {dora: true}")
        bias = self.delta(site, "lora_bias")
        if piece.bias is not None and bias is None:
            raise self.lacking(f"the bias of {site.role}", piece.path, "lora: {bias: true}")
        if piece.bias is not None and bias is not None:
            self.put(bias, times(piece.bias, ratio))

    def _magnitude(self, piece: Product, site: Projection) -> Tensor:
        """DoRA's m; of a plain product the norm of the weight that it makes, with which m / n is one."""
        if piece.magnitude is not None:
            return piece.magnitude
        weight = self.program.tensor(site.weight).detach()
        weight = weight if site.in_first else weight.T
        weight = weight if site.features is None else weight[:, list(site.features)]
        b = piece.b if piece.values is None else piece.b * piece.values[:, None]
        norm: Tensor = torch.linalg.vector_norm(weight + piece.scale * (piece.a @ b), dim=0)
        return norm

    def _table(self, piece: Product) -> None:
        found = [d for d in self.deltas("lora_embedding_A") if d.site == piece.path]
        if not found:
            raise self.lacking("the table", piece.path, "lora")
        b = self.ledger.deltas[found[0].name.removesuffix("A") + "B"]
        self.put(found[0], piece.a)
        self.put(b, times(piece.b, piece.scale / own_scale(self.ledger, b.name, len(piece.b))))

    def _scaling(self, piece: Scaling) -> None:
        for site in self.projections(piece.path):
            delta = self.delta(site, "ia3_l")
            if delta is None or scales_input(self.compiled, site) != piece.inward:
                raise self.lacking(f"the {'input' if piece.inward else 'output'}", piece.path, "ia3")
            whole = site.features is None or piece.inward
            self.put(delta, piece.vector if whole else piece.vector[list(site.features or ())])

    def _whole(self, piece: Whole) -> None:
        """A parameter of the base: the head's under the head's names, any other under its own."""
        path, _, leaf = piece.name.rpartition(".")
        model = self.compiled.base.model
        for site in self.program.anatomy.projections:
            own = site.weight if leaf == "weight" else site.bias
            head = self.delta(site, f"head.{leaf}")
            if head is not None and own is not None and piece.name in module_names(model, own):
                self.put(head, piece.tensor.T if leaf == "weight" and not site.in_first else piece.tensor)
                return
        owners = [n for n, p in model.named_parameters(remove_duplicate=False) if p is parameter(model, piece.name)]
        if len(owners) > 1:
            what = f"{' and '.join(owners)} are one tensor of the base, and the file has made two of it"
            raise DeltaError(what, where=self.where, try_="train without it in `modules_to_save`")
        found = [d for d in self.deltas(leaf) if d.site == path]
        whole = [d for d in found if d.shape == tuple(piece.tensor.shape)]
        if whole:
            self.put(whole[0], piece.tensor)
        elif found and leaf == "bias":
            self._slices(piece, found)
        else:
            raise self.lacking(f"the {leaf}", path, "head` or `norm_tuning` or `bitfit")

    def _slices(self, piece: Whole, found: Iterable[Delta]) -> None:
        """The bias of a fused projection of which only some roles are trained: the others must be the base's."""
        base = self.program.tensor(piece.name) if piece.name in self.program.frozen else None
        roles = {d.role: d for d in found}
        for site in self.projections(piece.name.rpartition(".")[0]):
            own = piece.tensor[list(site.features or ())]
            if site.role in roles:
                self.put(roles[site.role], own)
            elif base is None or not own.equal(base[list(site.features or ())]):
                raise self.lacking(f"the bias of {site.role}", site.path, "bitfit")

    def _same(self, piece: Same) -> None:
        own = parameter(self.compiled.base.model, piece.name)
        if own is None or not own.detach().equal(piece.tensor.to(own.dtype)):
            raise DeltaError(
                f"the file's copy of {piece.name} is not the base's",
                where=self.where,
                there_is="no such tensor in the base" if own is None else f"a base of shape {list(own.shape)}",
                try_="it was trained on another base",
            )


def sliced(piece: Product, features: list[int]) -> Product:
    """The product of one role of a fused projection; of products side by side only the role's own ranks."""
    b = piece.b[:, features]
    used = b.any(1)
    return replace(
        piece,
        a=piece.a[:, used],
        b=b[used],
        values=None if piece.values is None else piece.values[used],
        magnitude=None if piece.magnitude is None else piece.magnitude[features],
        bias=None if piece.bias is None else piece.bias[features],
    )
