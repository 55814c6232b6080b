"""Commands run in this process, on one build that is compiled once."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from surgeon.cli import main


@dataclass(frozen=True)
class Ran:
    """What a command left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The answer of a command with `--json`."""
        return json.loads(self.out)


Command = Callable[..., Ran]
WriteSpec = Callable[..., Path]


def run(*args: object, err: io.StringIO | None = None) -> Ran:
    """Run a command as the console script does."""
    out, err = io.StringIO(), err or io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(arg) for arg in args])
    return Ran(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def surgeon() -> Command:
    """`surgeon("plan", spec)`."""
    return run


@pytest.fixture
def write_spec(base_folder: Path, tmp_path: Path) -> WriteSpec:
    """Write a spec: `surgery` and `tasks` as YAML, over the tiny base unless `base` says another."""

    def write(surgery: str = "[lora: {rank: 2}]", tasks: str = "{mood: {labels: [good, bad]}}", **other: str) -> Path:
        parts = {"base": f"{{model: {base_folder}}}", "surgery": surgery, "tasks": tasks, **other}
        path = tmp_path / "spec.yaml"
        path.write_text("".join(f"{key}: {value}\n" for key, value in parts.items()), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def built(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build of two tasks; to read only."""
    folder = tmp_path_factory.mktemp("built")
    spec = folder / "spec.yaml"
    spec.write_text(
        f"base: {{model: {base_folder}}}\nsurgery: [lora: {{rank: 2}}]\n"
        "tasks: {mood: {labels: [good, bad]}, topic: {labels: 3}}\n"
    )
    ran = run("compile", spec, "-o", folder / "build")
    assert ran.code == 0, ran.err
    return folder / "build"


@pytest.fixture
def build(built: Path, tmp_path: Path) -> Path:
    """The same build, to change."""
    return Path(shutil.copytree(built, tmp_path / "build"))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Forty rows that are easy to learn."""
    words = {"good": ("good", "fine", "great"), "bad": ("bad", "poor", "dull")}
    lines = [f"the film was {word},{label}" for label, some in words.items() for word in some for _ in range(7)]
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "\n".join(lines[:40]) + "\n")
    return path


@contextlib.contextmanager
def untouched(*folders: Path) -> Iterator[None]:
    """Nothing in these folders is added, changed or removed."""

    def look() -> dict[Path, bytes]:
        return {p: p.read_bytes() if p.is_file() else b"" for folder in folders for p in folder.rglob("*")}

    before = look()
    yield
    assert look() == before
