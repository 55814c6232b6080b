"""Joins of images `[batch, channels, height, width]`: an adapter works on the channels of every pixel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

import surgeon
from surgeon.anatomy import find
from surgeon.base import open_base
from surgeon.errors import SpecError
from surgeon.trace import trace
from sweep.chain import attempt

CHANNELS, SIZE, M = 6, 8, 3


class BildConfig(PretrainedConfig):
    model_type = "bild"


class Block(nn.Module):
    def __init__(self, given: int, wide: int) -> None:
        super().__init__()
        self.over = nn.Conv2d(given, given, 3, given // CHANNELS, 1)
        self.up = nn.Conv2d(given, wide, 1)
        self.skip = nn.Conv2d(given, wide, 1, given // CHANNELS) if wide != given else nn.Identity()

    def branch(self, x: Tensor) -> Tensor:
        result: Tensor = self.up(F.gelu(self.over(x)))
        return result

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.skip(x) + self.branch(x)
        return result


class Bild(PreTrainedModel):
    config_class = BildConfig
    main_input_name = "pixel_values"

    def __init__(self, config: BildConfig) -> None:
        super().__init__(config)
        self.seen = nn.Conv2d(3, CHANNELS, 1)
        self.blocks = nn.ModuleList(Block(CHANNELS, wide) for wide in (CHANNELS, CHANNELS, 2 * CHANNELS))
        self.out = nn.Linear(2 * CHANNELS, config.num_labels)
        self.loss_type = "ForSequenceClassification"
        self.post_init()

    def forward(self, pixel_values: Tensor) -> ImageClassifierOutput:
        x = self.seen(pixel_values)
        for block in self.blocks:
            x = block(x)
        return ImageClassifierOutput(logits=self.out(x.mean((2, 3))))


@pytest.fixture(scope="module")
def bild() -> PreTrainedModel:
    torch.manual_seed(0)
    return Bild(BildConfig(num_labels=3, image_size=SIZE, num_channels=3)).eval()


def test_the_features_of_a_join_are_its_channels(bild: PreTrainedModel) -> None:
    joins = find(trace(bild)).joins
    assert [(j.axis, j.width) for j in joins] == [(1, CHANNELS), (1, CHANNELS), (1, 2 * CHANNELS)]


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer", "parallel"])
def test_an_adapter_is_its_equation_at_every_pixel(bild: Any, placement: str) -> None:
    where = "residual.mixer" if placement != "parallel" else "name:blocks.[01].*"
    adapter = {"adapter": {"placement": placement, "bottleneck": M, "where": where, "norms": False, "scale": 1.0}}
    model = surgeon.compile({"surgery": [adapter], "tasks": {"a": {}}}, bild).model("a").eval()
    torch.manual_seed(1)
    model.load_state_dict({name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()})
    deltas = model.state_dict()

    def adapted(at: int, z: Tensor) -> Tensor:
        own = {name.partition(".adapter.")[2]: t for name, t in deltas.items() if f"blocks.{at}." in name}
        if not own:
            return torch.zeros(())
        pixels = z.permute(0, 2, 3, 1)
        hidden = F.gelu(pixels @ own["down.weight"] + own["down.bias"])
        return (hidden @ own["up.weight"] + own["up.bias"]).permute(0, 3, 1, 2)

    pixels = torch.randn(2, 3, SIZE, SIZE)
    x = bild.seen(pixels)
    for at, block in enumerate(bild.blocks):
        b = block.branch(x)
        if placement == "pfeiffer":
            j = block.skip(x) + b
            x = j + adapted(at, j)
        else:
            x = block.skip(x) + b + adapted(at, b if placement == "houlsby" else x)
    torch.testing.assert_close(model(pixel_values=pixels).logits, bild.out(x.mean((2, 3))))


def test_adapters_and_fusions_of_channels_go_the_whole_way(bild: PreTrainedModel) -> None:
    opened, graph_module = open_base(bild), trace(bild)
    where = {"where": "residual.mixer", "bottleneck": M}
    for item in ({"adapter": {**where, "norms": False}}, {"fusion": {"of": 2, **where}}):
        assert attempt(opened, graph_module, [item]) == "ok"


def test_a_parallel_adapter_that_would_widen_is_refused(bild: PreTrainedModel) -> None:
    spec = {"surgery": [{"adapter": {"placement": "parallel", "where": "residual.mixer"}}], "tasks": {"a": {}}}
    with pytest.raises(SpecError, match=r"would read .*'6'.* and add .*'12'"):
        surgeon.compile(spec, bild)
