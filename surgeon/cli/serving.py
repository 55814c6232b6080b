"""The command that serves a build over HTTP. It needs the runtime and the extra `serve`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from surgeon.errors import SpecError

TOKEN = "SURGEON_ADMIN_TOKEN"


def serve(
    build: Annotated[Path, typer.Argument(help="The directory that `surgeon compile` wrote.")],
    *,
    store: Annotated[
        str | None, typer.Option("--store", help="A folder or URL of task files, read while they come and go.")
    ] = None,
    host: Annotated[str, typer.Option("--host", help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes any that is free.")] = 8000,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads of a batch.")] = None,
    runners: Annotated[int, typer.Option("--runners", min=1, help="Batches that run at once.")] = 1,
    resident: Annotated[int, typer.Option("--resident", min=1, help="Tasks at hand at once.")] = 64,
    tune: Annotated[
        bool, typer.Option("--tune", help="Measure at the start which of ONNX Runtime's fusions help here.")
    ] = False,
    base_name: Annotated[str, typer.Option("--base-name", help="The model's name that asks for no task.")] = "base",
    wait: Annotated[float, typer.Option("--wait", min=0, help="Milliseconds to wait for others.")] = 2.0,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Rows that run together.")] = 32,
    queue: Annotated[int, typer.Option("--queue", min=1, help="Rows that may wait; above, 429.")] = 1024,
    body: Annotated[float, typer.Option("--body", min=0.001, help="MB of one request; above, 413.")] = 8.0,
    deadline: Annotated[float, typer.Option("--deadline", min=0.001, help="Seconds to an answer; above, 504.")] = 30.0,
    texts: Annotated[int, typer.Option("--texts", min=1, help="Texts written together, with the mode mixed.")] = 8,
    writers: Annotated[int, typer.Option("--writers", min=1, help="Requests that write at once without it.")] = 2,
    grace: Annotated[float, typer.Option("--grace", min=1, help="Seconds for what is under way at the end.")] = 30.0,
    token_file: Annotated[
        Path | None,
        typer.Option("--admin-token-file", help=f"Turns the admin routes on; so does {TOKEN} in the environment."),
    ] = None,
    log: Annotated[str, typer.Option("--log", help="debug, info, warning or error.")] = "info",
) -> None:
    """Serve a build over HTTP: the Open Inference Protocol, OpenAI's completions, metrics, and a page to try it.

    Every task is a model of its own name. Requests of all tasks share batches where the build has the mode `mixed`.

    Example: `surgeon serve build --store tasks --port 8000`
    """
    from surgeon.server.limits import Limits
    from surgeon.server.run import serve as run

    if log not in {"debug", "info", "warning", "error"}:
        raise SpecError(f"there is no log level '{log}'", there_is="debug, info, warning, error")
    limits = Limits(
        wait=wait / 1000,
        batch=batch,
        queue=queue,
        body=int(body * 1e6),
        deadline=deadline,
        grace=grace,
        texts=texts,
        writers=writers,
    )
    run(
        build,
        store=store,
        host=host,
        port=port,
        threads=threads,
        resident=resident,
        runners=runners,
        tune=tune,
        token=_token(token_file),
        base=base_name,
        limits=limits,
        level=log,
    )


def _token(path: Path | None) -> str | None:
    """A secret is no option: everybody on a machine can read those."""
    token = os.environ.get(TOKEN) if path is None else path.read_text().strip()
    if token is not None and len(token) < 8:
        raise SpecError("the admin token is too short", there_is=f"{len(token)} characters", try_="at least 8")
    return token
