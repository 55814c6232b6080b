"""`surgeon serve`: the application on uvicorn, until somebody asks it to stop."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from surgeon.errors import SpecError
from surgeon.runtime import Session, read_manifest
from surgeon.server.answering import BASE
from surgeon.server.app import Server, make_server
from surgeon.server.limits import Limits
from surgeon.server.logs import open_log, say

BACKLOG = 2048


class Patient(HttpToolsProtocol):
    """A connection that is closed where no request begins in time: one that only stays open costs a place."""

    patience = 10.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there."""
        super().connection_made(transport)
        self._late = self.loop.call_later(self.patience, self._give_up)

    def _give_up(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.close()


class Stoppable(uvicorn.Server):
    """A signal that asked for the end, and got it, is done with: uvicorn would raise it once more."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End what is under way."""
        await super().shutdown(sockets)
        self._captured_signals.clear()


def serve(
    build: str | Path,
    *,
    store: str | Path | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    threads: int | None = None,
    resident: int = 64,
    runners: int = 1,
    tune: bool = False,
    token: str | None = None,
    base: str = BASE,
    limits: Limits | None = None,
    level: str = "info",
) -> None:
    """Serve a build until SIGTERM or SIGINT. What was taken in before is answered; nothing is taken in after.

    With `tune` it measures at the start which of ONNX Runtime's fusions help. Raises SpecError where the address is
    taken.
    """
    limits = limits or Limits()
    open_log(level)
    listening = listen(host, port)
    try:
        mixed = "mixed" in read_manifest(build).modes
        opened = Session.tuned if tune else Session
        with opened(build, threads=threads, resident=resident, store=store, mixed=mixed) as session:
            server = make_server(session, limits, resident=resident, runners=runners, token=token, base=base)
            say("listening", host=host, port=listening.getsockname()[1], build=str(build), fusions=session.fusions)
            Stoppable(configure(server, limits)).run(sockets=[listening])
    finally:
        listening.close()


def configure(server: Server, limits: Limits) -> uvicorn.Config:
    """How uvicorn runs the application."""
    return uvicorn.Config(
        server.app,
        http=type("Patient", (Patient,), {"patience": limits.patience}),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=limits.connections,
        backlog=BACKLOG,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=int(limits.grace),
    )


def listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise SpecError(
            f"cannot listen on {host}:{port}: {error.strerror}", try_="another --port, or 0 for any that is free"
        ) from error
    return listening
