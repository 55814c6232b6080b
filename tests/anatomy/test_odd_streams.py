"""Streams that are not a sum from end to end: attention that replaces one, a skip that is projected too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

import surgeon
from surgeon.anatomy import find
from surgeon.base import open_base
from surgeon.errors import SelectorError
from surgeon.spec import read_spec
from surgeon.trace import trace
from sweep.cases import Case, base
from sweep.chain import attempt, reading, surgery

D, LAYERS = 16, 4


class StromConfig(PretrainedConfig):
    model_type = "strom"

    def __init__(self, widened: int | None = None, every: int = LAYERS + 1, pooled: bool = False, **rest: Any) -> None:
        self.widened, self.every, self.pooled = widened, every, pooled
        super().__init__(**rest)


class Layer(nn.Module):
    """Attention and a feed-forward behind norms; the attention adds to the stream, replaces it, or widens it."""

    def __init__(self, width: int, out: int, replaces: bool) -> None:
        super().__init__()
        self.replaces = replaces
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(out)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.o = nn.Linear(width, out)
        self.skip = nn.Linear(width, out) if out != width else None
        self.up, self.down = nn.Linear(out, 2 * out), nn.Linear(2 * out, out)

    def forward(self, x: Tensor, mask: Tensor, first: int | None = None) -> Tensor:
        normed = self.before(x)
        projected = self.q(normed[:, :first]), self.k(normed), self.v(normed)
        q, k, v = (p.unflatten(-1, (2, -1)).transpose(1, 2) for p in projected)
        mixed = self.o(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))
        if not self.replaces:
            mixed = (x if self.skip is None else self.skip(normed)) + mixed
        hidden = F.gelu(self.up(self.after(mixed)))
        result: Tensor = mixed + self.down(hidden / (1 + hidden.square().mean(-1)).sqrt().unsqueeze(-1))
        return result


class Strom(PreTrainedModel):
    config_class = StromConfig

    def __init__(self, config: StromConfig) -> None:
        super().__init__(config)
        self.words = nn.Embedding(64, D)
        widths = [D if config.widened is None or at < config.widened else 2 * D for at in range(LAYERS + 1)]
        self.layers = nn.ModuleList(
            Layer(widths[at], widths[at + 1], at % config.every == 0 and config.every <= LAYERS) for at in range(LAYERS)
        )
        self.pool = Layer(D, D, replaces=True) if config.pooled else None
        self.out = nn.Linear(widths[-1], config.num_labels)
        self.loss_type = "ForSequenceClassification"
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SequenceClassifierOutput:
        x = self.words(input_ids)
        for layer in self.layers:
            x = layer(x, attention_mask.bool()[:, None, None, :])
        if self.pool is not None:
            x = self.pool(x, attention_mask.bool()[:, None, None, :], first=1)
        return SequenceClassifierOutput(logits=self.out(x[:, 0]))


def strom(**changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = Strom(StromConfig(num_labels=2, pad_token_id=0, vocab_size=64, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def test_an_attention_that_replaces_the_stream_has_all_roles_and_no_join() -> None:
    model = strom(every=2)
    graph_module = trace(model)
    anatomy = find(graph_module)
    assert anatomy.layers == {"encoder": LAYERS}
    for role in ("query", "key", "value", "output"):
        owners = [(p.path, p.layer) for p in anatomy.projections if p.role == f"attention.{role}"]
        assert owners == [(f"layers.{at}.{role[0]}", at) for at in range(LAYERS)]
    assert [a.layer for a in anatomy.attentions] == [0, 1, 2, 3]
    assert [j.layer for j in anatomy.joins if j.role == "residual.attention"] == [1, 3]
    assert [j.layer for j in anatomy.joins if j.role == "residual.ffn"] == [0, 1, 2, 3]
    assert anatomy.notes == tuple(f"layer {at} of encoder: its attention adds to no residual" for at in (0, 2))
    assert {n.path: n.place for n in anatomy.norms} == {
        f"layers.{at}.{side}": "pre" for at in range(LAYERS) for side in ("before", "after")
    }
    assert attempt(open_base(model), graph_module, [*surgery(anatomy).values()]) == "ok"


def test_a_head_that_weighs_a_text_into_one_is_no_layer() -> None:
    anatomy = find(trace(strom(pooled=True)))
    assert anatomy.layers == {"encoder": LAYERS, "stack1": 1}
    assert [(a.stack, a.layer) for a in anatomy.attentions] == [("encoder", at) for at in range(LAYERS)]


def test_a_join_that_is_not_there_cannot_be_selected() -> None:
    model = strom(every=2)
    spec = read_spec({"surgery": [{"adapter": {"where": "residual.attention@0-1"}}], "tasks": {"a": {}}})
    with pytest.raises(SelectorError, match=r"layer 0 has no 'residual\.attention'"):
        surgeon.compile(spec, model)


def test_a_skip_projected_beside_the_attention_is_a_skip() -> None:
    model = strom(widened=2)
    graph_module = trace(model)
    anatomy = find(graph_module)
    assert sum(anatomy.layers.values()) == LAYERS
    joins = [(j.role.partition(".")[2], j.width) for j in anatomy.joins]
    narrow, wide = ([(kind, width) for kind in ("attention", "ffn")] * n for width, n in ((D, 1), (2 * D, 3)))
    assert joins == narrow + wide
    assert [p.path for p in anatomy.projections if p.role == "other"] == ["layers.1.skip"]
    assert attempt(open_base(model), graph_module, [*surgery(anatomy).values()]) == "ok"


def test_layers_of_a_stage_may_mix_without_feeding_forward() -> None:
    """SwiftFormer: layers of convolutions, and one that weighs all positions into one at the end of a stage."""
    notes: dict[str, Any] = {}
    reading(Case("swiftformer", "image-classification"), notes)
    assert notes["faults"] == []
    anatomy = find(trace(base(Case("swiftformer", "image-classification"))))
    last = [j for j in anatomy.joins if (j.stack, j.layer) == ("encoder", anatomy.layers["encoder"] - 1)]
    assert [j.role for j in last if ".attn.proj" not in j.path] == ["residual.mixer", "residual.mixer", "residual.ffn"]
