"""Server-sent events: a stream always ends with finish chunks or an error event, then [DONE]."""

import logging
from collections.abc import Callable

import orjson
from starlette.types import Send

from duetjax.serve.call import Call, Delta
from duetjax.serve.errors import HttpError, error_object, internal_error
from duetjax.serve.events import DONE, begin, event, write
from duetjax.serve.generation import Generation

_log = logging.getLogger(__name__)
_PING = b": still working\n\n"
_MARK = "\0"


async def send_stream(
    call: Call, generation: Generation, send: Send, refuse: Callable[[str], None]
) -> None:
    """Streams a submitted call; a fault from here on becomes its last event.

    refuse: told why a stream was given up.
    """
    await begin(send, call.headers)
    unsent: list[bytes] = []
    try:
        await _send_chunks(call, generation, send, unsent)
    except HttpError as error:
        refuse(error.reason)
        unsent.append(event(error_object(error)))
    except Exception:
        _log.exception("a stream failed after its start")
        refuse(internal_error().reason)
        unsent.append(event(error_object(internal_error())))
    unsent.append(DONE)
    await write(send, b"".join(unsent), ends=True)


async def _send_chunks(call: Call, generation: Generation, send: Send, unsent: list[bytes]) -> None:
    """What has come meanwhile goes out together; unsent: events left for whoever writes next."""
    spelling = _Spelling(call)
    while not generation.is_finished:
        delta = await generation.next()
        unsent.append(_PING if delta is None else spelling.events(delta))
        if not (generation.has_more or generation.is_finished):
            events = b"".join(unsent)
            unsent.clear()
            if events:
                await write(send, events)
    last = generation.told_timings()
    if call.include_usage:
        last = {"usage": generation.usage(call)} | last
    if last:
        unsent.append(event(call.reply.last() | last))


class _Spelling:
    """The deltas of a call as events.

    Most events of a choice differ in their text alone: it is put into a frame, which is the event
    of a mark, cut at the mark.
    """

    def __init__(self, call: Call) -> None:
        self._reply = call.reply
        self._tail = {"usage": None} if call.include_usage else {}
        self._frames: dict[int, tuple[bytes, bytes] | None] = {}  # of choices that have begun

    def events(self, delta: Delta) -> bytes:
        """All events for a delta; empty where there is nothing to tell."""
        frame = self._frames.get(delta.index)
        is_text = delta.text and not (delta.reasoning or delta.calls)
        if frame is not None and is_text and delta.finish_reason is None:
            return frame[0] + orjson.dumps(delta.text) + frame[1]
        is_first = delta.index not in self._frames
        events = self._spelled(delta, is_first=is_first)
        if is_first and events:
            self._frames[delta.index] = self._frame(delta.index)
        return events

    def _spelled(self, delta: Delta, *, is_first: bool) -> bytes:
        chunks = self._reply.chunk(delta, is_first=is_first)
        return b"".join(event(chunk | self._tail) for chunk in chunks)

    def _frame(self, index: int) -> tuple[bytes, bytes] | None:
        if not self._reply.is_text_only:
            return None
        marked = self._spelled(Delta(index, _MARK, ()), is_first=False)
        before, _, after = marked.rpartition(orjson.dumps(_MARK))
        return before, after
