"""Traces of a window of time: GET /debug/trace, and the file of `duetjax serve --trace`.

While a window is open the engine's thread only puts launches into it; once it is closed they are
written piece by piece, off the event loop, as fast as the client reads.
"""

import asyncio
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from reprlib import repr as short

from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from duetjax.config import ConfigError, InvalidRequest
from duetjax.engine import CompletedLaunches
from duetjax.policy.completed_launch import CompletedLaunch
from duetjax.serve.context import Context
from duetjax.serve.errors import HttpError, engine_dead, not_running
from duetjax.serve.events import write
from duetjax.trace_events import RequestLife, Window, pieces
from duetjax.whole_file import write_whole

MAX_SECONDS = 60.0
MAX_FILE_SECONDS = 3600.0
MAX_TRACES = 2
MAX_LAUNCHES = 50_000
MAX_ROWS = 200_000
MAX_LIVES = 20_000
_DEFAULT_SECONDS = 5.0
_LOOK_SECONDS = 0.1

_log = logging.getLogger(__name__)


class Collector:
    """An open window. `close` is for the event loop's thread, which also makes it.

    Launches beyond `MAX_LAUNCHES` and requests beyond `MAX_LIVES` are counted and left out;
    launches that would make more than `MAX_ROWS` rows are kept without saying whose they were.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._lock = threading.Lock()
        self._launches: list[CompletedLaunch] = []
        self._num_rows = 0
        self._lives: list[RequestLife] = []
        self._dropped: Counter[str] = Counter(launches=0, rows=0, requests=0)
        self._wall, self._begin = time.time(), time.monotonic()
        self._offset = self._begin - time.perf_counter()
        self._leave_lives = context.lives.watch(self._take)
        self._leave_engine = context.service.client.watch_launches(self._put)

    def close(self) -> Window:
        """Ends it; what is live is told as it stands now."""
        self._leave_engine()
        self._leave_lives()
        for life in self._context.lives.now():
            self._take(life)
        with self._lock:
            return Window(
                model=self._context.service.model_names[0],
                begin=self._begin,
                end=time.monotonic(),
                wall=self._wall,
                launches=tuple(self._launches),
                lives=tuple(self._lives),
                dropped=dict(self._dropped),
            )

    def _put(self, launches: CompletedLaunches) -> None:
        """On the engine's thread."""
        with self._lock:
            for launch in launches:
                if len(self._launches) == MAX_LAUNCHES:
                    self._dropped["launches"] += 1
                elif self._num_rows + len(launch.ids) > MAX_ROWS:
                    self._dropped["rows"] += len(launch.ids)
                    self._launches.append(replace(launch, ids=()))
                else:
                    self._num_rows += len(launch.ids)
                    self._launches.append(launch)

    def _take(self, life: RequestLife) -> None:
        """Of times by time.perf_counter, which the engine's clock may be apart from."""
        if len(self._lives) == MAX_LIVES:
            self._dropped["requests"] += 1
            return

        def shifted(at: float | None) -> float | None:
            return None if at is None else at + self._offset

        self._lives.append(
            replace(
                life,
                arrived=life.arrived + self._offset,
                first_token=shifted(life.first_token),
                ended=shifted(life.ended),
            )
        )


class TraceEndpoint:
    """The ASGI application behind /debug/trace; it is not work, so a drain does not wait for it.

    A window ends early when the server drains or the engine fails: what there is is told.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._num_open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request; raises a 429 if too many traces are being made."""
        self._context.admission.check_open()
        client = self._context.service.client
        if not client.is_healthy:
            raise engine_dead(not_running(client))
        request = Request(scope, receive)
        seconds = _seconds(request.query_params)
        if self._num_open == MAX_TRACES:
            message = f"{MAX_TRACES} traces are being made, and no more may; wait for one of them"
            raise HttpError(429, "too_many_watchers", message)
        if scope["method"] == "HEAD":
            await Response(headers=_headers())(scope, receive, send)
            return
        self._num_open += 1
        try:
            await self._answer(request, seconds, send)
        finally:
            self._num_open -= 1

    async def _answer(self, request: Request, seconds: float, send: Send) -> None:
        async def is_over() -> bool:
            return not self._context.admission.is_open or await request.is_disconnected()

        window = await _collected(self._context, seconds, is_over)
        if await request.is_disconnected():
            return
        pairs = [(name.encode(), value.encode()) for name, value in _headers().items()]
        await send({"type": "http.response.start", "status": 200, "headers": pairs})
        unsent = pieces(window)
        while piece := await asyncio.to_thread(next, unsent, b""):  # the first of many takes long
            await write(send, piece)
        await write(send, b"", ends=True)


@dataclass(frozen=True, slots=True)
class TraceFile:
    """Where a server writes the trace of its first seconds."""

    path: Path
    seconds: float = MAX_SECONDS

    def __post_init__(self) -> None:
        if not 0 < self.seconds <= MAX_FILE_SECONDS:
            raise ConfigError(
                f"--trace-seconds {self.seconds:g}: give seconds up to {MAX_FILE_SECONDS:g}"
            )
        if self.path.is_dir() or not self.path.absolute().parent.is_dir():
            raise ConfigError(f"--trace {self.path}: name a file in a folder that exists")

    async def record(self, context: Context, ended: asyncio.Event) -> None:
        """Writes the trace of a window that begins now; it ends early once `ended` is set.

        A fault of the disk is logged and harms nobody.
        """

        async def is_over() -> bool:
            return ended.is_set()

        window = await _collected(context, self.seconds, is_over)
        try:
            await asyncio.to_thread(self._write, window)
        except OSError as error:
            _log.error("--trace %s: %s; the trace is lost", self.path, error.strerror)
        else:
            _log.info("wrote a trace of %.1f s to %s", window.end - window.begin, self.path)

    def _write(self, window: Window) -> None:
        write_whole(self.path, b"".join(pieces(window)), ".unfinished")


async def _collected(
    context: Context, seconds: float, is_over: Callable[[], Awaitable[bool]]
) -> Window:
    """What a window of so many seconds holds, or a shorter one."""
    collector = Collector(context)
    ends = time.monotonic() + seconds
    try:
        while (left := ends - time.monotonic()) > 0 and context.service.client.is_healthy:
            if await is_over():
                break
            await asyncio.sleep(min(left, _LOOK_SECONDS))
    finally:
        window = collector.close()
    return window


def _seconds(query: QueryParams) -> float:
    for name in query:
        if name != "seconds":
            raise InvalidRequest(f"{short(name)} means nothing here; seconds does", param=name[:64])
    seconds = math.nan
    with suppress(ValueError):
        seconds = float(query.get("seconds", _DEFAULT_SECONDS))
    if not 0 < seconds <= MAX_SECONDS:
        raise InvalidRequest(
            f"seconds must be above 0 and at most {MAX_SECONDS:g}; leave it out for"
            f" {_DEFAULT_SECONDS:g}",
            param="seconds",
        )
    return seconds


def _headers() -> dict[str, str]:
    name = time.strftime("duetjax-trace-%Y%m%dT%H%M%SZ.json", time.gmtime())
    return {
        "content-type": "application/json",
        "content-disposition": f'attachment; filename="{name}"',
        "cache-control": "no-store",
    }
