"""Last step of anatomy: from what was read to the sites that passes act on."""

from __future__ import annotations

from collections import Counter
from itertools import takewhile

from torch import fx
from torch.fx import Node

from surgeon.anatomy.cores import cores
from surgeon.anatomy.ends import embeddings, heads, index
from surgeon.anatomy.facts import CONVOLUTIONS, RESHAPES, Facts
from surgeon.anatomy.joins import JoinOp, blends, joins
from surgeon.anatomy.layouts import features_axis
from surgeon.anatomy.norm_places import NormPlace, norm_places
from surgeon.anatomy.norms import NormOp, norm_ops
from surgeon.anatomy.reading import Reading
from surgeon.anatomy.replacing import replacing
from surgeon.anatomy.roles import Part, downs, parts
from surgeon.anatomy.shapes import rank, shape
from surgeon.anatomy.sites import Anatomy, Attention, Embedding, Join, Norm, Projection
from surgeon.anatomy.stacks import Place, Stack, places, stack_above, stack_below, stacks
from surgeon.anatomy.weighted import WeightedOp, weighted_ops


def find(graph_module: fx.GraphModule) -> Anatomy:
    """All sites of a traced model, found by the structure of its graph alone.

    What was seen and not understood is told in `notes`. Raises TraceError only where the layout of a fused
    projection hangs on a buffer and the base holds no numbers (a meta device).
    """
    facts = Facts(graph_module)
    weighted = weighted_ops(facts)
    reading = Reading(facts, weighted, norm_ops(facts), cores(facts, weighted))
    joined = joins(reading)
    adding = [join for join in joined if not blends(reading, join)]
    found = sorted([*adding, *replacing(reading, adding)], key=lambda join: facts.position[join.root])
    chains = stacks(reading, found)
    sublayers, notes = places(reading, chains)
    if blended := len(joined) - len(adding):
        notes.append(f"{blended} joins are x + r (f - x), from the stream to the sublayer's answer: they add nothing")
    if not found:
        seen = f"{len(reading.cores)} attention products and {len(weighted)} products with weights"
        notes.append(f"no residual join was found among {seen}: what this model is built of is not understood")
    return Finder(reading, found, chains, sublayers, notes).anatomy()


