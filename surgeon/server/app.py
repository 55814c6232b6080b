"""The server put together: routes over one session, and what happens when it ends."""

from __future__ import annotations

from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass

import anyio.to_thread
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from surgeon.errors import SpecError
from surgeon.runtime import Session
from surgeon.server.admin import Admin
from surgeon.server.answering import BASE, Answering
from surgeon.server.inference import Inference
from surgeon.server.limits import Limits
from surgeon.server.logs import say
from surgeon.server.measuring import Measures
from surgeon.server.page import Page
from surgeon.server.speaking import told
from surgeon.server.writing import Writing

DOORS = 4
"""Threads that read requests and make them ready."""


@dataclass(frozen=True)
class Server:
    """An application, and its ends."""

    app: Starlette
    answering: Answering
    measures: Measures


def make_server(
    session: Session,
    limits: Limits | None = None,
    *,
    resident: int = 64,
    runners: int = 1,
    token: str | None = None,
    base: str = BASE,
) -> Server:
    """An ASGI application over an open session, which stays the caller's. Raises SpecError for a name taken twice."""
    if base in session.names():
        raise SpecError(f"a task is called '{base}', as the base is here", try_="another `--base-name`")
    limits = limits or Limits()
    measures = Measures()
    answering = Answering(session, limits, resident=resident, runners=runners, seen=measures.ran)
    doors = ThreadPoolExecutor(DOORS, "surgeon-doors")
    writing = Writing(answering, measures, base, resident)
    _gauges(measures, answering, writing)
    routes = [
        *Inference(answering, measures, doors, base).routes(),
        *writing.routes(),
        *Page(answering, measures, base, writing).routes(),
        Route("/metrics", told(_metrics(measures), "metrics", measures)),
        *(Admin(answering, measures, doors, token, base).routes() if token else ()),
    ]

    @asynccontextmanager
    async def life(app: Starlette) -> AsyncIterator[None]:
        say("ready", tasks=len(session.names()), mixed=answering.mixed)
        yield
        say("stopping")
        await anyio.to_thread.run_sync(answering.queue.close)
        await anyio.to_thread.run_sync(writing.close)
        doors.shutdown()
        say("stopped")

    app = Starlette(routes=routes, lifespan=life, exception_handlers={404: _nothing, 405: _nothing})
    return Server(app, answering, measures)


def _gauges(measures: Measures, answering: Answering, writing: Writing) -> None:
    measures.gauge("surgeon_queue_rows", "Rows that wait", lambda: answering.queue.load.waiting)
    measures.gauge("surgeon_running_rows", "Rows that run", lambda: answering.queue.load.running)
    measures.gauge("surgeon_writing_texts", "Texts being written, or waiting to be", lambda: writing.waiting)
    measures.gauge("surgeon_writing_together", "Texts that are written together now", lambda: writing.going)
    measures.gauge("surgeon_resident_tasks", "Tasks at hand for mixed batches", lambda: len(answering.session.resident))
    measures.gauge("surgeon_tasks", "Tasks there are", lambda: len(answering.session.names()))


def _metrics(measures: Measures):  # type: ignore[no-untyped-def]
    async def metrics(request: Request) -> Response:
        return Response(measures.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return metrics


async def _nothing(request: Request, error: Exception) -> Response:
    """A path or method that is not served."""
    status = getattr(error, "status_code", 404)
    what = "there is nothing at this path" if status == 404 else f"this path does not take {request.method}"
    return JSONResponse({"error": what}, status, headers=getattr(error, "headers", None))
