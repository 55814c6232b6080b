"""Commands that look and write nothing: the anatomy of a base, the plan of a spec. They read no weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surgeon.cli.screen import Json, emit, note, say, size, steps, table
from surgeon.errors import DataError

if TYPE_CHECKING:
    from surgeon.plan import Plan
    from surgeon.spec import Spec


def inspect(
    model: Annotated[str, typer.Argument(help="A folder, `package:NAME/folder`, a hub id, or a spec (.yaml).")],
    head: Annotated[str | None, typer.Option("--head", help="What the base is loaded for.")] = None,
    json: Json = False,
) -> None:
    """Show what a base is made of: every site that a spec can select, with its role.

    `where: encoder/attention.query@0-5` selects by stack, role and layer. Example: `surgeon inspect path/to/a/model`
    """
    from surgeon.anatomy.report import rows, summary
    from surgeon.compiler import compile

    with steps(silent=json) as progress:
        anatomy = compile(_base_alone(model, head), weights=False, progress=progress).program.anatomy
    found, whole = rows(anatomy), summary(anatomy)
    if json:
        emit({**whole, "sites": found})
        return
    table(
        ("stack", "#layer", "role", "shape", "path"),
        [(row["stack"], row["layer"], row["role"], _shape(row), row["path"]) for row in found],
    )
    layers = ", ".join(f"{count} layers in {stack}" for stack, count in whole["layers"].items())
    say(f"\n{len(found)} sites; {layers or 'no layers'}")
    for weight, count in whole["shared_weights"].items():
        note(f"{weight} is used at {count} sites")
    for text in whole["notes"]:
        note(text)


def _base_alone(model: str, head: str | None) -> Spec:
    from surgeon.spec import read_spec

    if Path(model).suffix in (".yaml", ".yml"):
        spec = read_spec(model)
        base: dict[str, Any] = {} if spec.base is None else spec.base.model_dump(mode="json", exclude_none=True)
    else:
        base = {"model": model}
    return read_spec({"base": base | ({"head": head} if head else {})})


def _shape(row: dict[str, Any]) -> str:
    return f"{row['shape']} [{row['features']}]" if row.get("features") else str(row["shape"])


def plan(
    spec: Annotated[Path, typer.Argument(help="The spec.")],
    rows: Annotated[bool, typer.Option("--rows", help="Show every tensor of its own.")] = False,
    drawn: Annotated[
        Path | None, typer.Option("--picture", help="Draw one layer before and after surgery into this .svg file.")
    ] = None,
    json: Json = False,
) -> None:
    """Show what a spec would insert: sites, trained parameters and bytes. Nothing is written but a picture asked for.

    Sizes are those of one task with as many labels as the base's head has. Example: `surgeon plan spec.yaml`
    """
    from surgeon.compiler import compile
    from surgeon.runtime.manifest import FEWER

    with steps(silent=json) as progress:
        compiled = compile(spec, weights=False, progress=progress)
    found = compiled.plan
    if drawn is not None:
        from surgeon.picture import picture

        drawn.write_text(picture(compiled.program), encoding="utf-8")
    if json:
        emit(found.to_dict())
        return
    if rows:
        table(
            ("technique", "tensor", "shape", "#parameters", "#bytes"),
            [(r.technique, r.name, _sizes(r.shape, r.free), r.parameters, r.bytes) for r in found.rows],
        )
    else:
        table(("technique", "role", "#sites", "#parameters", "#bytes"), _by_role(found))
    share = 100 * found.parameters / found.base_parameters
    say(
        f"\n{found.parameters:,} trained parameters a task, {share:.2f} % of the base's {found.base_parameters:,}; "
        f"{size(found.bytes)} a task file"
    )
    if found.base_bytes < found.checkpoint_bytes:
        say(f"the base is held in {size(found.base_bytes)} instead of {size(found.checkpoint_bytes)}")
    for form, (stay, go) in found.blocks.items():
        said = [f"{stay} stay as they are in the ONNX model"] * bool(stay) + [f"{go} are dequantised for it"] * bool(go)
        say(f"of the file's matrices in {form} {', '.join(said)}")
    if found.weights == "base-rounded":
        say("their products' inputs are rounded to 8 bits: approximate answers, which the rows beside one may change")
    elif found.weights in FEWER:
        say(f"the ONNX model holds the base's matrices in {found.weights}: another base, with approximate answers")


def count(
    techniques: Annotated[
        list[str] | None, typer.Argument(metavar="[TECHNIQUE]...", help="Techniques to count; by default all.")
    ] = None,
    whole: Annotated[bool, typer.Option("--whole", help="Compile every layer of every model; many minutes.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the page of the docs.")] = False,
    json: Json = False,
) -> None:
    """Count the papers' own configurations, without weights, beside what the papers print.

    The exit code is 1 where a number that should come out as printed does not. Example: `surgeon count lora`
    """
    from surgeon.counts import count_rows, page, to_dict, verdict

    with steps(silent=json) as progress:
        rows = list(count_rows(techniques or (), whole=whole, report=progress))
    if json:
        emit([to_dict(row) for row in rows])
    elif markdown:
        print(page(rows), end="")
    else:
        columns = ("paper", "configuration", "#printed", "#counted", "#of the base", "agrees")
        shown = [(r.paper, r.configuration, r.printed, f"{r.counted:,}", f"{r.share:.3%}", verdict(r)) for r in rows]
        table(columns, shown)
        said = "" if whole else "; counted on one and two layers of each stack"
        say(f"\n{sum(row.agrees for row in rows)} of {len(rows)} come out as printed{said}")
    if missed := [row for row in rows if not row.reproduces]:
        raise DataError(
            f"{len(missed)} of {len(rows)} numbers come out other than known",
            there_is="; ".join(f"{r.configuration}: {r.printed} printed, {r.counted:,} counted" for r in missed),
            try_="this is a bug in Surgeon, or the row's reason no longer holds",
        )


def _by_role(found: Plan) -> Iterable[tuple[str, str, int, int, int]]:
    groups: dict[tuple[str, str], tuple[set[str], int, int]] = {}
    for row in found.rows:
        sites, parameters, count = groups.get((row.technique, row.role), (set(), 0, 0))
        groups[row.technique, row.role] = (sites | {row.site} - {""}, parameters + row.parameters, count + row.bytes)
    for (technique, role), (sites, parameters, count) in groups.items():
        yield technique, role or "trained, then folded away", len(sites), parameters, count


def _sizes(shape: tuple[int, ...], free: dict[int, str]) -> str:
    """`16×8*`: a star marks the axes whose size is free."""
    return "×".join(f"{count}*" if axis in free else str(count) for axis, count in enumerate(shape))
