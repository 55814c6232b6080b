"""What is written in place belongs to what is read: low-rank attention builds its keys that way."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from surgeon.dataflow import writes


class Written(nn.Module):
    """A buffer that is filled by parts, and read afterwards."""

    def forward(self, x: Tensor) -> Tensor:
        buffer = x.new_empty(x.shape)
        buffer[:, :2].copy_(x[:, :2] + 1)
        buffer[:, 2:].copy_(x[:, 2:] * 2)
        return buffer.mul(3) + x.sin()


def test_every_write_to_a_buffer_is_seen_and_none_to_what_only_gives_a_value() -> None:
    graph = torch.export.export(Written(), (torch.ones(3, 5),), strict=False).module().graph
    named = {str(node.target): node for node in graph.nodes}
    buffer, sine = named["aten.new_empty.default"], named["aten.sin.default"]
    copies = [node for node in graph.nodes if str(node.target) == "aten.copy_.default"]
    assert len(copies) == 2
    assert writes(buffer) == copies
    assert writes(copies[0].args[0]) == copies
    assert writes(sine) == []
    assert writes(next(node for node in graph.nodes if node.op == "placeholder")) == []
