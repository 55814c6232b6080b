"""What a command says: its answer on stdout, everything else on stderr; tables for people, JSON for machines."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from surgeon.errors import SurgeonError

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines; errors too, on stderr.")]

WIDE = 1000
"""Columns where the output is no terminal: a table is then as wide as it needs, and nothing is cut."""


def console(*, stderr: bool = False) -> Console:
    """A console on the stream as it is now."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, highlight=False, width=None if stream.isatty() else WIDE)


def say(text: str) -> None:
    """A line of the answer."""
    console().print(Text(text), soft_wrap=True)


def note(text: str) -> None:
    """A line beside the answer."""
    console(stderr=True).print(Text(text, style="dim"), soft_wrap=True)


def emit(document: Any) -> None:
    """The answer as JSON."""
    print(json.dumps(document, indent=2, ensure_ascii=False))


def show_error(error: SurgeonError, *, machine: bool) -> None:
    """An error on stderr, for a person or a machine."""
    if machine:
        print(json.dumps(error.to_dict(), ensure_ascii=False), file=sys.stderr)
        return
    first, _, rest = error.render().partition("\n")
    told = Text(first, style="bold red").append(f"\n{rest}" if rest else "", style="not bold default")
    console(stderr=True).print(told, soft_wrap=True)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str | None = None) -> None:
    """The answer as a table. A column whose name starts with `#` holds numbers."""
    shown = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for name in columns:
        shown.add_column(name.removeprefix("#"), justify="right" if name.startswith("#") else "left", overflow="fold")
    for row in rows:
        shown.add_row(*(Text(cell(value)) for value in row))
    console().print(shown)


def cell(value: object) -> str:
    """A value as a table shows it."""
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.3g}"
    return str(value)


def size(count: int) -> str:
    """Bytes in the unit that reads best."""
    amount = float(count)
    for unit in ("B", "KB", "MB", "GB"):
        if amount < 1000 or unit == "GB":
            break
        amount /= 1000
    return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"


class Steps:
    """Progress of a long command on stderr: the step under way, and how long each one took."""

    def __init__(self) -> None:
        self._console = console(stderr=True)
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        self._bars = Progress(*columns, console=self._console, transient=True)
        self._bar: TaskID | None = None
        self._step = ""
        self._since = 0.0

    def __call__(self, step: str) -> None:
        """The next step begins."""
        self._finish()
        self._step, self._since = step, time.perf_counter()
        self._bar = self._bars.add_task(step, total=None)

    def advance(self, what: str, done: int, total: int) -> None:
        """How far the step under way is."""
        if self._bar is not None:
            self._bars.update(self._bar, description=what, completed=done, total=total)

    def _finish(self) -> None:
        if self._bar is not None:
            self._bars.remove_task(self._bar)
            self._console.print(Text(f"{time.perf_counter() - self._since:6.1f} s  {self._step}", style="dim"))
        self._bar = None

    def __enter__(self) -> Steps:
        if self._console.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._finish()
        if self._console.is_terminal:
            self._bars.stop()


@contextmanager
def steps(*, silent: bool) -> Iterator[Steps | None]:
    """Progress for `progress=` of a long function; None where only the answer is wanted."""
    if silent:
        yield None
        return
    with Steps() as shown:
        yield shown
