"""The Open Inference Protocol v2 over HTTP: every task is a model, and so is the base."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from surgeon import __version__
from surgeon.errors import DataError, SpecError, shorten
from surgeon.runtime import TaskInfo
from surgeon.runtime.manifest import TOKENIZER
from surgeon.server.answering import LABEL, SCORE, TEXT, Answering
from surgeon.server.faults import NOT_FOUND, Fault, unknown
from surgeon.server.gathering import Outputs, late
from surgeon.server.measuring import Measures
from surgeon.server.speaking import read_body, told
from surgeon.server.tensors import NAMES, Asked, read_request, write_response

VERSION = "1"
HEADER = "inference-header-content-length"
EXTENSIONS = ("binary_tensor_data", "model_repository")
LISTED = 20_000
"""Models that the index lists."""


@dataclass(frozen=True)
class Inference:
    """The routes of /v2. `base` is the name of the model without a task."""

    answering: Answering
    measures: Measures
    executor: Executor
    base: str

    def routes(self) -> list[Route]:
        """All of them; those with a version are the same."""
        model, versions = "/v2/models/{name}", "/v2/models/{name}/versions/{version}"
        table: list[tuple[str, str, Any, str]] = [
            ("GET", "/v2", self.server, "metadata"),
            ("GET", "/v2/", self.server, "metadata"),
            ("GET", "/v2/health/live", self.live, "health"),
            ("GET", "/v2/health/ready", self.ready, "health"),
            ("POST", "/v2/repository/index", self.index, "metadata"),
        ]
        for prefix in (model, versions):
            table += [
                ("GET", prefix, self.model, "metadata"),
                ("GET", f"{prefix}/ready", self.model_ready, "health"),
                ("POST", f"{prefix}/infer", self.infer, "infer"),
            ]
        return [
            Route(path, told(handler, route, self.measures), methods=[method]) for method, path, handler, route in table
        ]

    async def server(self, request: Request) -> Response:
        """What server this is."""
        return JSONResponse({"name": "surgeon", "version": __version__, "extensions": list(EXTENSIONS)})

    async def live(self, request: Request) -> Response:
        """Whether the process answers."""
        return JSONResponse({"live": True})

    async def ready(self, request: Request) -> Response:
        """Whether requests are taken in."""
        ready = not self.answering.queue.closed
        return JSONResponse({"ready": ready}, 200 if ready else 503)

    async def index(self, request: Request) -> Response:
        """The models there are, in Triton's form."""
        await read_body(request, self.answering.limits)
        names = await self._off(self.answering.session.names)
        return JSONResponse(
            [
                {"name": name, "version": VERSION, "state": "READY", "reason": ""}
                for name in [self.base, *names][:LISTED]
            ]
        )

    async def model(self, request: Request) -> Response:
        """Inputs and outputs of a model, and its labels."""
        task, info = await self._off(self._named, request.path_params)
        return JSONResponse(self._metadata(task, info))

    async def model_ready(self, request: Request) -> Response:
        """Whether there is such a model."""
        await self._off(self._named, request.path_params)
        return JSONResponse({"ready": True})

    async def infer(self, request: Request) -> Response:
        """Answer rows."""
        begun = time.monotonic()
        body = await read_body(request, self.answering.limits)
        asked, job = await self._off(self._admit, request.path_params, body, request.headers.get(HEADER), begun)
        request.state.said.update(task=job.task, rows=job.rows)
        try:
            async with asyncio.timeout(max(job.deadline - time.monotonic(), 0)):
                outputs = await asyncio.wrap_future(self.answering.queue.submit(job))
        except TimeoutError as error:
            raise late() from error
        return self._response(job.task, asked, outputs)

    async def _off(self, call: Any, *args: Any) -> Any:
        """What takes a file's or a tokenizer's time runs beside the loop."""
        return await asyncio.get_running_loop().run_in_executor(self.executor, call, *args)

    def _admit(self, path: Mapping[str, str], body: bytes, header: str | None, begun: float) -> Any:
        asked = read_request(body, header)
        task, _ = self._named(path, asked.parameters)
        if asked.outputs is not None:
            known = self._outputs()
            unknown_ = [wanted.name for wanted in asked.outputs if wanted.name not in known]
            if unknown_:
                raise DataError(f"there is no output '{unknown_[0]}'", there_is=shorten(known))
        return asked, self.answering.admit(asked.inputs, task, begun + self._patience(asked.parameters))

    def _named(
        self, path: Mapping[str, str], parameters: Mapping[str, Any] | None = None
    ) -> tuple[str | None, TaskInfo | None]:
        """The task that a path, or the parameter `task` beside the base's name, names. Raises Fault."""
        name = path["name"]
        if path.get("version", VERSION) != VERSION:
            raise Fault(NOT_FOUND, f"model '{name[:80]}' has no such version", there_is=f"version {VERSION}")
        asked = (parameters or {}).get("task")
        if asked is not None:
            if not isinstance(asked, str):
                raise DataError("the parameter 'task' is not a name")
            if name not in {self.base, asked}:
                raise DataError(f"the model is '{name}', and the parameter 'task' is '{asked}'", try_="one of them")
            name = asked
        if name == self.base:
            return None, None
        try:
            return name, self.answering.info(name)
        except SpecError as error:
            raise unknown(error) from error

    def _patience(self, parameters: Mapping[str, Any]) -> float:
        """The deadline in seconds: the server's, or that of the request in microseconds where it is less."""
        own = parameters.get("timeout")
        if own is None:
            return self.answering.limits.deadline
        if type(own) is not int or own <= 0:
            raise DataError("the parameter 'timeout' is not a number of microseconds", there_is=repr(own)[:80])
        return min(self.answering.limits.deadline, own / 1e6)

    def _outputs(self) -> list[str]:
        extra = [LABEL, SCORE] if self.answering.classifies else []
        cache = self.answering.session.manifest.generation
        inside = set() if cache is None else {tensor.present for tensor in cache.cache}
        return [port.name for port in self.answering.session.manifest.outputs if port.name not in inside] + extra

    def _metadata(self, task: str | None, info: TaskInfo | None) -> dict[str, Any]:
        manifest = self.answering.session.manifest
        inputs = [_port(port.name, port.dtype, port.axes) for port in manifest.inputs]
        if TOKENIZER in manifest.files:
            inputs.append({"name": TEXT, "datatype": "BYTES", "shape": [-1]})
        inside = set(self._outputs())
        outputs = [_port(port.name, port.dtype, port.axes) for port in manifest.outputs if port.name in inside]
        if self.answering.classifies:
            outputs.append({"name": LABEL, "datatype": "BYTES", "shape": [-1]})
            outputs.append({"name": SCORE, "datatype": "FP32", "shape": [-1]})
        return {
            "name": self.base if task is None else task,
            "versions": [VERSION],
            "platform": "surgeon_onnxruntime",
            "inputs": inputs,
            "outputs": outputs,
            "parameters": {} if info is None or info.labels is None else {"labels": list(info.labels)},
        }

    def _response(self, task: str | None, asked: Asked, outputs: Outputs) -> Response:
        binary = dict.fromkeys(outputs, asked.binary)
        if asked.outputs is not None:
            binary = {wanted.name: wanted.binary for wanted in asked.outputs}
            outputs = {name: outputs[name] for name in binary}
        head = {"model_name": self.base if task is None else task, "model_version": VERSION}
        if asked.id is not None:
            head["id"] = asked.id
        body, length = write_response(head, outputs, binary)
        kind = "application/json" if length is None else "application/octet-stream"
        return Response(body, media_type=kind, headers={} if length is None else {HEADER: str(length)})


def _port(name: str, dtype: str, axes: tuple[str | int, ...]) -> dict[str, Any]:
    return {"name": name, "datatype": NAMES[dtype], "shape": [a if isinstance(a, int) else -1 for a in axes]}
