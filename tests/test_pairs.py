"""Complex numbers are spelled by pairs of reals before ONNX sees them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from surgeon.exporters.pairs import paired


class Turning(nn.Module):
    """Rotary positions as complex numbers, with axes counted from both ends."""

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        angles = torch.arange(x.shape[1], dtype=torch.float32)[:, None] * torch.tensor([1.0, 0.1])
        turn = torch.polar(torch.ones_like(angles), angles) * 1.5
        turn = (scale[:, None] * turn).unsqueeze(0).unsqueeze(-2).clone()
        z = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real((z.transpose(1, -2) * turn.transpose(1, -2))[:, :, 1:]).flatten(3)


class Fourier(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.view_as_real(torch.fft.fft(x, dim=-1).unsqueeze(1))


def traced(module: nn.Module, *inputs: Tensor) -> fx.GraphModule:
    unlifted = torch.export.export(module, inputs).module()
    return fx.GraphModule(unlifted, unlifted.graph)


def targets(graph_module: fx.GraphModule) -> list[Any]:
    return [n.target for n in graph_module.graph.nodes if n.op == "call_function"]


def test_turning_by_pairs_is_turning() -> None:
    inputs = torch.randn(2, 5, 3, 4), torch.rand(5)
    graph_module = traced(Turning(), *inputs)
    wanted = graph_module(*inputs)
    spelled = paired(graph_module)
    assert torch.ops.aten.polar.default not in targets(spelled)
    seen: list[bool] = []

    class Seeing(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            seen.append(isinstance(value, Tensor) and value.is_complex())
            return value

    torch.testing.assert_close(Seeing(spelled).run(*inputs), wanted)
    assert not any(seen)


def test_what_is_not_known_is_left_whole() -> None:
    graph_module = traced(Fourier(), torch.randn(2, 4))
    before = targets(graph_module)
    assert targets(paired(graph_module)) == before
