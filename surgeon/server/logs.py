"""One JSON object a line, on stderr."""

from __future__ import annotations

import json
import logging
import sys
import time

LOG = logging.getLogger("surgeon.server")


class JsonFormatter(logging.Formatter):
    """Time, level and message, and what else the record says under `said`."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        line = {"time": at, "level": record.levelname.lower(), "event": record.getMessage()}
        line |= getattr(record, "said", {})
        if record.exc_info and record.exc_info[0] is not None:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def open_log(level: str) -> None:
    """Send this server's lines, and uvicorn's warnings, to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    for name, own in (("surgeon.server", level.upper()), ("uvicorn", "WARNING")):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(own)


def say(event: str, *, level: int = logging.INFO, failure: BaseException | None = None, **said: object) -> None:
    """A line."""
    LOG.log(level, event, extra={"said": said}, exc_info=failure)
