"""Complex numbers as pairs of reals on a last axis of their own, which is all that ONNX has.

Rotary positions are turned by them in some bases: z · w with z of a query's features and w = e^(i·angle). What is left
complex, such as a Fourier transform, is the converter's to spell.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten


def paired(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Spell all that is complex by pairs, or nothing where an operator is none of those known here."""
    graph = graph_module.graph
    calls = [n for n in graph.nodes if n.op == "call_function"]
    touched = [n for n in calls if any(map(_complex, (n, *n.all_input_nodes)))]
    spelled = {node: _spelled(node) for node in touched}
    if None in spelled.values() or any(_complex(n) for n in graph.nodes if n.op != "call_function"):
        return graph_module
    for node, fn in spelled.items():
        node.target, node.kwargs = fn, {}
    graph_module.recompile()
    return graph_module


def _complex(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_complex()


def _spelled(node: fx.Node) -> Callable[..., Tensor] | None:
    """What stands for an operator on pairs; None for one that is not known, or that is told more than its operands."""
    if node.target is aten.mul.Tensor:
        first, second = (isinstance(a, fx.Node) and _complex(a) for a in node.args)
        return _product if first and second else _scaled if first else _scaling
    if node.target in CASTS:
        return _same if _complex(node) else None
    return None if node.kwargs else PAIRS.get(node.target)


def _turned(radius: Tensor, angle: Tensor) -> Tensor:
    return torch.stack([radius * angle.cos(), radius * angle.sin()], -1)


def _product(z: Tensor, w: Tensor) -> Tensor:
    """(a + bi)(c + di) = (ac − bd) + (ad + bc)i."""
    (a, b), (c, d) = ((x.select(-1, 0), x.select(-1, 1)) for x in (z, w))
    return torch.stack([a * c - b * d, a * d + b * c], -1)


def _scaled(z: Tensor, scale: Tensor | float) -> Tensor:
    return z * (scale.unsqueeze(-1) if isinstance(scale, Tensor) else scale)


def _scaling(scale: Tensor | float, z: Tensor) -> Tensor:
    return _scaled(z, scale)


def _same(z: Tensor, *_: Any) -> Tensor:
    return z


def _unsqueezed(z: Tensor, axis: int) -> Tensor:
    return z.unsqueeze(_axis(axis))


def _sliced(z: Tensor, axis: int = 0, *rest: Any) -> Tensor:
    return torch.ops.aten.slice.Tensor(z, _axis(axis), *rest)  # type: ignore[no-any-return]


def _swapped(z: Tensor, axis: int, other: int) -> Tensor:
    return z.transpose(_axis(axis), _axis(other))


def _axis(axis: int) -> int:
    """The place of a complex tensor's axis among those of the pairs."""
    return axis if axis >= 0 else axis - 1


CASTS = (aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.clone.default, aten.contiguous.default)
PAIRS: dict[Any, Callable[..., Tensor]] = {
    aten.polar.default: _turned,
    aten.view_as_complex.default: _same,
    aten.view_as_real.default: _same,
    aten.unsqueeze.default: _unsqueezed,
    aten.slice.Tensor: _sliced,
    aten.transpose.int: _swapped,
}
