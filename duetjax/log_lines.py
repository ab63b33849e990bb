"""What the package logs, as lines for whoever runs it or for programs."""

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from enum import StrEnum

_log = logging.getLogger("duetjax")

current_request_id: ContextVar[str] = ContextVar("request_id", default="")
"""Of the HTTP request that is being answered; empty elsewhere."""


class LogFormat(StrEnum):
    """TEXT: the package's own lines, for people. JSON: an object a line, others' lines too."""

    TEXT = "text"
    JSON = "json"


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON: time, level, logger, message, request_id and exception."""

    def format(self, record: logging.LogRecord) -> str:
        """The last two where there are any; time in UTC, to the millisecond."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if named := current_request_id.get():
            line["request_id"] = named
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


@contextmanager
def log_to_stderr(log_format: LogFormat = LogFormat.TEXT) -> Iterator[None]:
    """While it lasts, what the package logs goes to standard error, one line each.

    As JSON also what others log there: the HTTP server, asyncio, jax, and Python's warnings.
    """
    handler = logging.StreamHandler(sys.stderr)
    logger = _log
    if log_format is LogFormat.JSON:
        handler.setFormatter(JsonFormatter())
        logger = logging.getLogger()
        logging.captureWarnings(True)
    else:
        handler.setFormatter(logging.Formatter("duetjax: %(message)s"))
    logger.addHandler(handler)
    _log.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        if log_format is LogFormat.JSON:
            logging.captureWarnings(False)
