"""Tasks added, replaced, removed and listed over HTTP: off unless the server was given a token."""

from __future__ import annotations

import asyncio
import hmac
import tempfile
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from surgeon.errors import DataError, SpecError, SurgeonError
from surgeon.runtime import TaskInfo
from surgeon.runtime.taskfile import SUFFIX
from surgeon.runtime.tasks import check_name
from surgeon.server.answering import Answering
from surgeon.server.faults import CONFLICT, UNAUTHORIZED, Fault, refused, unknown
from surgeon.server.measuring import Measures
from surgeon.server.speaking import read_body, told

LISTED = 1000


@dataclass(frozen=True)
class Admin:
    """The routes of /admin/tasks. Every one asks for `Authorization: Bearer TOKEN`."""

    answering: Answering
    measures: Measures
    executor: Executor
    token: str
    base: str

    def routes(self) -> list[Route]:
        """All of them."""
        table = [
            ("GET", "/admin/tasks", self.list),
            ("PUT", "/admin/tasks/{name}", self.add),
            ("DELETE", "/admin/tasks/{name}", self.remove),
        ]
        return [Route(path, told(handler, "admin", self.measures), methods=[method]) for method, path, handler in table]

    async def list(self, request: Request) -> Response:
        """Names of tasks, from one on: `?after=NAME&limit=1000`."""
        self._check(request)
        names: list[str] = await self._off(self.answering.session.names)
        after = request.query_params.get("after", "")
        limit = request.query_params.get("limit", str(LISTED))
        if not limit.isdecimal() or len(limit) > 9:
            raise DataError("'limit' is not a number", there_is=limit[:40])
        rest = sorted(name for name in names if name > after)
        return JSONResponse({"tasks": rest[: int(limit)], "total": len(names)})

    async def add(self, request: Request) -> Response:
        """Check the body, a task file, and take it in; `?labels=a,b` or `?label=a&label=b`, `?replace=true`."""
        self._check(request)
        name = request.path_params["name"]
        if name == self.base:
            raise Fault(CONFLICT, f"'{name}' is the name of the base here", try_="another name, or `--base-name`")
        check_name(name)
        query = request.query_params
        replace = query.get("replace", "false").lower()
        if replace not in {"true", "false", "1", "0"}:
            raise DataError("'replace' is true or false", there_is=replace[:40])
        labels = query.getlist("label") or (query["labels"].split(",") if query.get("labels") else None)
        body = await read_body(request, self.answering.limits, self.answering.limits.upload)
        info: TaskInfo = await self._off(self._add, name, labels, body, replace in {"true", "1"})
        request.state.said.update(task=name, bytes=len(body))
        told_ = {"name": name, "labels": info.labels, "sizes": dict(info.sizes), "parameters": info.parameters}
        return JSONResponse(told_, 201)

    async def remove(self, request: Request) -> Response:
        """Remove a task; what runs ends with it."""
        self._check(request)
        name = request.path_params["name"]
        request.state.said.update(task=name)
        try:
            await self._off(self.answering.session.remove_task, name)
        except SpecError as error:
            raise unknown(error) from error
        return Response(status_code=204)

    def _add(self, name: str, labels: Sequence[str] | None, body: bytes, replace: bool) -> TaskInfo:
        with tempfile.TemporaryDirectory(prefix="surgeon-") as folder:
            path = Path(folder, f"upload{SUFFIX}")
            path.write_bytes(body)
            try:
                return self.answering.session.add_task(path, name, labels, replace=replace)
            except SurgeonError as error:
                raise refused(error) from error

    async def _off(self, call: Any, *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.executor, call, *args)

    def _check(self, request: Request) -> None:
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(token.strip().encode(), self.token.encode()):
            raise Fault(UNAUTHORIZED, "the token is missing or wrong", try_="Authorization: Bearer TOKEN")
