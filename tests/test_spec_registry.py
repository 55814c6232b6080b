"""Techniques come through one door: an installed plug-in is as good as ours, and a clash is told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from surgeon.errors import SpecError
from surgeon.registry import exporter, names, technique
from surgeon.spec import json_schema, parse_spec

PLUGIN = '''
from typing import ClassVar
from pydantic import Field
from surgeon.passes import Pass, PassResult

class Toy(Pass):
    """Do nothing at all."""
    name: ClassVar[str] = "toy"
    title: ClassVar[str] = "Toy"
    paper: ClassVar[str] = ""
    identity_at_birth: ClassVar[bool] = True
    size: int = Field(3, ge=1, description="Size of nothing.")
    def call(self, program):
        return PassResult(program, modified=False)
'''


def install(folder: Path, distribution: str, module: str, entries: str, source: str = PLUGIN) -> None:
    """A package as pip would leave it: a module and its entry points."""
    info = folder / f"{distribution}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[surgeon.passes]\n{entries}\n")
    (folder / f"{module}.py").write_text(source)


def test_our_own_techniques_are_found_by_name() -> None:
    assert {"adapter", "bitfit", "head", "lora", "prefix"} <= set(names())
    assert technique("lora").name == "lora"


def test_a_plug_in_is_as_good_as_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "toybox", "toybox_a", "toy = toybox_a:Toy")
    monkeypatch.syspath_prepend(tmp_path)
    assert "toy" in names()
    spec = parse_spec("surgery: [{toy: {size: 4}}]")
    assert parse_spec(spec.to_yaml()) == spec
    assert "toy" in json_schema()["properties"]["surgery"]["items"]["properties"]
    with pytest.raises(SpecError, match=r"toy.size must be at least 1, got 0"):
        parse_spec("surgery: [{toy: {size: 0}}]")


def test_two_packages_that_claim_one_name_are_both_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "first", "first_a", "toy = first_a:Toy")
    install(tmp_path, "second", "second_a", "toy = second_a:Toy")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SpecError, match=r"two packages claim .* first \(first_a:Toy\) and second \(second_a:Toy\)"):
        technique("toy")


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("toy = toybox_b:Nothing", "cannot be imported"),
        ("toy = toybox_none:Toy", "cannot be imported: No module named 'toybox_none'"),
        ("toy = os:path", "is not a pass of that name"),
        ("toi = toybox_b:Toy", "is not a pass of that name"),
    ],
)
def test_a_broken_plug_in_is_named(entry: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "toybox", "toybox_b", entry)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SpecError, match=said):
        technique(entry.partition(" ")[0])
    with pytest.raises(SpecError, match=f"spec.yaml:1:12: .*{said}"):
        parse_spec(f"surgery: [{{{entry.partition(' ')[0]}: }}]")


def test_an_unknown_name_gets_its_nearest() -> None:
    with pytest.raises(SpecError, match="did you mean 'lora'") as caught:
        technique("lorra")
    assert "adapter" in str(caught.value)
    with pytest.raises(SpecError, match="did you mean 'onnx'"):
        exporter("onx")


def test_listing_the_names_imports_no_technique() -> None:
    code = "import sys; from surgeon.registry import names; names(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
