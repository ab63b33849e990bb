"""Server-sent events: a stream always ends with finish chunks or an error event, then [DONE]."""

import logging
from collections.abc import Callable
from typing import Any

import orjson
from starlette.types import Send

from duetjax.serve.call import Call
from duetjax.serve.errors import HttpError, error_object, internal_error
from duetjax.serve.generation import Generation

_log = logging.getLogger(__name__)
_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}
_PING = b": still working\n\n"
_DONE = b"data: [DONE]\n\n"


async def send_stream(
    call: Call, generation: Generation, send: Send, refuse: Callable[[str], None]
) -> None:
    """Streams a submitted call; a fault from here on becomes its last event.

    refuse: told why a stream was given up.
    """
    headers = [(k.encode(), v.encode()) for k, v in (_HEADERS | dict(call.headers)).items()]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    try:
        await _send_chunks(call, generation, send)
    except HttpError as error:
        refuse(error.reason)
        await _write(send, _event(error_object(error)))
    except Exception:
        _log.exception("a stream failed after its start")
        refuse(internal_error().reason)
        await _write(send, _event(error_object(internal_error())))
    await send({"type": "http.response.body", "body": _DONE, "more_body": False})


async def _send_chunks(call: Call, generation: Generation, send: Send) -> None:
    tail = {"usage": None} if call.include_usage else {}
    begun: set[int] = set()
    while not generation.is_finished:
        if (delta := await generation.next()) is None:
            await _write(send, _PING)
            continue
        chunks = call.reply.chunk(delta, is_first=delta.index not in begun)
        if chunks:
            begun.add(delta.index)
            await _write(send, b"".join(_event(chunk | tail) for chunk in chunks))
    if call.include_usage:
        usage = {"usage": call.usage(generation.num_tokens, generation.cached)}
        await _write(send, _event(call.reply.last() | usage))


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(data) + b"\n\n"


async def _write(send: Send, events: bytes) -> None:
    await send({"type": "http.response.body", "body": events, "more_body": True})
