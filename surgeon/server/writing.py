"""Texts over OpenAI's protocol: /v1/completions and /v1/chat/completions, whole or as they are written."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from surgeon.errors import SpecError
from surgeon.runtime.generation import Prompt, Written
from surgeon.runtime.manifest import TEMPLATE, TOKENIZER
from surgeon.server.answering import Answering
from surgeon.server.asking import Ask, read_ask
from surgeon.server.faults import BUSY, UNAVAILABLE, Fault, openai, unknown
from surgeon.server.gathering import late
from surgeon.server.logs import say
from surgeon.server.measuring import Measures
from surgeon.server.scribe import Order, Scribe
from surgeon.server.speaking import read_body, told
from surgeon.server.tensors import read_json

End = Callable[[list[Written] | Exception], None]
REASONS = {"end": "stop", "stop": "stop", "length": "length"}


class GoneError(Exception):
    """Nobody waits for the text any more."""


@dataclass
class Pieces:
    """What a writing thread hands to the loop: pieces, then the rows or an error."""

    deadline: float
    loop: asyncio.AbstractEventLoop
    queue: asyncio.Queue[tuple[int, str] | list[Written] | Exception] = field(default_factory=asyncio.Queue)
    gone: threading.Event = field(default_factory=threading.Event)

    def listen(self, row: int, piece: str) -> None:
        """Called by the session for every piece; raising here ends the writing."""
        self.check()
        self.put((row, piece))

    def check(self) -> None:
        """Raises where nobody waits or the time is over."""
        if self.gone.is_set():
            raise GoneError
        if time.monotonic() > self.deadline:
            raise late()

    def put(self, item: tuple[int, str] | list[Written] | Exception) -> None:
        """From the thread to the loop."""
        self.loop.call_soon_threadsafe(self.queue.put_nowait, item)


class Writing:
    """The routes of /v1. Rows of all requests go on together where the build has the mode `mixed`.

    Elsewhere each request has a thread of its own; few run at once, and the others wait.
    """

    def __init__(self, answering: Answering, measures: Measures, base: str, resident: int) -> None:
        self._answering, self._session = answering, answering.session
        self._measures, self._base = measures, base
        self._limits = answering.limits
        self._threads = ThreadPoolExecutor(self._limits.writers, "surgeon-writes")
        together = self._session.manifest.writes_several
        self._scribe = Scribe(self._session, min(self._limits.texts, resident)) if together else None
        self.waiting = 0

    @property
    def going(self) -> int:
        """Texts that are written together."""
        return 0 if self._scribe is None else self._scribe.going

    def routes(self) -> list[Route]:
        """All of them."""
        table = [
            ("GET", "/v1/models", self.models, "metadata"),
            ("POST", "/v1/completions", self.completions, "completions"),
            ("POST", "/v1/chat/completions", self.chat, "chat"),
        ]
        return [Route(p, told(h, r, self._measures, openai), methods=[m]) for m, p, h, r in table]

    def close(self) -> None:
        """End what is under way, and nothing of it is lost."""
        if self._scribe is not None:
            self._scribe.close()
        self._threads.shutdown(wait=True)

    async def models(self, request: Request) -> Response:
        """The base and every task."""
        names = await asyncio.to_thread(self._session.names)
        entry = {"object": "model", "created": 0, "owned_by": "surgeon"}
        return JSONResponse({"object": "list", "data": [{"id": name, **entry} for name in [self._base, *names]]})

    async def completions(self, request: Request) -> Response:
        """Go on from prompts."""
        return await self._write(request, chat=False)

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        return await self._write(request, chat=True)

    async def _write(self, request: Request, *, chat: bool) -> Response:
        begun = time.monotonic()
        if self._session.manifest.generation is None:
            raise SpecError("this build does not write texts", try_="compile it with `export: {generate: true}`")
        if chat and TEMPLATE not in self._session.manifest.files:
            raise SpecError("this base has no chat template, so it takes no conversations", try_="/v1/completions")
        ask = read_ask(read_json(await read_body(request, self._limits)), chat=chat)
        task = None if ask.model == self._base else ask.model
        try:
            await asyncio.to_thread(self._answering.info, task)
        except SpecError as error:
            raise unknown(error) from error
        request.state.said.update(task=task, rows=len(ask.prompts))
        pieces = Pieces(begun + self._limits.deadline, asyncio.get_running_loop())
        await self._start(ask, task, pieces)
        head = {"id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}", "created": int(time.time())}
        head |= {"model": ask.model}
        if ask.stream:
            first = await self._next(pieces)
            return StreamingResponse(self._stream(first, pieces, ask, head, chat), media_type="text/event-stream")
        while isinstance(item := await self._next(pieces), tuple):
            pass
        kind = "chat.completion" if chat else "text_completion"
        return JSONResponse({**head, "object": kind, "choices": _choices(item, chat), "usage": _usage(item)})

    async def _start(self, ask: Ask, task: str | None, pieces: Pieces) -> None:
        if self.waiting + len(ask.prompts) > self._limits.queue:
            raise Fault(BUSY, "too many requests wait", there_is=f"{self.waiting} texts", try_="again in a moment")
        self.waiting += len(ask.prompts)

        def done() -> None:
            self.waiting -= len(ask.prompts)

        def end(found: list[Written] | Exception) -> None:
            if not isinstance(found, Exception):
                self._measures.wrote(sum(len(row.tokens) for row in found))
            pieces.put(found)
            pieces.loop.call_soon_threadsafe(done)

        options = {**ask.options, "stream": pieces.listen if TOKENIZER in self._session.manifest.files else None}
        try:
            if self._scribe is None:
                self._threads.submit(self._alone, ask.prompts, task, options, pieces, end)
            else:
                rows = await asyncio.to_thread(self._session.texts.prepare, ask.prompts, task, **options)
                self._scribe.submit(Order(rows, pieces.check, end))
        except BaseException as error:
            done()
            if isinstance(error, RuntimeError):  # no new thread
                raise Fault(UNAVAILABLE, "the server is stopping", try_="another replica, or later") from error
            raise

    def _alone(
        self, prompts: Sequence[Prompt], task: str | None, options: Mapping[str, Any], pieces: Pieces, end: End
    ) -> None:
        """Write a request's texts in a thread of their own."""
        try:
            pieces.check()
            end(self._session.generate(prompts, task, **options))
        except Exception as error:
            end(error)

    async def _next(self, pieces: Pieces) -> tuple[int, str] | list[Written]:
        """The next piece, or the rows. Raises what the thread raised, and Fault at the deadline."""
        try:
            async with asyncio.timeout(max(pieces.deadline - time.monotonic(), 0)):
                item = await pieces.queue.get()
        except (TimeoutError, asyncio.CancelledError) as error:
            pieces.gone.set()
            if isinstance(error, TimeoutError):
                raise late() from error
            raise
        if isinstance(item, Exception):
            raise item
        return item

    async def _stream(
        self, item: tuple[int, str] | list[Written], pieces: Pieces, ask: Ask, head: Mapping[str, Any], chat: bool
    ) -> AsyncIterator[str]:
        head = {**head, "object": "chat.completion.chunk" if chat else "text_completion"}

        def event(choices: list[dict[str, Any]], **more: object) -> str:
            return f"data: {json.dumps({**head, 'choices': choices, **more}, ensure_ascii=False)}\n\n"

        try:
            for row in range(len(ask.prompts) if chat else 0):
                yield event([{"index": row, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
            while isinstance(item, tuple):
                row, piece = item
                said: dict[str, Any] = {"delta": {"content": piece}} if chat else {"text": piece, "logprobs": None}
                yield event([{"index": row, **said, "finish_reason": None}])
                item = await self._next(pieces)
            for i, row_ in enumerate(item):
                last: dict[str, Any] = {"delta": {}} if chat else {"text": "", "logprobs": None}
                yield event([{"index": i, **last, "finish_reason": REASONS[row_.reason]}])
            if ask.usage:
                yield event([], usage=_usage(item))
        except Exception as error:  # the status is sent already
            say("write", level=logging.ERROR, failure=error)
            yield f"data: {json.dumps(openai(error), ensure_ascii=False)}\n\n"
        finally:
            pieces.gone.set()
        yield "data: [DONE]\n\n"


def _choices(rows: Sequence[Written], chat: bool) -> list[dict[str, Any]]:
    found = []
    for i, row in enumerate(rows):
        said: dict[str, Any] = {"message": {"role": "assistant", "content": row.text}} if chat else {"text": row.text}
        found.append({"index": i, **said, "logprobs": None, "finish_reason": REASONS[row.reason]})
    return found


def _usage(rows: Sequence[Written]) -> dict[str, int]:
    prompt, written = sum(row.prompt for row in rows), sum(len(row.tokens) for row in rows)
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}
