"""The page at `/`, and what it shows: tasks, load and latency."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from surgeon.errors import SurgeonError
from surgeon.runtime import TaskInfo
from surgeon.runtime.manifest import TEMPLATE, TOKENIZER
from surgeon.server.answering import Answering
from surgeon.server.measuring import Measures
from surgeon.server.speaking import told

KINDS = {"index.html": "text/html", "page.js": "text/javascript", "page.css": "text/css"}
HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}
SHOWN = 50
"""Tasks that the page shows at once; a search finds the others."""


@dataclass(frozen=True)
class Page:
    """The routes of the page; `/status` is what it reads every two seconds."""

    answering: Answering
    measures: Measures
    base: str
    writing: Any

    def routes(self) -> list[Route]:
        """The page, its script and its looks, each from this server."""
        made = [Route("/status", told(self.status, "page", self.measures))]
        for name in KINDS:
            path = "/" if name == "index.html" else f"/{name}"
            made.append(Route(path, told(self._file(name), "page", self.measures)))
        return made

    async def status(self, request: Request) -> Response:
        """Tasks (those that a search finds), load and latency."""
        search = request.query_params.get("search", "")[:200]
        return JSONResponse(await asyncio.to_thread(self._status, search), headers={"cache-control": "no-store"})

    def _status(self, search: str) -> Mapping[str, Any]:
        session, manifest = self.answering.session, self.answering.session.manifest
        infos = session.tasks
        names = list(infos)
        found = [name for name in names if search.casefold() in name.casefold()]
        load = self.answering.queue.load
        return {
            "build": {"base": manifest.base.source, "architecture": manifest.base.architecture},
            "name": self.base,
            "classifies": self.answering.classifies and TOKENIZER in manifest.files,
            "writes": manifest.generation is not None and TOKENIZER in manifest.files,
            "chat": TEMPLATE in manifest.files,
            "tasks": [_task(infos, name) for name in found[:SHOWN]],
            "found": len(found),
            "total": len(names),
            "resident": len(session.resident),
            "load": {"waiting": load.waiting, "running": load.running, "writing": self.writing.waiting},
            "latency": self.measures.recent(),
        }

    def _file(self, name: str) -> Any:
        data = files("surgeon.server").joinpath("static", name).read_bytes()

        async def send(request: Request) -> Response:
            return Response(data, media_type=KINDS[name], headers=HEADERS)

        return send


def _task(infos: Mapping[str, TaskInfo], name: str) -> dict[str, Any]:
    try:
        info = infos[name]
    except SurgeonError as error:  # removed since it was listed, or damaged: to be seen, not to be silent
        return {"name": name, "fault": error.what}
    return {"name": name, "labels": info.labels, "parameters": info.parameters, "sizes": dict(info.sizes)}
