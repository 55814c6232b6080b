"""A build served by replicas of Ray Serve: the same protocol as `surgeon serve`, past one process and one machine.

    serve run deploy.ray.app:app build=build store=tasks replicas=2

A door reads which task a request names and hands it to a replica that has the task at hand (Ray's multiplexing). An
answer changes nothing, so a request whose replica dies is asked again of another.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from surgeon.errors import SurgeonError
from surgeon.runtime import Session, read_manifest
from surgeon.server.app import make_server

TASK = ("v2", "models")
"""Where a path names a task: `/v2/models/NAME/…`."""
AT_HAND = 64
"""Tasks a replica is known for, and holds in memory."""
TRIES = 5
WAITING = 1024
"""Requests that may wait for a replica; above, 429."""


@dataclass(frozen=True)
class Call:
    """An HTTP request, whole."""

    method: str
    path: str
    query: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes

    @property
    def task(self) -> str:
        """The name of the task, or of the base; empty where there is none."""
        parts = self.path.strip("/").split("/")
        return parts[2] if tuple(parts[:2]) == TASK and len(parts) > 2 else ""


@dataclass(frozen=True)
class Reply:
    """An HTTP answer, whole."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


@serve.deployment(max_ongoing_requests=256, max_queued_requests=WAITING, health_check_period_s=2)
class Replica:
    """One session, and Surgeon's server over it, called without a socket."""

    def __init__(self, build: str, store: str | None, threads: int) -> None:
        mixed = "mixed" in read_manifest(build).modes
        self._session = Session(build, threads=threads, resident=AT_HAND, store=store, mixed=mixed)
        self._app = make_server(self._session, resident=AT_HAND).app

    @serve.multiplexed(max_num_models_per_replica=AT_HAND)
    async def at_hand(self, task: str) -> str:
        """Have a task at hand; Ray then prefers this replica for it."""
        with suppress(SurgeonError):  # the server itself says what is wrong with a name
            await asyncio.to_thread(self._session.task, task)
        return task

    async def answer(self, call: Call) -> Reply:
        """Answer a request."""
        if task := serve.get_multiplexed_model_id():
            await self.at_hand(task)
        return await ask(self._app, call)

    def process(self) -> int:
        """The number of the process."""
        return os.getpid()


@serve.deployment(max_ongoing_requests=4096)
class Door:
    """Where requests come in."""

    def __init__(self, replicas: DeploymentHandle) -> None:
        self._replicas = replicas

    async def __call__(self, request: Request) -> Response:
        """Hand a request on, again where its replica died meanwhile."""
        query = request.url.query.encode()
        call = Call(request.method, request.url.path, query, request.headers.raw, await request.body())
        chosen = self._replicas.answer.options(multiplexed_model_id=call.task)
        for left in reversed(range(TRIES)):
            try:
                reply: Reply = await chosen.remote(call)
            except BackPressureError:
                return JSONResponse({"error": "too many requests wait; try: again in a moment"}, 429)
            except RayActorError:
                if not left:
                    return JSONResponse({"error": "no replica answers"}, 503)
                await asyncio.sleep(0.05)
            else:
                return Response(reply.body, reply.status, headers={k.decode(): v.decode() for k, v in reply.headers})
        raise AssertionError


def app(args: Mapping[str, Any]) -> serve.Application:
    """The application: `build`, and where they are wanted `store`, `threads` (of each replica), `replicas`."""
    replicas = Replica.options(num_replicas=int(args.get("replicas", 2)))
    return Door.bind(replicas.bind(str(args["build"]), args.get("store"), int(args.get("threads", 1))))


async def ask(application: Any, call: Call) -> Reply:
    """Call an ASGI application in this process."""
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": call.method, "scheme": "http",
        "path": call.path, "raw_path": call.path.encode(), "query_string": call.query, "root_path": "",
        "headers": call.headers, "client": None, "server": None,
    }  # fmt: skip
    sent: list[Mapping[str, Any]] = []
    asked = iter([{"type": "http.request", "body": call.body, "more_body": False}])

    async def receive() -> Mapping[str, Any]:
        return next(asked, {"type": "http.disconnect"})

    async def send(message: Mapping[str, Any]) -> None:
        sent.append(message)

    await application(scope, receive, send)
    return Reply(sent[0]["status"], list(sent[0]["headers"]), b"".join(part.get("body", b"") for part in sent[1:]))
