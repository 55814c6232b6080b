"""What may be left out layer by layer runs only where a task has it: `x + f(x)` is an `If` around the sum.

A technique's deltas of one site that can be dropped are empty or zero by default (`Delta.droppable`). As empty products
they would still cost the norm that is made for them, and a sum or two over all positions; behind the `If` they cost a
copy. What is looked for in the finished graph is the first sum one of whose operands reads all these deltas, is zero
where they are, and is needed by nothing else. Where there is none, the graph stays as it is.

Of a task a row the sizes are those of the bank: a technique runs where any task at hand has it.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import reduce

import onnx_ir as ir
from onnx_ir.tape import Tape

from surgeon.ledger import Delta
from surgeon.mixed import TASK_IDS

FAR = 256
"""Nodes to look at behind the reader of a delta."""
LAYOUT = frozenset({"Cast", "Expand", "Gather", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
"""Zero where their first operand is; sums are where all are, products where one is."""
SUMS, PRODUCTS = frozenset({"Add", "Sub"}), frozenset({"MatMul", "Mul"})


def branched(model: ir.Model, deltas: Mapping[str, Delta]) -> None:
    """Put every sum with a branch of droppable deltas, and what is computed for it alone, behind a condition."""
    graph = model.graph
    inputs = {str(value.name): value for value in graph.inputs}
    for site in _sites(deltas):
        sums = _sums(graph, [inputs[delta.name] for delta in site])
        if sums:
            condition = _condition(graph, site, inputs)
            for add, kept, apart in sums:
                _branch(graph, add, kept, apart, condition)


def _sites(deltas: Mapping[str, Delta]) -> list[list[Delta]]:
    """The droppable deltas that a technique has at a site, where by default they are nothing."""
    sites: dict[str, list[Delta]] = {}
    for delta in deltas.values():
        if delta.droppable:
            sites.setdefault(delta.name.removesuffix(delta.part), []).append(delta)
    return [site for site in sites.values() if not any(delta.default.count_nonzero() for delta in site)]


def _sums(graph: ir.Graph, given: Sequence[ir.Value]) -> list[tuple[ir.Node, ir.Value, set[ir.Node]]]:
    """Each sum that is what is `kept` of it where the deltas are nothing; and the nodes that only it needs."""
    order = {node: place for place, node in enumerate(graph)}  # without what is in a branch already
    readers = [_readers(value) for value in given]
    sums = {}
    for start in sorted(readers[0] & order.keys(), key=order.__getitem__):  # names are given in this order
        splits = (_split(add, given, readers) for add in _behind(start, order))
        if found := next(filter(None, splits), None):
            sums[found[0]] = found
    return list(sums.values())


def _readers(delta: ir.Value) -> set[ir.Node]:
    """Who reads a delta, what is made of it alone, or what the rows of a batch have of a bank."""
    own, ahead, readers = {delta}, [delta], set[ir.Node]()
    while ahead:
        for user in ahead.pop().consumers():
            readers.add(user)
            of_rows = user.op_type == "Gather" and user.inputs[0] in own
            if of_rows or all(value is None or value in own or value.producer() is None for value in user.inputs):
                ahead += [output for output in user.outputs if output not in own]
                own.update(user.outputs)
    return readers


def _behind(start: ir.Node, order: Mapping[ir.Node, int]) -> Iterator[ir.Node]:
    """Sums that read what `start` gives, in the graph's order."""
    ahead, seen = [(order[start], start)], {start}
    for _ in range(FAR):
        if not ahead:
            return
        node = heapq.heappop(ahead)[1]
        if node.op_type == "Add":
            yield node
        for user in {user for output in node.outputs for user in output.consumers()} & order.keys() - seen:
            seen.add(user)
            heapq.heappush(ahead, (order[user], user))


