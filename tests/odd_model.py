"""A model of an odd design, with names in another language: a class that tests use, and code that a folder brings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

D, HEADS, LAYERS = 24, 3, 2


class SonderbarConfig(PretrainedConfig):
    model_type = "sonderbar"

    def __init__(self, woerter: int = 90, breite: int = D, tiefe: int = LAYERS, **rest: Any) -> None:
        super().__init__(**rest)
        self.woerter, self.breite, self.tiefe = woerter, breite, tiefe


class Blick(nn.Module):
    """Attention, spelled out: keys and queries of one fused projection (keys first), values transposed by hand."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.schluessel_und_frage = nn.Linear(d, 2 * d)
        self.inhalt = nn.Linear(d, d, bias=False)
        self.ausgang = nn.Linear(d, d)

    def forward(self, x: Tensor, maske: Tensor) -> Tensor:
        b, s, d = x.shape
        k, q = self.schluessel_und_frage(x).view(b, s, 2, HEADS, d // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        v = self.inhalt(x).view(b, s, HEADS, d // HEADS).transpose(1, 2)
        w = (q @ k.transpose(-1, -2) * (d // HEADS) ** -0.5 + maske).softmax(-1)
        return self.ausgang((w @ v).transpose(1, 2).reshape(b, s, d))


class Schicht(nn.Module):
    """Two attentions in a row, then a feed-forward with its norm in the middle."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.ruhe = nn.LayerNorm(d)
        self.nah, self.fern = Blick(d), Blick(d)
        self.hinauf, self.mitte, self.hinab = nn.Linear(d, 2 * d), nn.LayerNorm(2 * d), nn.Linear(2 * d, d)

    def forward(self, x: Tensor, maske: Tensor) -> Tensor:
        x = x + self.nah(self.ruhe(x), maske)
        x = self.fern(x, maske) + x
        return x + self.hinab(self.mitte(torch.tanh(self.hinauf(x))))


class Sonderbar(PreTrainedModel):
    config_class = SonderbarConfig

    def __init__(self, config: SonderbarConfig) -> None:
        super().__init__(config)
        self.wortschatz = nn.Embedding(config.woerter, config.breite)
        self.schichten = nn.ModuleList([Schicht(config.breite) for _ in range(config.tiefe)])
        self.urteil = nn.Linear(config.breite, config.num_labels)
        self.loss_type = "ForSequenceClassification"
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.wortschatz

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SequenceClassifierOutput:
        x = self.wortschatz(input_ids)
        seen = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        maske = (1.0 - seen[:, None, None, :].to(x.dtype)) * -1e9
        for schicht in self.schichten:
            x = schicht(x, maske)
        weight = seen.unsqueeze(-1).to(x.dtype)
        return SequenceClassifierOutput(logits=self.urteil((x * weight).sum(1) / weight.sum(1)))
