"""The docs: generated pages are as the code says, links lead somewhere, and the examples run."""

from __future__ import annotations

import ast
import importlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import surgeon
from surgeon.spec.reader import parse_spec

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
YAML = re.compile(r"^```yaml\n(.*?)^```", re.DOTALL | re.MULTILINE)
RUNNABLE = re.compile(r"^<!-- run -->\n```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
MEASURED = ROOT / "docs" / "benchmarks.md"
"""Written by `make bench` and not by hand, so it may be missing."""


@pytest.fixture(scope="module")
def generate() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "docs")
        yield importlib.import_module("generate")


def stale(wanted: dict[Path, str]) -> list[str]:
    return [
        str(path.relative_to(ROOT))
        for path, text in wanted.items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]


def test_generated_pages_are_as_the_code_says(generate: ModuleType) -> None:
    assert stale(generate.pages()) == [], "run `make docs` and look at the difference"


def test_pictures_are_as_the_code_draws_them(generate: ModuleType) -> None:
    assert stale(generate.pictures()) == [], "run `make docs` and look at the pictures"


def test_every_technique_says_when_to_choose_it_and_how_it_differs(generate: ModuleType) -> None:
    for name in generate.own_techniques():
        notes = (ROOT / "docs" / "techniques" / "_notes" / f"{name}.md").read_text(encoding="utf-8")
        for heading in ("Choose it when", "Choose another when", "Composes with", "Differs from PEFT and the paper in"):
            assert f"## {heading}\n" in notes, f"{name}: {heading}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    folder = page.parent.parent if page.parent.name == "_notes" else page.parent
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        path = (folder / target).resolve()
        assert path.exists() or path == MEASURED, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_examples_in_yaml_are_specs(page: Path) -> None:
    for text in YAML.findall(page.read_text(encoding="utf-8")):
        parse_spec(text, page.name)


@pytest.fixture(scope="module")
def project(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the README's spec, on a base that is there, and its build."""
    folder = tmp_path_factory.mktemp("project")
    text = YAML.findall((ROOT / "README.md").read_text(encoding="utf-8"))[0]
    (folder / "spec.yaml").write_text(text.replace("path/to/a/model", str(base_folder)), encoding="utf-8")
    surgeon.compile(folder / "spec.yaml", out=folder / "build")
    return folder


@pytest.mark.parametrize("name", ["README.md", "docs/python-api.md", "docs/runtime.md"])
def test_examples_in_python_run(name: str, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(project / "spec.yaml", tmp_path)
    if name == "docs/runtime.md":
        shutil.copytree(project / "build", tmp_path / "build")
    monkeypatch.chdir(tmp_path)
    blocks = RUNNABLE.findall((ROOT / name).read_text(encoding="utf-8"))
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, name, "exec"), names)


def test_every_page_with_runnable_examples_is_run() -> None:
    marked = {str(page.relative_to(ROOT)) for page in PAGES if RUNNABLE.search(page.read_text(encoding="utf-8"))}
    assert marked == {"README.md", "docs/python-api.md", "docs/runtime.md"}


def test_the_rooms_of_the_architecture_are_in_the_order_of_the_imports() -> None:
    table = re.findall(
        r"^\| (`[^|]+) \|", (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    order = {room: line for line, cell in enumerate(table) for room in re.findall(r"`(\w+)`", cell)}
    files = {path for path in (ROOT / "surgeon").rglob("*.py") if not path.name.startswith("__")}
    assert {path.relative_to(ROOT / "surgeon").parts[0].removesuffix(".py") for path in files} == set(order)
    for path in files:
        own = path.relative_to(ROOT / "surgeon").parts[0].removesuffix(".py")
        for node in ast.parse(
            path.read_text(encoding="utf-8")
        ).body:  # not what is imported in a function, or for types
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("surgeon."):
                room = str(node.module).split(".")[1]
                assert order[room] <= order[own], f"{path.name} imports {node.module}"
