"""HTTP below the routes: bodies within their limits, errors as JSON, a line in the log for every request."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
import zlib
from collections.abc import Awaitable, Callable

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from surgeon.errors import DataError, SurgeonError
from surgeon.server.faults import BROKEN, BUSY, SLOW, TOO_LARGE, Fault, message_of, status_of
from surgeon.server.limits import Limits
from surgeon.server.logs import say
from surgeon.server.measuring import Measures

Handler = Callable[[Request], Awaitable[Response]]
GONE = 499
"""The client closed the connection: for the log, since nobody reads it."""
REQUEST_ID = "x-request-id"
WBITS = {"gzip": 31, "deflate": 15}


def told(
    handler: Handler, route: str, measures: Measures, errors: Callable[[Exception], object] | None = None
) -> Handler:
    """The handler, whose errors are answers and whose requests are counted and logged."""
    form = errors or _error

    async def handle(request: Request) -> Response:
        begun = time.monotonic()
        said: dict[str, object] = {}
        request.state.said = said
        identity = request.headers.get(REQUEST_ID, "")
        identity = identity if re.fullmatch(r"[\w.:-]{1,128}", identity) else secrets.token_hex(8)
        level, failed = logging.INFO, None
        try:
            response = await handler(request)
        except ClientDisconnect:
            response = Response(status_code=GONE)
        except Exception as error:
            status = status_of(error)
            if status >= BROKEN and not isinstance(error, Fault):
                level, failed = logging.ERROR, error
            said["error"] = str(error) if isinstance(error, SurgeonError) else type(error).__name__
            response = JSONResponse(form(error), status, headers={"retry-after": "1"} if status == BUSY else None)
            if status in {SLOW, TOO_LARGE}:
                response.headers["connection"] = "close"  # its body is not read to the end
        response.headers[REQUEST_ID] = identity
        seconds = time.monotonic() - begun
        measures.answered(route, response.status_code, seconds)
        said = {"id": identity, "method": request.method, "path": request.url.path[:200], **said}
        quiet = route in {"health", "metrics", "page"} and level == logging.INFO
        say(
            route,
            level=logging.DEBUG if quiet else level,
            failure=failed,
            status=response.status_code,
            ms=round(1000 * seconds, 2),
            **said,
        )
        return response

    return handle


async def read_body(request: Request, limits: Limits, most: int | None = None) -> bytes:
    """The body. Raises Fault where it is larger than it may be, or does not arrive in time."""
    most = limits.body if most is None else most
    length = request.headers.get("content-length", "")
    announced = int(length) if length.isdecimal() and len(length) < 20 else 0
    if announced > most and "expect" in request.headers:
        raise _too_large(most)
    parts: list[bytes] = []
    total = 0
    try:
        async with asyncio.timeout(limits.patience):
            async for part in request.stream():
                total += len(part)
                if total <= most and announced <= most:
                    parts.append(part)
                elif total > 2 * most:  # up to here it is read: a client that still sends would not read an answer
                    break
    except TimeoutError as error:
        raise Fault(
            SLOW, f"the request's body did not arrive within {limits.patience:g} s", there_is=f"{total} bytes of it"
        ) from error
    if total > most or announced > most:
        raise _too_large(most)
    return _plain(b"".join(parts), request.headers.get("content-encoding", "identity").strip().lower(), most)


def _plain(body: bytes, encoding: str, most: int) -> bytes:
    if encoding == "identity":
        return body
    if encoding not in WBITS:
        raise Fault(415, f"content-encoding '{encoding[:40]}' is not read here", there_is="gzip, deflate")
    stream = zlib.decompressobj(WBITS[encoding])
    try:
        plain = stream.decompress(body, most + 1)
    except zlib.error as error:
        raise DataError(f"the body is not {encoding}") from error
    if len(plain) > most:
        raise _too_large(most)
    if not stream.eof:
        raise DataError(f"the body is cut: its {encoding} has no end")
    return plain


def _too_large(most: int) -> Fault:
    return Fault(TOO_LARGE, f"the request is too large: {most} bytes are the most", try_="several requests")


def _error(error: Exception) -> object:
    details = error.to_dict() if isinstance(error, SurgeonError) else {}
    kept = {key: details[key] for key in ("what", "there_is", "try") if details.get(key)}
    return {"error": message_of(error), **({"details": kept} if kept else {})}
