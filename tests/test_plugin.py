"""A technique in a package of its own enters by the same door as ours: the example of CONTRIBUTING.md, installed."""

from __future__ import annotations

import importlib
import shutil
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import surgeon
from surgeon import catalog

PLUGIN = Path(__file__).parent / "plugin"
TASKS = {"sentiment": {"labels": ["negative", "positive"]}, "topic": {"labels": 4}}


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The plug-in in a folder of the path, laid out as pip would."""
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    site = tmp_path / "site"
    metadata = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    metadata.mkdir(parents=True)
    shutil.copy(PLUGIN / "surgeon_rescale.py", site)
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.4\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    groups = project["entry-points"]
    lines = [f"[{group}]\n{name} = {target}" for group in groups for name, target in groups[group].items()]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(site)
    importlib.invalidate_caches()
    yield
    sys.modules.pop("surgeon_rescale", None)


def test_a_plug_in_is_listed_compiled_trained_and_run(installed: None, tiny, tmp_path: Path) -> None:
    assert "rescale" in {technique.name for technique in catalog.techniques()}
    compiled = surgeon.compile({"surgery": [{"rescale": None}], "tasks": TASKS}, base=tiny("bert"))
    assert compiled.plan.by_technique()["rescale"] == 4 * 32
    model = compiled.model("sentiment")
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(input_ids=ids, labels=torch.tensor([1])).loss.backward()
    optimizer.step()
    trained = [name for name in model.state_dict() if name.endswith("rescale.scale")]
    assert trained
    assert all((model.state_dict()[name] != 1).any() for name in trained)
    compiled.save(tmp_path / "build")
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits.numpy()
    with surgeon.Session(tmp_path / "build") as session:
        np.testing.assert_allclose(session.run({"input_ids": ids.numpy()}, "sentiment")["logits"], expected, atol=1e-5)


def test_an_option_of_a_plug_in_is_explained_as_ours_are(installed: None) -> None:
    with pytest.raises(surgeon.SurgeonError, match="'rescale' has no option 'were'"):
        surgeon.read_spec({"surgery": [{"rescale": {"were": "residual"}}]})
