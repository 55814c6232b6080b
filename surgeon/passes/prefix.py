"""Prefix tuning: trained keys and values in front of the real ones, in every attention.

    softmax(q·[P_k ; k]ᵀ) · [P_v ; v]      P_k, P_v [kv heads, n, head dim], behind RoPE, norms and head repetition

Li and Liang, "Prefix-Tuning", ACL 2021 (arXiv:2101.00190), section 4; the reparametrisation P = MLP(P'), section 4.3,
is folded away before deployment. The text's positions move up by n, as with the authors' code and PEFT.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor, fx

from surgeon.anatomy import Attention, Where, select
from surgeon.errors import CompositionError
from surgeon.ledger import Delta
from surgeon.passes import Pass, PassResult
from surgeon.passes.columns import open_columns
from surgeon.passes.distances import Distances, count_distances
from surgeon.passes.positions import shift_positions
from surgeon.program import Program
from surgeon.starts import Init, kaiming_uniform, normal, value, zeros


class Prefix(Pass):
    """Concatenate a prefix to the keys and values of every selected attention; 2·n·kv heads·head dim parameters each.

    All attentions of one stack and kind (self or cross) share one length, free per task. Length 0 is the base.
    """

    name: ClassVar[str] = "prefix"
    title: ClassVar[str] = "Prefix tuning"
    paper: ClassVar[str] = "arXiv:2101.00190"
    identity_at_birth: ClassVar[bool] = False

    length: PositiveInt = Field(10, description="Prefix length n in virtual tokens; free per task at run time.")
    hidden: PositiveInt | None = Field(
        None, description="Hidden width of the MLP reparametrisation (512 in the paper); unset there is none."
    )
    std: PositiveFloat = Field(0.02, description="Standard deviation of the fresh prefix.")
    start: Literal["random", "words"] = Field(
        "random", description="Fresh prefix: a normal distribution, or the base's own keys and values of some words."
    )
    words: str = Field(
        "", description="With `start: words`, what the base reads for them; repeated or cut to the length."
    )
    shift: bool = Field(True, description="Move the text's positions up by the prefix length.")
    distances: Distances = Field(
        "none",
        description="What a bias by distance (T5) is at the prefix: `none`; `before`, as if it stood before the text "
        "(PEFT); `first`, as if the text's keys stood behind it and its queries did not (AdapterHub).",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the prefix, in training only.")
    where: Where | None = Field(
        None, description="Attentions with a prefix; unset it is all: encoder, decoder and cross-attention."
    )

    @model_validator(mode="after")
    def _words_where_read(self) -> Self:
        if (self.start == "words") != bool(self.words.strip()):
            raise PydanticCustomError("words", "needs `start: words` and `words` together, or neither")
        if self.start == "words" and self.hidden is not None:
            raise PydanticCustomError("words", "cannot start at words with `hidden`: an MLP's output is not set")
        return self

    def call(self, program: Program) -> PassResult:
        sites = program.anatomy.attentions if self.where is None else select(program.anatomy, self.where, Attention)
        if not sites:
            select(program.anatomy, self.where or ("attention",), Attention)
        counted = False
        kind: Callable[[Attention], tuple[str, bool]] = lambda s: (s.stack, s.cross)  # noqa: E731
        for (stack, cross), group in groupby(sorted(sites, key=kind), kind):
            place = stack + (".cross" if cross else "")
            first = self._is_first(program, place)
            pairs, grown = self._attach(program, list(group), place)
            counted = counted or bool(grown)
            if self.shift and first and not cross:
                shift_positions(program, stack, pairs[0][0])
                of_decoder = stack == "decoder" and any(i.name == "decoder_input_ids" for i in program.inputs)
                program.occupy(pairs[0][0].free[1], "decoder_sequence" if of_decoder else "sequence")
        if self.distances != "none" and not counted:
            raise CompositionError(
                f"{self.name}.distances: no bias of this base is looked up by the keys' numbers less the queries'",
                try_="leave `distances` out",
            )
        return PassResult(program, modified=True)

    def _is_first(self, program: Program, group: str) -> bool:
        """No item before this one has put prefixes there. Raises CompositionError where another technique has."""
        before = [d for d in program.ledger.deltas.values() if f"prefix.length.{group}" in d.free.values()]
        if before and before[0].technique != self.name:
            raise CompositionError(
                f"'{self.name}' and '{before[0].technique}' would both put a prefix in front of the {group} attention",
                try_="one of the two: at run time they are the same",
            )
        return not before

    def _attach(
        self, program: Program, sites: list[Attention], group: str
    ) -> tuple[list[tuple[Delta, Delta]], dict[fx.Node, bool]]:
        """Keys and values of every attention, and the biases by distance that count them."""
        symbol = f"=prefix.length.{group}"
        init: Init | None = normal(self.std) if self.hidden is None else None
        shared = len({site.path for site in sites}) < len(sites)
        pairs = []
        words = self._of_words(program, sites) if self.start == "words" else {}
        for site in sites:
            other = next(s for s in sites if s.label == site.label)
            if other.kv_heads != site.kv_heads:
                raise CompositionError(
                    f"{site.label} is two attentions, of {other.kv_heads} and of {site.kv_heads} heads: no prefix fits",
                    try_="other techniques, or `where` with other attentions",
                )
            layer = f"layer_{site.layer}" if shared else ""
            shape, free = (site.kv_heads, self.length), {1: symbol}
            key, value = (
                program.delta(
                    site,
                    f"{self.name}.{part}",
                    (*shape, size),
                    words.get((site, part), init),
                    free=free,
                    qualifier=layer,
                )
                for part, size in (("key", site.head_dim), ("value", site.value_dim))
            )
            joined = in_front(site, self.dropout)
            program.replace_operand(program.readers(site.key, site.scores), site.key, joined, (key,))
            program.replace_operand([site.mixed], site.value, joined, (value,))
            pairs.append((key, value))
        grown = {} if self.distances == "none" else count_distances(program, sites, pairs[0][0], self.distances)
        open_columns(program, sites, pairs[0][0], grown)
        if self.hidden is not None:
            self._reparametrise(program, sites, pairs, group)
        return pairs, grown

    def _of_words(self, program: Program, sites: list[Attention]) -> dict[tuple[Attention, str], Init]:
        """Keys and values `[kv heads, n, d]` that the base computes where it reads the words (section 7.4)."""
        ids = program.tokenize(self.words)
        text = torch.tensor([[ids[i % len(ids)] for i in range(self.length)]])
        if next(program.graph_module.parameters()).is_meta:
            return {}
        places = [(site, part) for site in sites for part in ("key", "value")]
        found = program.evaluate(
            [site.key if part == "key" else site.value for site, part in places], {"input_ids": text}
        )
        starts: dict[tuple[Attention, str], Init] = {}
        for (site, part), states in zip(places, found, strict=True):
            heads = states.flatten(0, -3)  # a batch of one
            starts[site, part] = value(heads[:: max(len(heads) // site.kv_heads, 1)])
        return starts

    def _reparametrise(
        self, program: Program, sites: list[Attention], pairs: list[tuple[Delta, Delta]], group: str
    ) -> None:
        """P'·W1 -> tanh -> ·W2 gives the prefixes of all layers at once, key before value in each layer."""
        width = max(s.kv_heads * s.head_dim for s in sites)
        deltas = [d for pair in pairs for d in pair]
        flat = [d.shape[0] * d.shape[2] for d in deltas]
        assert self.hidden is not None
        shapes: dict[str, tuple[tuple[int, ...], Init]] = {
            "embedding": ((self.length, width), normal(1.0)),
            "down.weight": ((width, self.hidden), kaiming_uniform(0)),
            "down.bias": ((self.hidden,), zeros),
            "up.weight": ((self.hidden, sum(flat)), kaiming_uniform(0)),
            "up.bias": ((sum(flat),), zeros),
        }
        names = [program.trained(f"{group}.{self.name}.{part}", *entry).name for part, entry in shapes.items()]

        def unfold(e: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> tuple[Tensor, ...]:
            rows = torch.tanh(e @ w1 + b1) @ w2 + b2
            pieces = torch.split(rows, flat, -1)
            return tuple(
                torch.unflatten(p, -1, (d.shape[0], d.shape[2])).transpose(0, 1)
                for p, d in zip(pieces, deltas, strict=True)
            )

        program.fold(names, [d.name for d in deltas], unfold)


def in_front(site: Attention, dropout: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Concatenate a prefix `[kv heads, n, d]` (or one a row) in front of keys or values at the product.

    Every row drops out on its own.
    """

    def joined(real: Tensor, prefix: Tensor) -> Tensor:
        folded = real.dim() == 3
        heads = site.heads if folded else real.shape[1]
        prefix = prefix.expand(real.shape[0] // heads if folded else real.shape[0], -1, -1, -1)
        if dropout:
            prefix = torch.nn.functional.dropout(prefix, dropout)
        if heads != site.kv_heads:
            prefix = prefix.unsqueeze(2).expand(-1, -1, heads // site.kv_heads, -1, -1).flatten(1, 2)
        if folded:
            prefix = prefix.flatten(0, 1)
        elif real.dim() > 4:  # windows between heads and tokens: one prefix for all
            for _ in range(real.dim() - prefix.dim()):
                prefix = prefix.unsqueeze(2)
            prefix = prefix.expand(*real.shape[:-2], -1, -1)
        return torch.cat([prefix, real], -2)

    return joined
