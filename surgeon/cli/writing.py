"""Commands for whoever writes a spec: a commented start, the techniques there are, the schema for an editor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from surgeon.cli.screen import Json, emit, note, say, table
from surgeon.errors import BuildError


def init(
    technique: Annotated[str, typer.Argument(help="A technique, or several joined by `+`, applied in that order.")],
    base: Annotated[
        str | None, typer.Option("--base", help="The base: a folder, `package:NAME/folder`, a hub id.")
    ] = None,
    head: Annotated[str | None, typer.Option("--head", help="What the base is loaded for.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the spec here instead of printing it.")] = None,
) -> None:
    """Print a commented spec to start from: every option with its default and what it does.

    Example: `surgeon init lora+bitfit --base path/to/a/model -o spec.yaml`
    """
    from surgeon.template import template

    text = template(technique.split("+"), base=base, head=head)
    if out is None:
        print(text, end="")
        return
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise BuildError("there is a file of that name already", where=str(out), try_="another name") from error
    note(f"wrote {out}; `surgeon plan {out}` shows what it would insert")


def list_(
    json: Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
) -> None:
    """List the techniques there are, those of installed plug-ins included.

    "Identity" says that a fresh task answers exactly as the base does. Example: `surgeon list --json`
    """
    from surgeon import catalog

    known = catalog.techniques()
    if json:
        emit([one.to_dict() for one in known])
    elif markdown:
        say(catalog.markdown(known))
    else:
        rows = [
            (t.name, t.title, t.paper, "yes" if t.identity_at_birth else "no", ", ".join(o.name for o in t.options))
            for t in known
        ]
        table(("technique", "title", "paper", "identity", "options"), rows)


def schema() -> None:
    """Print the JSON schema of a spec, with which an editor completes and checks it.

    Example: `surgeon schema > surgeon.schema.json`, and `# yaml-language-server: $schema=surgeon.schema.json` as the
    first line of the spec.
    """
    from surgeon.spec import json_schema

    emit(json_schema())
