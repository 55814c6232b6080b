"""The command that looks at a fusion of adapters, and makes it smaller."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from surgeon.cli.building import Build, Task
from surgeon.cli.screen import Json, emit, note, say, steps, table

if TYPE_CHECKING:
    from surgeon.train.mixtures import Mixture


def fusion(
    build: Build,
    task: Task,
    data: Annotated[
        Path, typer.Option("--data", help="Texts to look at: .csv, .tsv or .jsonl; the training data, say.")
    ],
    *,
    keep: Annotated[
        int | None, typer.Option("--keep", help="Pack the task again with so many adapters a layer: the heaviest.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Draw a heat map here, as SVG.")] = None,
    text_column: Annotated[str, typer.Option("--text-column", help="Column of the text.")] = "text",
    max_length: Annotated[int, typer.Option("--max-length", min=1, help="Tokens of a text that are kept.")] = 128,
    json: Json = False,
) -> None:
    """Show how much each fused adapter weighs in each layer of a task, and leave out those that weigh least.

    Weights are means of the attention over all tokens of the texts. Layers may keep different adapters.

    Example: `surgeon fusion build --task sentiment --data train.csv -o heat.svg`
    """
    from surgeon.picture.heat import heat
    from surgeon.train.mixtures import build_mixtures

    with steps(silent=json) as report:
        found = build_mixtures(
            build, task, data, keep=keep, text_column=text_column, max_length=max_length, report=report
        )
    columns = [(_heading(one, found), one.weights) for one in found]
    if out is not None:
        out.write_text(heat(f"Attention over adapters: {task}", columns), encoding="utf-8")
        note(f"wrote {out}")
    if json:
        rows = [{"site": o.site, "stack": o.stack, "layer": o.layer, "weights": dict(o.weights)} for o in found]
        emit({"build": str(build), "task": task, "sites": rows})
        return
    names = list(dict.fromkeys(name for one in found for name in one.weights))
    cells = [[f"{one.weights[name]:.3f}" if name in one.weights else "" for name in names] for one in found]
    table(("site", *(f"#{name}" for name in names)), [(o.site, *row) for o, row in zip(found, cells, strict=True)])
    if keep is not None:
        say(f"\npacked '{task}' into {build}: {keep} adapters a layer")


def _heading(one: Mixture, found: tuple[Mixture, ...]) -> str:
    layer = "" if one.layer is None else str(one.layer)
    return layer if len({other.stack for other in found}) == 1 else f"{one.stack[:3]} {layer}"