def _split(
    add: ir.Node, given: Sequence[ir.Value], readers: Sequence[set[ir.Node]]
) -> tuple[ir.Node, ir.Value, set[ir.Node]] | None:
    """A sum, its operand that stays, and what is computed for the other, if that one reads every delta and is nothing
    without them.
    """
    for kept, branch in (add.inputs, reversed(add.inputs)):
        if kept is not None and kept.producer() is not None and branch is not None:
            apart = _apart(add, branch, kept)
            if all(apart & of_one for of_one in readers) and _vanishes(branch, given, apart.union(*readers)):
                return add, kept, apart
    return None


def _vanishes(value: ir.Value | None, given: Collection[ir.Value], nodes: Collection[ir.Node]) -> bool:
    """Whether a value that these nodes compute is zero where all that is given is zero or empty."""
    if value is None or value in given:
        return value is not None
    node = value.producer()
    if node is None or node not in nodes:
        return False
    operands = (_vanishes(operand, given, nodes) for operand in node.inputs)
    if node.op_type in SUMS:
        return all(operands)
    return any(operands) if node.op_type in PRODUCTS else node.op_type in LAYOUT and next(operands)


def _apart(add: ir.Node, branch: ir.Value, kept: ir.Value) -> set[ir.Node]:
    """The nodes that compute an operand of a sum, from the other one perhaps, and are needed for nothing else."""
    apart, ahead = set[ir.Node](), [branch]
    while ahead:
        node = ahead.pop().producer()
        if node is None or node in apart or node is kept.producer():
            continue
        users = {user for output in node.outputs for user in output.consumers()}
        if users <= apart | {add} and not any(output.is_graph_output() for output in node.outputs):
            apart.add(node)
            ahead += [value for value in node.inputs if value is not None]
    return apart


def _condition(graph: ir.Graph, site: Sequence[Delta], inputs: Mapping[str, ir.Value]) -> ir.Value:
    """Whether a task has any of the deltas: a size that is not zero, or a number that is not."""
    empty = {frozenset(delta.free.values()): delta.name for delta in site if not delta.default.numel()}
    least = [name for words, name in empty.items() if not any(other < words for other in empty)]
    rest = [delta.name for delta in site if delta.default.numel()]
    tape = Tape()
    found = [tape.op("Cast", [tape.op("Size", [inputs[name]])], {"to": ir.DataType.BOOL}) for name in least]
    for name in rest:
        own = tape.op("Gather", [inputs[name], inputs[TASK_IDS]]) if TASK_IDS in inputs else inputs[name]
        numbers = tape.op("Cast", [own], {"to": ir.DataType.FLOAT})
        length = tape.op("ReduceL1", [numbers], {"keepdims": 0})
        found.append(tape.op("Cast", [length], {"to": ir.DataType.BOOL}))
    condition = reduce(lambda a, b: tape.op("Or", [a, b]), found)
    graph.insert_before(graph[0], tape.nodes)
    return condition


def _branch(graph: ir.Graph, add: ir.Node, kept: ir.Value, apart: Collection[ir.Node], condition: ir.Value) -> None:
    """Let an `If` give the sum, or what is kept of it."""
    (total,) = add.outputs
    same = ir.Node("", "Identity", [kept], num_outputs=1)
    either = ir.Node("", "If", [condition], num_outputs=1)
    result = either.outputs[0]
    for value in (same.outputs[0], result):
        value.shape, value.type = total.shape, total.type
    total.replace_all_uses_with(result, replace_graph_outputs=True)
    result.name, total.name, same.outputs[0].name = total.name, f"{total.name}.changed", f"{total.name}.kept"
    graph.insert_before(add, either)
    nodes = [node for node in graph if node in apart or node is add]
    graph.remove(nodes)
    for name, own in (("then_branch", nodes), ("else_branch", [same])):
        branch = ir.Graph([], own[-1].outputs, nodes=own, name=f"{result.name}.{name}")
        either.attributes[name] = ir.AttrGraph(name, branch)
