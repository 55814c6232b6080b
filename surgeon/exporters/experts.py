"""Products of rows with the weights of their experts, as ONNX writes them: rows in runs, a `MatMul` for each expert.

Picking each row's weight would hold a weight for every row; of a run, all rows are multiplied by one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from onnxscript import opset18
from torch import fx

op: Any = opset18
INT64 = 7


def translations(graph: fx.Graph) -> dict[Callable[..., Any], Callable[..., Any]]:
    """How those operators of a graph are written that the exporter does not know."""
    return dict.fromkeys((n.target for n in graph.nodes if "grouped_mm" in str(n.target)), grouped)


def grouped(x: Any, weights: Any, offs: Any) -> Any:
    """`x [rows, in]` by `weights [experts, in, out]`, where the rows of expert e end at `offs[e]`."""
    count = weights.shape[0]
    ends = op.Cast(offs, to=INT64)
    begins = op.Concat(op.Constant(value_ints=[0]), op.Slice(ends, [0], [-1], [0]), axis=0)
    runs = op.SplitToSequence(x, op.Sub(ends, begins), axis=0)
    each = op.Split(weights, axis=0, num_outputs=count) if count > 1 else [weights]
    products = [
        op.MatMul(op.SequenceAt(runs, op.Constant(value_int=expert)), op.Squeeze(own, op.Constant(value_ints=[0])))
        for expert, own in enumerate(each)
    ]
    return op.Concat(*products, axis=0)
