"""From a graph after surgery to what a person should see of one layer: boxes, and the flow between them.

A box is a node that means something: a weighted op under its role, an attention product, a norm, an activation, a
residual join, and whatever a pass inserted. Views, casts and masks are contracted into the flow. Deltas are no boxes
of their own: they stand in the box that reads them, so that an inserted product reads as the layer that it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import fx

from surgeon.anatomy.facts import LAYOUTS, NONLINEARITIES, Facts
from surgeon.anatomy.sites import Attention, Join, Norm, Site, anchor, graph_order
from surgeon.dataflow import ancestors, descendants
from surgeon.errors import SelectorError
from surgeon.ledger import Delta
from surgeon.picture.boxes import Box, Line, pills, shape, site_box
from surgeon.program import Program

PARTS = {"slice", "split", "split_with_sizes", "chunk", "unbind", "getitem", "select", "narrow", "index"}
PASSED = LAYOUTS | PARTS | {"dropout", "pad", "constant_pad_nd"}
ROUND = {"add": "+", "mul": "×"}

Home = tuple[str, int | str]
"""A stack, and one of its layers, or the `input` before them or the `head` behind them."""


@dataclass
class Scene:
    """Boxes by id, in graph order, and the flow between them before and after surgery."""

    title: str
    boxes: dict[str, Box] = field(default_factory=dict)
    before: list[tuple[str, str]] = field(default_factory=list)
    after: list[tuple[str, str]] = field(default_factory=list)
    skips: set[tuple[str, str]] = field(default_factory=set)
    techniques: list[str] = field(default_factory=list)


def scene(program: Program, stack: str | None = None, layer: int | None = None) -> Scene:
    """The scene of one layer: the one asked for, or the first that most techniques touched."""
    facts = Facts(program.graph_module)
    homes = dict.fromkeys(_homes(program, facts).values())
    wanted = [h for h in homes if stack in (None, h[0]) and layer in (None, h[1])]
    if not wanted:
        depths = ", ".join(f"{name} 0-{depth - 1}" for name, depth in program.anatomy.layers.items())
        raise SelectorError(
            f"there is no layer {layer} in {stack or 'any stack'} to draw", there_is=f"layers: {depths}"
        )
    views = [_View(program, facts, home) for home in wanted]
    return max(views, key=_interest).scene()


def _interest(view: _View) -> tuple[bool, int]:
    """Layers before the head, then the one that most techniques touched; `max` takes the first of equals."""
    return bool(view.techniques) and isinstance(view.home[1], int), len(view.techniques)


class _View:
    """One layer of a program: which nodes are drawn, and what flows into them."""

    def __init__(self, program: Program, facts: Facts, home: Home) -> None:
        self.program, self.facts, self.home = program, facts, home
        self.sites = _by_node(graph_order(program.anatomy))
        self.own = [node for node, at in _homes(program, facts).items() if at == home]
        self.inside = self._region()
        self.members = set(self.inside)
        self.interior = {
            n for own in self.own for site in self.sites[own] for n in self._within(site) if not _author(n)
        }
        self.shown: dict[fx.Node, Box] = {}
        for node in self.inside:
            self._show(node)
        used = {line.technique for box in self.shown.values() for line in box.lines}
        used |= {box.technique for box in self.shown.values()}
        # A technique that builds on another has deltas of that one, and stands where it was applied.
        self.techniques = [
            name for name in dict.fromkeys([*program.applied, *sorted(filter(None, used))]) if name in used
        ]

    # -- what is drawn --------------------------------------------------------------------------------------------

    def _region(self) -> list[fx.Node]:
        """The layer's activations: from its first site to its last, and what passes put right behind that."""
        position = self.facts.position
        start, stop = min(position[n] for n in self.own), max(position[n] for n in self.own)
        following = min((position[n] for n in self.sites if position[n] > stop), default=len(self.facts.nodes))
        members: dict[fx.Node, None] = {}
        for node in self.facts.nodes:
            near = start <= position[node] < following and (position[node] <= stop or _author(node))
            if near and node in self.facts.activations and node.op != "output":
                above = [n for n in self.facts.inputs[node] if n in self.facts.activations]
                begins = self.home[1] == "input" and self.facts.op[node] == "embedding"
                if begins or any(position[n] < start or n in members for n in above):  # else a table of positions
                    members[node] = None
        return list(members)

    def _within(self, site: Site) -> set[fx.Node]:
        """What a site computes on the way to the node that is drawn for it."""
        match site:
            case Norm():
                begin = self.program.current(site.input)
                return (descendants(begin) & ancestors(site.output)) - {site.output}
            case Attention():
                return ({site.scores} | (descendants(site.scores) & ancestors(site.mixed))) - {site.mixed}
            case _:
                return set()

    def _show(self, node: fx.Node) -> None:
        op = self.facts.op[node]
        author = _author(node)
        if node in self.interior or (author and op in PASSED):
            return
        if author:
            self._show_new(node, op, author)
        elif node in self.sites:
            self.shown[node] = site_box(self.sites[node], self._deltas(node))
        elif op in NONLINEARITIES:
            self.shown[node] = Box([Line(op)])
        elif op == "mul" and len([i for i in self.facts.inputs[node] if i in self.facts.activations]) == 2:
            self._show_product(node)

    def _show_new(self, node: fx.Node, op: str, author: str) -> None:
        deltas = self._deltas(node)
        named = [Line(text, delta.technique) for delta in deltas for text in (delta.part, shape(delta))]
        before = self._sources(node)
        if op == "add" and deltas and len(before) == 1 and (box := self.shown.get(before[0])) and box.technique:
            box.lines += [Line(f"+ {line.text}", line.technique) for line in pills(deltas)]
            self.interior.add(node)  # the bias stands in the box of its product
        elif op in ROUND and not deltas:
            self.shown[node] = Box([Line(ROUND[op], author)], author, round=True)
        elif op in ("matmul", "linear", "mm", "addmm") and deltas:
            self.shown[node] = Box(named, author)
        elif op == "cat":
            self.shown[node] = Box([Line("concatenate", author), *pills(deltas)], author)
        else:
            self.shown[node] = Box([Line(ROUND.get(op, op), author), *pills(deltas)], author)

    def _show_product(self, node: fx.Node) -> None:
        """A gate, or the last product of an activation that is spelled out, which is then drawn as one."""
        way, sources = self._way(node)
        if len(sources) > 1 or any(self.facts.op[n] in PARTS for n in way):
            self.shown[node] = Box([Line("×")], round=True)
        elif any(self.facts.op[n] in NONLINEARITIES for n in way):
            for inner in way:
                self.shown.pop(inner, None)
            self.shown[node] = Box([Line("activation")])

    def _way(self, node: fx.Node) -> tuple[set[fx.Node], set[fx.Node]]:
        """The nodes between `node` and the sites above it, and those sites."""
        way, found, todo = set(), set(), [node]
        while todo:
            for operand in self.facts.inputs[todo.pop()]:
                if operand not in self.facts.activations or operand in way:
                    continue
                if operand in self.sites or operand not in self.members or _author(operand):
                    found.add(operand)
                else:
                    way.add(operand)
                    todo.append(operand)
        return way, found

    def _deltas(self, node: fx.Node) -> list[Delta]:
        """The deltas that a node reads, itself or through what is computed of weights alone."""
        found, todo = {}, [node]
        while todo:
            for operand in todo.pop().all_input_nodes:
                value = operand.meta.get("val")
                if operand.op == "get_attr" and str(operand.target) in self.program.ledger.deltas:
                    found[operand] = self.program.ledger.deltas[str(operand.target)]
                elif (
                    operand not in self.facts.activations
                    and isinstance(value, torch.Tensor)
                    and value.is_floating_point()
                ):
                    todo.append(operand)
        return [found[n] for n in sorted(found, key=self.facts.position.__getitem__)]

    # -- what flows -----------------------------------------------------------------------------------------------

    def _sources(self, node: fx.Node, *, before: bool = False) -> list[fx.Node]:
        """The boxes and outside values that flow into `node`; with `before`, as it was without surgery."""
        found: dict[fx.Node, None] = {}
        todo, seen = [node], {node}
        while todo:
            reader = todo.pop(0)
            for operand in self.facts.inputs[reader]:
                source = self.program.replaced(reader, operand) if before else operand
                if source not in self.facts.activations or source in seen:
                    continue
                seen.add(source)
                if self._is_passed(source) or (before and _author(source)):
                    todo.append(source)
                else:
                    found[source] = None
        attends = any(isinstance(site, Attention) for site in self.sites.get(node, ()))
        return [source for source in found if source in self.shown or not attends]  # no biases from other layers

    def _is_passed(self, node: fx.Node) -> bool:
        """The node is contracted into the flow through it."""
        return node in self.interior or (node in self.members and node not in self.shown)

    def scene(self) -> Scene:
        """The boxes with their flow, the layer's inputs and its output."""
        stack, place = self.home
        of = f"layer {place} of {self.program.anatomy.layers[stack]}" if isinstance(place, int) else place
        made = Scene(f"{self.program.config.model_type} · {stack} {of}")
        made.techniques = self.techniques
        outside: dict[fx.Node, None] = {}
        flows: dict[bool, list[tuple[fx.Node, fx.Node]]] = {}
        for before in (True, False):
            drawn = [n for n, box in self.shown.items() if not (before and box.technique)]
            flows[before] = [(source, n) for n in drawn for source in self._sources(n, before=before)]
            outside |= dict.fromkeys(source for source, _ in flows[before] if source not in self.shown)
        names = self._outside_names(outside)
        for name in dict.fromkeys(names.values()):
            made.boxes[name] = Box([Line(name)], end=True)
        names |= {node: node.name for node in self.shown}
        made.boxes |= {node.name: box for node, box in self.shown.items()}
        made.boxes["output"] = Box([Line("output")], end=True)
        for before in (True, False):
            found = dict.fromkeys((names[a], names[b]) for a, b in flows[before])
            found |= dict.fromkeys((names[n], "output") for n in self._leaving(before=before) if n in names)
            (made.before if before else made.after).extend(_living(list(found)))
        made.skips = {(names[a], names[b]) for a, b in (*flows[True], *flows[False]) if self._is_skip(a, b)}
        return made

    def _leaving(self, *, before: bool) -> Iterator[fx.Node]:
        """The boxes that what lies behind the layer reads."""
        for node in self.facts.nodes:
            flows = node in self.facts.activations or node.op == "output"
            if not flows or node in self.members or node in self.interior or (before and _author(node)):
                continue
            for operand in self.facts.inputs[node]:
                source = self.program.replaced(node, operand) if before else operand
                if source in self.members:
                    yield from [source] if source in self.shown else self._sources(source, before=before)

    def _is_skip(self, source: fx.Node, box: fx.Node) -> bool:
        """The edge is a residual join's skip."""
        joins = [site for site in self.sites.get(box, ()) if isinstance(site, Join)]
        stream = [self.program.current(join.skip) for join in joins]
        return any(source in (node, *self._sources(node)) for node in stream)

    def _outside_names(self, outside: Iterable[fx.Node]) -> dict[fx.Node, str]:
        """`input` for the value nearest above the layer, and where the others come from."""
        position = self.facts.position
        names = {}
        for node in outside:
            above = [n for n in self.sites if position[n] <= position[node]]
            site = self.sites[max(above, key=position.__getitem__)][0] if above else None
            if site is None or position[node] == max(position[n] for n in outside):
                names[node] = "input"
            else:
                names[node] = "input" if site.stack == self.home[0] else f"{site.stack} output"
        return names


def _living(edges: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The edges on a way to the output: what a pass put out of use is not drawn."""
    living = {"output"}
    while fresh := {a for a, b in edges if b in living} - living:
        living |= fresh
    return [edge for edge in edges if edge[1] in living]


def _homes(program: Program, facts: Facts) -> dict[fx.Node, Home]:
    """Where the node of each site is at home."""
    position = facts.position
    found: dict[fx.Node, Home] = {}
    sites = _by_node(graph_order(program.anatomy))
    first = {s[0].stack: position[n] for n, s in reversed(sites.items()) if s[0].layer is not None}
    for node, (site, *_) in sites.items():
        before = position[node] < first.get(site.stack, 0)
        found[node] = site.stack, site.layer if site.layer is not None else "input" if before else "head"
    return found


def _by_node(sites: Iterable[Site]) -> dict[fx.Node, list[Site]]:
    """Sites by the node that is drawn for them; the slices of a fused projection share one."""
    found: dict[fx.Node, list[Site]] = {}
    for site in sites:
        found.setdefault(site.mixed if isinstance(site, Attention) else anchor(site), []).append(site)
    return found


def _author(node: fx.Node) -> str:
    return str(node.meta.get("surgeon", ("",))[0])
