"""A folder that brings its own modeling code, of a design nobody told us of: it runs where the spec allows that."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import dynamic_module_utils

import surgeon
from surgeon.audit import audit
from surgeon.base import load_base
from surgeon.errors import BaseError
from surgeon.spec import BaseSpec

CODE = '''
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class KummaConfig(PretrainedConfig):
    model_type = "kumma"

    def __init__(self, sanoja=100, leveys=24, kerroksia=2, paita=3, **muut):
        super().__init__(**muut)
        self.sanoja, self.leveys, self.kerroksia, self.paita = sanoja, leveys, kerroksia, paita


class Huomio(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.paita = c.paita
        self.kysy, self.avain, self.arvo, self.ulos = (nn.Linear(c.leveys, c.leveys) for _ in range(4))

    def forward(self, x, peite):
        b, s, d = x.shape
        q, k, v = (f(x).view(b, s, self.paita, -1).transpose(1, 2) for f in (self.kysy, self.avain, self.arvo))
        w = (q @ k.transpose(-1, -2) * (d // self.paita) ** -0.5 + peite).softmax(-1)
        return self.ulos((w @ v).transpose(1, 2).reshape(b, s, d))


class Kerros(nn.Module):
    """Two attentions in a row, then a feed-forward with its norm in the middle."""

    def __init__(self, c):
        super().__init__()
        self.alku, self.lahi, self.kauko = nn.LayerNorm(c.leveys), Huomio(c), Huomio(c)
        self.ylos, self.keski = nn.Linear(c.leveys, 2 * c.leveys), nn.LayerNorm(2 * c.leveys)
        self.alas = nn.Linear(2 * c.leveys, c.leveys)

    def forward(self, x, peite):
        x = x + self.lahi(self.alku(x), peite)
        x = self.kauko(x, peite) + x
        return x + self.alas(self.keski(torch.tanh(self.ylos(x))))


class Kumma(PreTrainedModel):
    config_class = KummaConfig

    def __init__(self, config):
        super().__init__(config)
        self.sanat = nn.Embedding(config.sanoja, config.leveys)
        self.kerrokset = nn.ModuleList([Kerros(config) for _ in range(config.kerroksia)])
        self.tuomio = nn.Linear(config.leveys, config.num_labels)
        self.loss_type = "ForSequenceClassification"
        self.post_init()

    def get_input_embeddings(self):
        return self.sanat

    def forward(self, input_ids, attention_mask=None):
        x = self.sanat(input_ids)
        nahdyt = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        peite = (1.0 - nahdyt[:, None, None, :].to(x.dtype)) * -1e9
        for kerros in self.kerrokset:
            x = kerros(x, peite)
        paino = nahdyt.unsqueeze(-1).to(x.dtype)
        return SequenceClassifierOutput(logits=self.tuomio((x * paino).sum(1) / paino.sum(1)))
'''
AUTO = {"AutoConfig": "modeling_kumma.KummaConfig", "AutoModelForSequenceClassification": "modeling_kumma.Kumma"}
SURGERY = [
    {"lora": {"rank": 3}},
    {"bitfit": {}},
    {"adapter": {"bottleneck": 4, "norms": False}},
    {"prefix": {"length": 2}},
]


@pytest.fixture
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder, with random weights. transformers copies the code to run into a cache, here one of the test's own."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder = tmp_path / "kumma"
    folder.mkdir()
    (folder / "modeling_kumma.py").write_text(CODE)
    config = {
        "model_type": "kumma",
        "auto_map": AUTO,
        "id2label": {str(i): f"L{i}" for i in range(3)},
        "pad_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(config))
    model = load_base(BaseSpec(model=str(folder), trust_remote_code=True), weights=False)
    draw = torch.Generator().manual_seed(0)
    state = {name: 0.3 * torch.randn(tensor.shape, generator=draw) for name, tensor in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_its_code_does_not_run_unless_the_spec_says_so(odd: Path) -> None:
    (odd / "modeling_kumma.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(BaseError, match=r"(?s)no model type that transformers knows.*trust_remote_code: true"):
        load_base(BaseSpec(model=str(odd)))


def test_a_head_that_it_does_not_bring_is_told(odd: Path) -> None:
    with pytest.raises(BaseError, match=r"no head 'causal-lm'(?s:.*)sequence-classification"):
        load_base(BaseSpec(model=str(odd), head="causal-lm", trust_remote_code=True))


def test_it_goes_the_whole_way(odd: Path, tmp_path: Path) -> None:
    """Two attentions a layer, found and changed; answers of PyTorch; opened again, verified, and its weights linked."""
    spec: dict[str, Any] = {
        "base": {"model": str(odd), "trust_remote_code": True},
        "surgery": SURGERY,
        "tasks": {"a": {"labels": 2}, "b": {"labels": 5}},
        "export": {"weights": "link"},
    }
    compiled = surgeon.compile(spec)
    assert {row.site for row in compiled.plan.rows if row.technique == "lora"} == {
        f"kerrokset.{layer}.{huomio}.{osa}"
        for layer in (0, 1)
        for huomio in ("lahi", "kauko")
        for osa in ("kysy", "arvo")
    }
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for task in "ab":
            model = compiled.model(task).eval()
            for name in model.state_dict():
                tensor = model.get_parameter(name)
                tensor.add_(0.2 * torch.randn(tensor.shape, generator=noise))
    build = compiled.save(tmp_path / "build")
    assert (build / "model.safetensors").samefile(odd / "model.safetensors")
    found = audit(build)
    assert found.compared
    assert max(task.difference or 0.0 for task in found.tasks) < 1e-4
    saved = (build / "spec.yaml").read_text()
    assert re.search(r"trust_remote_code: true", saved)
