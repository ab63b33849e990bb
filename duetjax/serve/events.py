"""Server-sent events as bytes."""

from collections.abc import Mapping

import orjson
from starlette.types import Send

HEADERS: Mapping[str, str] = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}
DONE = b"data: [DONE]\n\n"
"""Ends every stream."""


def event(data: object) -> bytes:
    """An event whose data is JSON."""
    return b"data: " + orjson.dumps(data) + b"\n\n"


async def begin(send: Send, headers: Mapping[str, str]) -> None:
    """Starts a stream; headers: beside those of every stream."""
    pairs = [(name.encode(), value.encode()) for name, value in {**HEADERS, **headers}.items()]
    await send({"type": "http.response.start", "status": 200, "headers": pairs})


async def write(send: Send, events: bytes, *, ends: bool = False) -> None:
    """Sends some events."""
    await send({"type": "http.response.body", "body": events, "more_body": not ends})
