"""The endpoint on a socket: start, announce, drain on a signal, stop."""

import asyncio
import gc
import logging
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

import uvicorn

from duetjax.config import ConfigError
from duetjax.serve.admission import shutting_down
from duetjax.serve.app import create_app
from duetjax.serve.context import Context, Service
from duetjax.serve.errors import engine_dead, not_running
from duetjax.serve.h11_protocol import TimedProtocol
from duetjax.serve.tracing import TraceFile

_log = logging.getLogger(__name__)
_FOR_EVER = 10**9  # seconds
_LAST_WORDS_SECONDS = 2.0  # for error events to leave, once in-flight work has been given up
_OBITUARY_SECONDS = 3.0  # for probes and new clients to be told of an engine that has died
_PULSE_SECONDS = 0.1  # between looks whether it has


class _Uvicorn(uvicorn.Server):
    """uvicorn without its signal handlers, which would close the listener before the drain."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpServer:
    """Serves one `Service` on a socket from `bind` until it is stopped, and closes the socket.

    shutdown_timeout: seconds that calls in flight have to finish once it drains. Once the engine
    has failed the server gives every call up, says so to all comers for some seconds, and ends.
    trace: what to write of its first seconds, or of all where they are fewer.
    """

    def __init__(
        self,
        service: Service,
        listener: socket.socket,
        *,
        shutdown_timeout: float = 30.0,
        trace: TraceFile | None = None,
    ) -> None:
        self._service = service
        self._shutdown_timeout = shutdown_timeout
        self._trace = trace
        self._socket = listener
        host, port = listener.getsockname()[:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        app, limits = create_app(service), service.limits
        self._context: Context = app.state.context
        self._uvicorn = _Uvicorn(
            uvicorn.Config(
                app,
                http=TimedProtocol,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                h11_max_incomplete_event_size=limits.max_header_bytes,
                timeout_keep_alive=limits.keep_alive_s or _FOR_EVER,  # type: ignore[arg-type]
                timeout_graceful_shutdown=1,
            )
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = asyncio.Event()
        self._stopping_at_once = asyncio.Event()

    def run(self, announce: Callable[[str], None]) -> None:
        """Serves until `stop` or, on the main thread, SIGTERM or SIGINT; then drains and returns.

        Returns also once the engine has failed, as its `failure` tells. announce: told one line
        with the address once requests are answered. The engine is started here, but its shutdown
        is for whoever made it.
        """
        gc.collect()
        gc.freeze()  # or each full collection goes over all that was loaded, tens of milliseconds
        with asyncio.Runner() as runner:
            runner.run(self._serve(announce))

    def stop(self) -> None:
        """Begins to drain; called again, ends calls in flight at once. From any thread."""
        assert self._loop is not None, "stop() before run()"
        try:
            self._loop.call_soon_threadsafe(self._on_stop)
        except RuntimeError:
            if not self._loop.is_closed():  # closed: it has stopped already
                raise

    async def _serve(self, announce: Callable[[str], None]) -> None:
        self._loop = asyncio.get_running_loop()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._loop.add_signal_handler(number, self._on_stop)
        serving = asyncio.create_task(self._uvicorn.serve(sockets=[self._socket]))
        while not self._uvicorn.started and not serving.done():
            await asyncio.sleep(0.01)
        if self._uvicorn.started:
            async with self._tracing():
                announce(f"duetjax: serving {self._service.model_names[0]} on {self.url}")
                await self._until_stopped_or_dead()
            self._uvicorn.should_exit = True
        await serving

    @asynccontextmanager
    async def _tracing(self) -> AsyncIterator[None]:
        """Writes the trace that was asked for; leaving ends its window."""
        if self._trace is None:
            yield
            return
        ended = asyncio.Event()
        recording = asyncio.create_task(self._trace.record(self._context, ended))
        await asyncio.sleep(0)  # it has begun
        try:
            yield
        finally:
            ended.set()
            await recording

    def _on_stop(self) -> None:
        if self._stopping.is_set():
            self._stopping_at_once.set()
        self._stopping.set()

    async def _until_stopped_or_dead(self) -> None:
        drained = asyncio.create_task(self._drain_when_stopped())
        while not drained.done():
            if self._service.client.failure is not None:
                self._context.dispatcher.give_up(engine_dead(not_running(self._service.client)))
                await asyncio.wait((drained,), timeout=_OBITUARY_SECONDS)
                drained.cancel()
                return
            await asyncio.wait((drained,), timeout=_PULSE_SECONDS)
        drained.result()

    async def _drain_when_stopped(self) -> None:
        await self._stopping.wait()
        await self._drain()

    async def _drain(self) -> None:
        """Lets calls in flight finish while the listener stays open, then gives them up."""
        admission = self._context.admission
        admission.close(self._shutdown_timeout)
        hurry = asyncio.create_task(self._stopping_at_once.wait())
        idle = asyncio.create_task(admission.wait_idle(self._shutdown_timeout))
        await asyncio.wait((hurry, idle), return_when=asyncio.FIRST_COMPLETED)
        if not (idle.done() and idle.result()):
            _log.warning("giving up the calls still in flight")
            self._context.dispatcher.give_up(shutting_down())
            await admission.wait_idle(_LAST_WORDS_SECONDS)
        for task in (hurry, idle):
            task.cancel()


def bind(host: str, port: int) -> socket.socket:
    """Reserves an address before the long work of loading a model; clients are refused until then.

    Port 0 is any free one. Raises `ConfigError` for an address that cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol by name: asyncio looks for it when it switches Nagle's algorithm off, and with it
    # on a token may wait 40 ms for the client to acknowledge the one before.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"--host {host} --port {port}: {reason}; choose another address"
        ) from None
    return listener
