"""What an attention must not see, as what is added to its scores: far below all of them, and finite.

Such a softmax is never 0/0. Of a mask of truths the converter looks for that in every probability of every layer, which
takes a tenth of the time of long texts. A row that sees nothing, which is padding, answers with the mean of all values.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

aten = torch.ops.aten


def hidden(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Spell every mask of truths by numbers, once for all attentions that read it."""
    graph = graph_module.graph
    spelled: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
    for core in graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
        mask = core.args[3] if len(core.args) > 3 else core.kwargs.get("attn_mask")
        if not isinstance(mask, fx.Node) or mask.meta["val"].dtype != torch.bool:
            continue
        key = mask, core.args[0].meta["val"].dtype
        if key not in spelled:
            with graph.inserting_after(mask):
                spelled[key] = graph.call_function(added, key)
            spelled[key].meta["val"] = mask.meta["val"].to(key[1])
        core.replace_input_with(mask, spelled[key])
    graph_module.recompile()
    return graph_module


def added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Nothing where the mask is true; where it is false half the least number, which no score makes infinite."""
    return torch.where(mask, torch.zeros((), dtype=dtype), torch.full((), torch.finfo(dtype).min / 2, dtype=dtype))
