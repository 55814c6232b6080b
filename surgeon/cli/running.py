"""The command that runs a build. It needs the runtime alone."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surgeon.cli.screen import Json, emit, note, say, table
from surgeon.errors import SpecError

if TYPE_CHECKING:
    from surgeon.runtime import Session


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
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Write at most so many tokens.")] = 64,
    temperature: Annotated[float, typer.Option("--temperature", min=0, help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option("--top-k", min=1, help="Draw from so many likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", help="Draw from the fewest with so much together.")] = None,
    penalty: Annotated[float, typer.Option("--repetition-penalty", help="Above 1, repeat less.")] = 1.0,
    stop: Annotated[list[str], typer.Option("--stop", help="End before this string; may be given again.")] = [],  # noqa: B006
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of what is drawn.")] = 0,
    beams: Annotated[int, typer.Option("--beams", min=1, help="Search so wide (encoder-decoders).")] = 1,
    length_penalty: Annotated[float, typer.Option("--length-penalty", help="Above 1, beams like long texts.")] = 1.0,
    chat: Annotated[
        bool, typer.Option("--chat", help="Each text is a user's message in the base's chat form.")
    ] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Print the text as it is written.")] = False,
    json: Json = False,
) -> None:
    """Classify texts with a task of a build, or go on writing them. Neither torch nor transformers is needed.

    A build that was compiled with `generate: true` writes; options of writing are read there alone.

    Example: `surgeon run build --task sentiment "a fine film" "a waste of time"`
    """
    from surgeon.runtime import Session

    given = [line for text in texts for line in (sys.stdin.read().splitlines() if text == "-" else [text])]
    writes = {
        "max_new_tokens": tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "repetition_penalty": penalty,
        "stop": stop,
        "seed": seed,
        "beams": beams,
        "length_penalty": length_penalty,
        "drop": drop,
    }
    if json and stream:
        raise SpecError("--json prints a whole answer, --stream what there is of it", try_="one of the two")
    with Session(build, threads=threads) as session:
        if session.manifest.generation is not None or stream or chat:
            _write(session, given, task, writes, chat=chat, stream=stream, json=json)
            return
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


def _write(
    session: Session,
    given: Sequence[str],
    task: str | None,
    options: dict[str, Any],
    *,
    chat: bool,
    stream: bool,
    json: bool,
) -> None:
    """Print what is written after each text; with `stream` one after the other, as it comes."""
    prompts = [[{"role": "user", "content": text}] if chat else text for text in given]
    if not stream:
        found = session.generate(prompts, task, **options)
        if json:
            emit(
                [
                    {"prompt": text, "text": row.text, "tokens": list(row.tokens), "reason": row.reason}
                    for text, row in zip(given, found, strict=True)
                ]
            )
        else:
            for row in found:
                say(row.text)
        return
    for number, prompt in enumerate(prompts):
        drawn = {**options, "seed": options["seed"] + number}
        try:
            row = session.generate([prompt], task, stream=lambda _, piece: print(piece, end="", flush=True), **drawn)[0]
        finally:
            print(flush=True)
        if row.reason == "length":
            note(f"cut after {len(row.tokens)} tokens")
