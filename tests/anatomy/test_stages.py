"""A model of images in stages: attention in windows and without a mask, a width that grows where a stage ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from surgeon.anatomy import Anatomy, find
from surgeon.base import open_base
from surgeon.trace import trace
from sweep.chain import attempt, surgery

D, HEADS, WINDOW = 12, 2, 4


class FensterConfig(PretrainedConfig):
    model_type = "fenster"


class Windows(nn.Module):
    """Queries, keys and values are `[batch, heads, windows, tokens, d]`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens // WINDOW, WINDOW, 3, HEADS, width // HEADS)
        q, k, v = qkv.permute(3, 0, 4, 1, 2, 5).unbind(0)
        mixed = torch.softmax(0.4 * q @ k.transpose(-1, -2), -1) @ v
        out: Tensor = self.o(mixed.permute(0, 2, 3, 1, 4).reshape(batch, tokens, width))
        return out


class Added(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def fed(width: int) -> Added:
    return Added(nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)))


class Fenster(PreTrainedModel):
    config_class = FensterConfig
    main_input_name = "pixel_values"

    def __init__(self, config: FensterConfig) -> None:
        super().__init__(config)
        first, last = ([Added(Windows(w)), fed(w), Added(Windows(w)), fed(w)] for w in (D, 2 * D))
        self.seen, self.out = nn.Linear(3, D), nn.Linear(2 * D, config.num_labels)
        self.stages = nn.ModuleList([nn.Sequential(*first, nn.Linear(D, 2 * D), fed(2 * D)), nn.Sequential(*last)])
        self.loss_type = "ForSequenceClassification"
        self.post_init()

    def forward(self, pixel_values: Tensor) -> ImageClassifierOutput:
        x = self.seen(pixel_values.flatten(2).transpose(1, 2))
        for stage in self.stages:
            x = stage(x)
        return ImageClassifierOutput(logits=self.out(x.mean(1)))


@pytest.fixture(scope="module")
def read() -> tuple[Any, fx.GraphModule, Anatomy]:
    torch.manual_seed(0)
    model = Fenster(FensterConfig(num_labels=3, image_size=4, num_channels=3)).eval()
    graph_module = trace(model)
    return model, graph_module, find(graph_module)


def test_a_stage_is_no_layer_and_what_ends_it_stands_in_none(read: Any) -> None:
    _, _, anatomy = read
    assert anatomy.layers == {"stack0": 2, "encoder": 2}
    places = [(j.role.partition(".")[2], j.layer) for j in anatomy.joins if j.stack == "encoder"]
    assert places == [("ffn", None), ("attention", 0), ("ffn", 0), ("attention", 1), ("ffn", 1)]


def test_a_prefix_stands_in_every_window(read: Any) -> None:
    model, graph_module, anatomy = read
    assert [(a.heads, a.kv_heads) for a in anatomy.attentions] == [(HEADS, HEADS)] * 4
    assert attempt(open_base(model), graph_module, [surgery(anatomy)["prefix"]]) == "ok"