class Finder:
    """Builds the sites of each kind from a finished reading."""

    def __init__(
        self, reading: Reading, found: list[JoinOp], chains: list[Stack], sublayers: list[Place], notes: list[str]
    ) -> None:
        self.reading = reading
        self.facts = reading.facts
        self.joins = found
        self.chains = chains
        self.sublayers = sublayers
        self.notes = list(notes)
        self.parts = {place: parts(reading, place) for place in sublayers}
        for place, found_parts in self.parts.items():
            missing = _expected(place) - {part.role for part in found_parts if part.op.plain}
            if missing:
                self.notes.append(f"layer {place.layer} of {place.stack.name}: no {', '.join(sorted(missing))} found")

    def anatomy(self) -> Anatomy:
        """All sites, in graph order."""
        norms = self._norms()
        return Anatomy(
            projections=tuple(self._projections()),
            norms=tuple(norms.values()),
            joins=tuple(self._joins(norms)),
            attentions=tuple(self._attentions()),
            embeddings=tuple(self._embeddings()),
            layers={c.name: max(d.depth for d in self.chains if d.name == c.name) for c in self.chains},
            notes=tuple(dict.fromkeys(self.notes)),
        )

    def _projections(self) -> list[Projection]:
        home: dict[WeightedOp, Place] = {}  # what two sublayers read is the first one's, lest a delta be added twice
        placed: list[tuple[Part, str, int | None]] = [
            (part, place.stack.name, place.layer)
            for place in self.sublayers
            for part in self.parts[place]
            if home.setdefault(part.op, place) is place
        ]
        taken = {part.op for part, _, _ in placed}
        inside = self.facts.bits(op.node for op in taken)
        for op, role in heads(self.reading, self.joins, inside).items():
            placed.append((Part(op, role), self._stack(op.node, after=role.startswith("head")), None))
        for op in self.reading.weighted.values():
            if op.static and op not in taken:
                placed.append((Part(op, "other"), self._stack(op.node, after=False), None))
        sites = [self._projection(*p) for p in placed if p[0].op.plain]
        self._note_leftovers(placed)
        return sorted(sites, key=lambda s: self.facts.position[s.node])

    def _note_leftovers(self, placed: list[tuple[Part, str, int | None]]) -> None:
        """Tell what has no role of its own."""
        lost = [p for p in placed if p[0].role == "other" and p[2] is None and self._stack(p[0].op.node, after=True)]
        if lost:
            self.notes.append(f"{len(lost)} projections between the sublayers stand in none")
        for chain in self.chains:
            if chain.name not in {"encoder", "decoder"}:
                self.notes.append(f"{chain.name}: {len(chain.joins)} residual joins apart from encoder and decoder")
        odd = Counter(f"{part.op.node.target}" for part, _, _ in placed if not part.op.plain)
        self.notes += [f"{count} weights used by {op} are no sites: not a plain product" for op, count in odd.items()]

    def _projection(self, part: Part, stack: str, layer: int | None) -> Projection:
        op = part.op
        return Projection(
            role=part.role,
            stack=stack,
            layer=layer,
            path=op.path,
            node=op.node,
            input=op.input,
            output=op.output,
            weight=str(op.weight.target),
            weight_node=op.weight,
            bias=str(op.bias.target) if op.bias else None,
            bias_node=op.bias,
            in_first=op.in_first,
            in_features=op.in_features,
            out_features=op.out_features if part.features is None else len(part.features),
            features=part.features,
            experts=op.experts,
        )

    def _norms(self) -> dict[NormOp, Norm]:
        return {
            norm: self._norm(norm, place)
            for norm, place in norm_places(self.reading, self.sublayers, self.chains).items()
        }

    def _norm(self, norm: NormOp, place: NormPlace) -> Norm:
        owner = norm.weight or norm.bias
        return Norm(
            role=f"norm.{place.place}",
            stack=place.stack.name if place.stack else "",
            layer=place.layer,
            path=str(owner.target).rpartition(".")[0] if owner else _module_path(norm.output),
            input=norm.input,
            output=norm.output,
            weight=str(norm.weight.target) if norm.weight else None,
            weight_node=norm.weight,
            bias=str(norm.bias.target) if norm.bias else None,
            bias_node=norm.bias,
            place=place.place,
        )

    def _joins(self, norms: dict[NormOp, Norm]) -> list[Join]:
        post = {norm.input: norm for norm in norms.values() if norm.place == "post"}
        found = []
        axes = self._axes()
        for place in self.sublayers:
            if not place.join.adds:
                at = "before layer 0" if place.layer is None else f"layer {place.layer}"
                self.notes.append(f"{at} of {place.stack.name}: its {place.kind} adds to no residual")
                continue
            last, (entry, entry_axis) = downs(self.reading, place), self._entry(place)
            after = next(
                (n for i, n in post.items() if self.facts.strip(i, [place.join.root]) is place.join.root), None
            )
            found.append(
                Join(
                    role=f"residual.{'ffn' if place.kind == 'moe' else place.kind}",
                    stack=place.stack.name,
                    layer=place.layer,
                    path=last[-1].path if last else _module_path(place.sublayer.value),
                    add=place.sublayer.add,
                    skip=place.join.skip,
                    branch=place.sublayer.value,
                    entry=entry,
                    width=int(shape(place.join.root)[axes[place]]),
                    axis=axes[place],
                    entry_axis=entry_axis,
                    post_norm=after,
                )
            )
        return found

    def _axes(self) -> dict[Place, int]:
        """The axis of the features at every join: the last where those of a stack do not all say another.

        A convolution says it, and so does another projection that is turned behind, unless it is one of positions:
        then other joins of its stack say otherwise.
        """
        told: dict[tuple[Stack, int], set[int]] = {}
        for place in self.sublayers:
            last, root = downs(self.reading, place), place.join.root
            axis = features_axis(self.facts, last[-1], place.sublayer.value) if last else None
            if axis is not None and shape(root)[axis] == last[-1].out_features:
                told.setdefault((place.stack, rank(root)), set()).add(axis)
        found = {key: axes.pop() if len(axes) == 1 else -1 for key, axes in told.items()}
        axes = {place: found.get((place.stack, rank(place.join.root)), -1) for place in self.sublayers}
        return {place: -1 if axis == rank(place.join.root) - 1 else axis for place, axis in axes.items()}

    def _entry(self, place: Place) -> tuple[Node, int]:
        """What the sublayer's first weighted op reads, in the stream's own rank, and the axis of its features."""
        own = [n for n in self.reading.weighted if place.sublayer.own & self.facts.bit(n)]
        first = min(own, key=self.facts.position.__getitem__, default=None)
        node = self.reading.weighted[first].input if first else place.join.stream
        while rank(node) != rank(place.join.root) and self.facts.op[node] in RESHAPES:
            node = self.facts.inputs[node][0]
        return node, 1 if first and self.facts.op[first] in CONVOLUTIONS else -1

    def _attentions(self) -> list[Attention]:
        return [
            Attention(
                role=place.kind,
                stack=place.stack.name,
                layer=place.layer,
                path=self._attention_path(place),
                core=core.node,
                scores=core.scores,
                mixed=core.mixed,
                query=core.query,
                key=core.key,
                value=core.value,
                heads=core.heads,
                kv_heads=core.kv_heads,
                head_dim=int(shape(core.query)[-1]),
                value_dim=int(shape(core.value)[-1]),
                cross=place.kind == "cross_attention",
            )
            for place in self.sublayers
            for core in place.sublayer.cores
        ]

    def _attention_path(self, place: Place) -> str:
        """The longest module path that query, key and value share."""
        sides = {f"{place.kind}.{side}" for side in ("query", "key", "value")}
        owners = [part.op.path.split(".")[:-1] for part in self.parts[place] if part.role in sides]
        return _common(owners) if owners else _module_path(place.sublayer.cores[0].node)

    def _embeddings(self) -> list[Embedding]:
        found = []
        for node, role in embeddings(self.reading, self.chains).items():
            table = self.facts.weight(self.facts.inputs[node][0])
            assert table is not None
            rows, width = (int(size) for size in table.node.meta["val"].shape)
            found.append(
                Embedding(
                    role=role,
                    stack=self._stack(node, after=False),
                    layer=None,
                    path=str(table.node.target).rpartition(".")[0],
                    node=node,
                    index=index(node),
                    weight=str(table.node.target),
                    weight_node=table.node,
                    rows=rows,
                    width=width,
                )
            )
        return found

    def _stack(self, node: Node, *, after: bool) -> str:
        search = stack_above if after else stack_below
        stack = search(self.reading, node, self.chains)
        return stack.name if stack else ""


def _expected(place: Place) -> set[str]:
    if place.sublayer.cores:
        return {f"{place.kind}.{side}" for side in ("query", "key", "value", "output")}
    return {"ffn.up", "ffn.down"} if place.kind == "ffn" else set()


def _common(paths: list[list[str]]) -> str:
    """The longest beginning that module paths share."""
    same = takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return ".".join(parts[0] for parts in same)


def _module_path(node: Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""
