"""A folder that brings its own modeling code, of a design nobody told us of: it runs where the spec allows that."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import ModuleType
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

AUTO = {
    "AutoConfig": "modeling_odd.SonderbarConfig",
    "AutoModelForSequenceClassification": "modeling_odd.Sonderbar",
}
SURGERY = [
    {"lora": {"rank": 3}},
    {"bitfit": {}},
    {"adapter": {"bottleneck": 4, "norms": False}},
    {"prefix": {"length": 2}},
]


@pytest.fixture
def odd(odd_model: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder, with random weights. transformers copies the code to run into a cache, here one of the test's own."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder = tmp_path / "sonderbar"
    folder.mkdir()
    shutil.copyfile(str(odd_model.__file__), folder / "modeling_odd.py")
    config = {
        "model_type": "sonderbar",
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
    (odd / "modeling_odd.py").write_text("raise SystemExit('it ran')")
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
        f"schichten.{layer}.{blick}.{teil}"
        for layer in (0, 1)
        for blick in ("nah", "fern")
        for teil in ("schluessel_und_frage", "inhalt")
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
