"""What goes wrong, as a status and a message: what it is, what there is, what to try."""

from __future__ import annotations

from typing import Any

from surgeon.errors import BuildError, DataError, DeltaError, SpecError, SurgeonError, UnknownTaskError

BAD, UNAUTHORIZED, NOT_FOUND, SLOW, CONFLICT, TOO_LARGE, UNFIT, BUSY = 400, 401, 404, 408, 409, 413, 422, 429
BROKEN, UNAVAILABLE, LATE = 500, 503, 504


class Fault(SurgeonError):
    """An error with a status of its own."""

    def __init__(self, status: int, what: str, *, there_is: str | None = None, try_: str | None = None) -> None:
        super().__init__(what, there_is=there_is, try_=try_)
        self.status = status


def status_of(error: Exception) -> int:
    """The status for an error of a request."""
    if isinstance(error, Fault):
        return error.status
    if isinstance(error, UnknownTaskError):
        return NOT_FOUND
    if isinstance(error, DataError | SpecError):
        return BAD
    return BROKEN


def message_of(error: Exception) -> str:
    """What a client is told. Where on this machine it happened is for the log alone, as is what nobody foresaw."""
    if not isinstance(error, SurgeonError):
        return "internal error; the server's log has more"
    parts = [error.what]
    if error.there_is:
        parts.append(f"there is: {error.there_is}")
    if error.try_:
        parts.append(f"try: {error.try_}")
    return "; ".join(parts)


def unknown(error: SurgeonError) -> Fault:
    """A task that is not there."""
    return Fault(NOT_FOUND, error.what, there_is=error.there_is, try_=error.try_)


def refused(error: SurgeonError) -> Fault:
    """A task file that was not taken in."""
    status = UNFIT if isinstance(error, DeltaError) else BAD
    status = BROKEN if isinstance(error, BuildError) else status
    status = CONFLICT if isinstance(error, SpecError) and "already" in error.what else status
    return Fault(status, error.what, there_is=error.there_is, try_=error.try_)


def openai(error: Exception) -> dict[str, Any]:
    """The same in the form of OpenAI's clients."""
    kind = "invalid_request_error" if status_of(error) < BROKEN else "server_error"
    return {"error": {"message": message_of(error), "type": kind, "param": None, "code": None}}
