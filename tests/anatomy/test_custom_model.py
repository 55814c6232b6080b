"""A class never seen before, of an odd design and with names in another language, goes the whole way."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import surgeon
from surgeon.anatomy import find
from surgeon.trace import trace

D, LAYERS = 24, 2


@pytest.fixture(scope="module")
def odd(odd_model: ModuleType) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = odd_model.Sonderbar(odd_model.SonderbarConfig(num_labels=3, pad_token_id=0)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def test_its_parts_are_found(odd: PreTrainedModel) -> None:
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


def test_it_goes_the_whole_way(odd: PreTrainedModel, tmp_path: Path) -> None:
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
