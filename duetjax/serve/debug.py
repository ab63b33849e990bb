"""What the scheduler does, live: at /debug/steps, a server-sent event per completed launch.

The engine's thread only puts launches into each watcher's backlog, and the event loop looks there
ten times a second: so watching costs those who generate little, however short the steps are.
"""

import asyncio
import threading
import time
from collections import deque
from dataclasses import fields
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from duetjax.engine import CompletedLaunches
from duetjax.policy.completed_launch import CompletedLaunch
from duetjax.serve.context import Context
from duetjax.serve.errors import HttpError, engine_dead, error_object, not_running
from duetjax.serve.events import DONE, HEADERS, begin, event, write

MAX_WATCHERS = 8
MAX_BACKLOG = 1024
_LOOK_SECONDS = 0.1
_PING = b": still watching\n\n"
FOR_TRACES = frozenset({"ids", "generated", "step_ends"})
"""Fields of a `CompletedLaunch` that are no part of an event."""
_TOLD = [each.name for each in fields(CompletedLaunch) if each.name not in FOR_TRACES]


class Backlog:
    """What a watcher has not been sent yet; the engine's thread puts, the event loop takes.

    At most `MAX_BACKLOG` rounds of the engine's thread, in each of which few launches complete.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rounds = deque[CompletedLaunches]()
        self._dropped = 0

    def put(self, launches: CompletedLaunches) -> None:
        """Takes a round's launches; the oldest round makes room for it."""
        with self._lock:
            self._rounds.append(launches)
            if len(self._rounds) > MAX_BACKLOG:
                self._dropped += len(self._rounds.popleft())

    def take(self) -> bytes:
        """Everything as events; the first says how many launches were dropped before, if any."""
        with self._lock:
            rounds, dropped = tuple(self._rounds), self._dropped
            self._rounds.clear()
            self._dropped = 0
        events: list[dict[str, Any]] = [
            {name: getattr(launch, name) for name in _TOLD} for each in rounds for launch in each
        ]
        if dropped:
            events[0]["dropped"] = dropped
        return b"".join(map(event, events))


class StepsEndpoint:
    """The ASGI application behind /debug/steps; it is not work, so a drain does not wait for it.

    A stream ends with [DONE] once the server drains, after an error event if the engine has failed.
    """

    def __init__(self, context: Context) -> None:
        self._client = context.service.client
        self._admission = context.admission
        self._ping_seconds = context.service.ping_seconds
        self._num_watchers = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request; raises a 429 if too many watch, and what streams end with."""
        self._admission.check_open()
        self._check_engine()
        if self._num_watchers == MAX_WATCHERS:
            message = f"{MAX_WATCHERS} clients watch already, and no more may; end one of them"
            raise HttpError(429, "too_many_watchers", message)
        if scope["method"] == "HEAD":
            await Response(headers=HEADERS)(scope, receive, send)
            return
        backlog = Backlog()
        stop = self._client.watch_launches(backlog.put)
        self._num_watchers += 1
        try:
            await self._stream(Request(scope, receive), backlog, send)
        finally:
            self._num_watchers -= 1
            stop()

    async def _stream(self, request: Request, backlog: Backlog, send: Send) -> None:
        await begin(send, {})
        try:
            await self._send_events(request, backlog, send)
        except HttpError as error:
            await write(send, event(error_object(error)))
        await write(send, DONE, ends=True)

    async def _send_events(self, request: Request, backlog: Backlog, send: Send) -> None:
        """Until the client leaves or the server drains; raises the failure of the engine."""
        wrote = time.monotonic()
        while not await request.is_disconnected():
            is_last = not self._admission.is_open
            events = backlog.take()
            if not events:
                self._check_engine()  # once all that it did has been told
                if time.monotonic() - wrote >= self._ping_seconds:
                    events = _PING
            if events:
                await write(send, events)
                wrote = time.monotonic()
            if is_last:
                return
            await asyncio.sleep(_LOOK_SECONDS)

    def _check_engine(self) -> None:
        if not self._client.is_healthy:
            raise engine_dead(not_running(self._client))
