"""The commands of `surgeon`, put together; each is a thin function around one that Python can call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from surgeon import __version__
from surgeon.cli import building, foreign, fusing, looking, running, serving, training, writing

app = typer.Typer(
    name="surgeon",
    help="Turn one YAML spec and a pretrained model into one ONNX model and one small weight file per task.\n\n"
    "A first run: `surgeon init lora -o spec.yaml`, `surgeon plan spec.yaml`, `surgeon compile spec.yaml -o build`, "
    "`surgeon train build --task sentiment --data train.csv`, `surgeon run build --task sentiment 'a fine film'`.",
    rich_markup_mode="markdown",
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"surgeon {__version__}")
        raise typer.Exit


@app.callback()
def surgeon(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where in the code an error came from.")] = False,
) -> None:
    """Options before any command; `--traceback` is read where errors are told."""


PANELS: dict[str, tuple[Callable[..., None], ...]] = {
    "Write": (writing.init, writing.list_, writing.schema),
    "Look": (looking.inspect, looking.plan, looking.count),
    "Build": (building.compile_, training.train, fusing.fusion, building.pack),
    "Run": (running.run, serving.serve, building.verify),
    "Exchange": (foreign.import_, foreign.export, foreign.merge),
}
for panel, commands in PANELS.items():
    for command in commands:
        app.command(name=command.__name__.rstrip("_"), rich_help_panel=panel)(command)
