"""A class never seen before, of an odd design and with names in another language, goes the whole way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

import surgeon
from surgeon.anatomy import find
from surgeon.trace import trace

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


@pytest.fixture(scope="module")
def odd() -> Sonderbar:
    torch.manual_seed(0)
    model = Sonderbar(SonderbarConfig(num_labels=3, pad_token_id=0)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def test_its_parts_are_found(odd: Sonderbar) -> None:
    anatomy = find(trace(odd))
    assert anatomy.layers == {"encoder": LAYERS}
    assert anatomy.notes == ()
    layer = [s for s in anatomy.sites() if s.layer == 1]
    roles = {p.role: [] for p in layer}
    for site in layer:
        roles[site.role].append(site)
    assert [j.width for j in roles["residual.attention"]] == [D, D]
    assert {p.path for p in roles["attention.query"]} == {
        f"schichten.1.{blick}.schluessel_und_frage" for blick in ("nah", "fern")
    }
    assert {p.features for p in roles["attention.key"]} == {tuple(range(D))}
    assert {p.features for p in roles["attention.query"]} == {tuple(range(D, 2 * D))}
    assert {p.path for p in roles["attention.value"]} == {f"schichten.1.{b}.inhalt" for b in ("nah", "fern")}
    assert [p.path for p in roles["ffn.up"]] == ["schichten.1.hinauf"]
    assert [p.path for p in roles["ffn.down"]] == ["schichten.1.hinab"]
    assert [n.path for n in roles["norm.inner"]] == ["schichten.1.mitte"]
    assert [n.path for n in roles["norm.pre"]] == ["schichten.1.ruhe"]
    assert [p.path for p in anatomy.projections if p.role == "head.out"] == ["urteil"]


def test_it_goes_the_whole_way(odd: Sonderbar, tmp_path: Path) -> None:
    surgery = [
        {"lora": {"rank": 3}},
        {"bitfit": {}},
        {"adapter": {"bottleneck": 4, "norms": False}},
        {"prefix": {"length": 2}},
    ]
    spec = {"surgery": surgery, "tasks": {"a": {"labels": 2}, "b": {"labels": 5}}}
    compiled = surgeon.compile(spec, odd)
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for task in "ab":
            model = compiled.model(task).eval()
            for name in model.state_dict():
                tensor = model.get_parameter(name)
                tensor.add_(0.2 * torch.randn(tensor.shape, generator=noise))
    with surgeon.Session(compiled.save(tmp_path / "build"), threads=1) as session, torch.no_grad():
        for batch, length in ((3, 9), (1, 5), (2, 17)):
            ids = torch.randint(3, 90, (batch, length), generator=noise)
            mask = torch.ones_like(ids)
            mask[0, length - 2 :] = 0
            fed = {"input_ids": ids, "attention_mask": mask}
            arrays = {name: t.numpy() for name, t in fed.items()}
            for task in ("a", None, "b", "a"):
                peer = compiled.model(task).eval() if task else odd
                found, wanted = session.run(arrays, task)["logits"], peer(**fed).logits.numpy()
                assert np.abs(found - wanted).max() <= 1e-4 * max(1.0, np.abs(wanted).max())
