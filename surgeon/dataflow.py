"""What a node is computed from, and what is computed from it."""

from __future__ import annotations

from torch import fx


def descendants(node: fx.Node) -> set[fx.Node]:
    """Every node computed from `node`, not itself."""
    found: set[fx.Node] = set()
    frontier = list(node.users)
    while frontier:
        user = frontier.pop()
        if user not in found:
            found.add(user)
            frontier.extend(user.users)
    return found


def ancestors(node: fx.Node) -> set[fx.Node]:
    """`node` and every node it is computed from."""
    found = {node}
    frontier = [node]
    while frontier:
        for operand in frontier.pop().all_input_nodes:
            if operand not in found:
                found.add(operand)
                frontier.append(operand)
    return found
