"""Every spec of the gallery compiles, and says above all what it is for."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import surgeon
from surgeon import registry

if TYPE_CHECKING:
    from conftest import Traces

GALLERY = sorted(Path(__file__).parents[1].joinpath("specs").glob("*.yaml"))
COMPILED = [
    pytest.param(
        path,
        id=path.stem,
        marks=[pytest.mark.sweep] if "-" in path.stem and path.stem.replace("-", "_") not in registry.names() else [],
    )
    for path in GALLERY
]
"""Variants of a technique are of the sweep."""


@pytest.mark.parametrize("path", COMPILED)
def test_a_spec_of_the_gallery_compiles_to_a_build_that_runs(path: Path, traces: Traces, tmp_path: Path) -> None:
    spec = surgeon.read_spec(path)
    source = (spec.base and spec.base.model) or ""
    package = source.removeprefix("package:").partition("/")[0]
    if source.startswith("package:") and find_spec(package) is None:
        pytest.skip(f"the package '{package}', which brings the base's weights, is not installed")
    compiled = surgeon.compile(spec) if spec.export.generate else traces.compile(spec)
    compiled.save(tmp_path / "build")
    assert compiled.plan.parameters > 0
    with surgeon.Session(tmp_path / "build") as session:
        ids = [[5, 6, 7, 8]]
        decoder = (
            {"decoder_input_ids": [[0, 5]]} if "decoder_input_ids" in {i.name for i in session.manifest.inputs} else {}
        )
        assert set(session.tasks) == set(compiled.tasks)
        for task in session.tasks:
            session.run({"input_ids": ids, **decoder}, task)


@pytest.mark.parametrize("path", GALLERY, ids=lambda path: path.stem)
def test_a_spec_of_the_gallery_begins_with_a_comment_that_says_what_it_is(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ")
    assert len(first) > 40


def test_every_technique_has_a_spec_in_the_gallery() -> None:
    shown = {step.name for path in GALLERY for step in surgeon.read_spec(path).steps}
    assert shown == set(registry.names())
