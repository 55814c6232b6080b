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


def run(*args: object, err: io.StringIO | None = None) -> Ran:
    """Run a command as the console script does; `err` may listen to its stderr."""
    out, err = io.StringIO(), err or io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(arg) for arg in args])
    return Ran(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def surgeon() -> Callable[..., Ran]:
    """`surgeon("plan", spec)`."""
    return run


@pytest.fixture
def refused(surgeon: Callable[..., Ran]) -> Callable[..., str]:
    """Run a command that must fail with this exit code and say these words, and nothing on stdout; returns stderr."""

    def check(code: int, words: tuple[str, ...], *args: object) -> str:
        ran = surgeon(*args)
        assert ran.code == code, ran.err
        assert ran.out == ""
        assert "Traceback" not in ran.err
        assert "internal error" not in ran.err
        for word in words:
            assert word in ran.err
        return ran.err

    return check


@pytest.fixture
def write_spec(base_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """Write a spec: each part as YAML, over the tiny base unless `base` says another."""

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
    """Forty-two rows that are easy to learn."""
    words = {"good": ("good", "fine", "great"), "bad": ("bad", "poor", "dull")}
    lines = [f"the film was {word},{label}" for label, some in words.items() for word in some for _ in range(7)]
    path = tmp_path / "rows.csv"
    path.write_text("\n".join(["text,label", *lines]) + "\n")
    return path


@pytest.fixture
def unchanged() -> Callable[..., contextlib.AbstractContextManager[None]]:
    """`with unchanged(folder)`: nothing in it is added, changed or removed."""

    @contextlib.contextmanager
    def watch(folder: Path) -> Iterator[None]:
        def look() -> dict[str, bytes]:
            return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}

        before = look()
        yield
        assert look() == before

    return watch
