"""The command that runs a build. It needs the runtime alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from surgeon.cli.screen import Json, emit, table


def run(
    build: Annotated[Path, typer.Argument(help="The directory that `surgeon compile` wrote.")],
    texts: Annotated[
        list[str], typer.Argument(metavar="TEXT...", help="Texts; `-` reads them from stdin, one a line.")
    ],
    *,
    task: Annotated[
        str | None, typer.Option("--task", "-t", help="The task; without one the base itself answers.")
    ] = None,
    drop: Annotated[
        int, typer.Option("--drop", min=0, help="Leave out the adapters of so many of the lowest layers.")
    ] = 0,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads.")] = None,
    json: Json = False,
) -> None:
    """Classify texts with a task of a build. Neither torch nor transformers is needed.

    Example: `surgeon run build --task sentiment "a fine film" "a waste of time"`
    """
    from surgeon.runtime import Session

    given = [line for text in texts for line in (sys.stdin.read().splitlines() if text == "-" else [text])]
    with Session(build, threads=threads) as session:
        found = session.classify(given, task, drop=drop)
    if json:
        emit(
            [
                {"text": text, "label": answer.label, "score": answer.score, "scores": dict(answer.scores)}
                for text, answer in zip(given, found, strict=True)
            ]
        )
    else:
        table(
            ("label", "#score", "text"),
            [(answer.label, f"{answer.score:.3f}", text) for text, answer in zip(given, found, strict=True)],
        )
