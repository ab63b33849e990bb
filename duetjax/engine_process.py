"""An engine in a process of its own, so that streaming to many clients never keeps it waiting.

With both in one process, each wants Python's one lock when a step ends: the server to hand out
tokens, the engine to launch the next step. benchmarks/server.py measures what that costs.
"""

import json
import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from duetjax.config import DuetJAXError, EngineConfig, InvalidRequest
from duetjax.engine import (
    EngineDead,
    LaunchWatcher,
    check_constraint,
    check_request,
    why_not_running,
)
from duetjax.log_lines import LogFormat
from duetjax.policy.launch_counts import LaunchCounts
from duetjax.policy.limits import SchedulerLimits
from duetjax.policy.request import FinishReason, NewRequest, StepOutputs
from duetjax.policy.stats import Stats
from duetjax.watchdog import Wait, Watch, stalled
from duetjax.wire import Channel, Plain, completed_launch, launch_counts, plain, step_outputs

_log = logging.getLogger(__name__)

_LEAST_SECONDS = 5.0  # without a sign of life
_PARTING_SECONDS = 5.0  # for a process that has said that it is done
_PROGRAM = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from duetjax.engine_worker import main
main(sys.argv[2], int(sys.argv[3]))
"""


class EngineDied(DuetJAXError):
    """The engine's process has ended without being asked to."""


class _EngineFailed(Exception):
    """A failure of the engine whose words are for the log."""

    def __repr__(self) -> str:
        return str(self)


class EngineProcess:
    """Implements `engine.Engine`; `wait_ready` comes before everything else.

    worker: the command of a process that calls `engine_worker.work` with its last argument, the
    number of a socket, and is told `values` first. max_model_len, notice: of the loaded model.
    """

    limits: SchedulerLimits
    vocab_size: int
    rung: str
    constrains: bool
    max_model_len: int
    notice: str

    def __init__(self, worker: Sequence[str], *values: Plain) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [*worker, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # a terminal's Ctrl-C is for the server
            )
        self._channel = Channel(ours)
        self._messages = self._channel.receive()
        self._channel.send("load", *values)
        self._reader = threading.Thread(target=self._read, name="duetjax-reader", daemon=True)
        self._is_running = False
        self._closed = threading.Event()
        self._ended_well = False
        self._stats: Stats | None = None
        self._launch_counts: LaunchCounts | None = None
        self._heard = time.monotonic()
        self._silence = 0.0
        self._num_compilations = 0
        # _lock guards what follows; it is held for moments, never while a callback runs.
        self._lock = threading.Lock()
        self._live: dict[str, None] = {}
        self._failure: BaseException | None = None
        self._has_told_all = False
        self._watchers: Mapping[object, LaunchWatcher] = {}

    @classmethod
    def load(
        cls, request: object, engine: EngineConfig, log_format: LogFormat = LogFormat.TEXT
    ) -> Self:
        """A process that loads a model; request: a `ModelRequest`."""
        path = json.dumps([each or "." for each in sys.path])
        worker = sys.executable, "-c", _PROGRAM, path, log_format
        return cls(worker, _texts(plain(request)), _texts(plain(engine)))

    def wait_ready(self) -> None:
        """Returns once the model is loaded; raises `DuetJAXError` if it cannot be, then `kill`."""
        what, *values = next(self._messages, ("gone",))
        if what == "ready":
            limits, self.vocab_size, self.rung, self.constrains, *values = values
            self.max_model_len, self.notice, stats, counts, self._num_compilations = values
            self.limits = SchedulerLimits(*limits)
            self._stats = Stats(*stats)
            self._launch_counts = launch_counts(counts)
            return
        raise DuetJAXError(values[0]) if what == "error" else self._obituary()

    def kill(self) -> None:
        """Ends the process at once."""
        self._channel.close()
        self._process.kill()
        self._process.wait()

    def start(self, on_outputs: Callable[[StepOutputs], None]) -> None:
        """See `EngineClient.start`; `on_outputs` is called on a thread of this process."""
        self._on_outputs = on_outputs
        self._is_running = True
        self._channel.send("start")
        self._heard = time.monotonic()
        self._reader.start()

    def watch(self, seconds: float) -> None:
        """See `EngineClient.watch`; also fails if the process gives no sign of life for so long."""
        self._channel.send("watch", seconds)
        if seconds:
            threading.Thread(
                target=self._watch, args=(seconds,), name="duetjax-watchdog", daemon=True
            ).start()

    def submit(self, new: NewRequest) -> None:
        """See `EngineClient.submit`."""
        check_request(new, self.limits, self.vocab_size)
        check_constraint(new, self.constrains)
        values = plain(new)
        with self._lock:
            if not self._is_running:
                raise EngineDead(why_not_running(self._failure))
            if new.id in self._live:
                raise InvalidRequest(f"request id {new.id!r} is already in use; choose another")
            self._live[new.id] = None
            self._channel.send("submit", values)

    def abort(self, request_id: str, *, unless_begun: bool = False) -> None:
        """See `EngineClient.abort`."""
        if request_id in self._live:
            self._channel.send("abort", request_id, unless_begun)

    def watch_launches(self, watcher: LaunchWatcher) -> Callable[[], None]:
        """See `EngineClient.watch_launches`; the watcher is called on a thread of this process."""
        key = object()
        with self._lock:
            if not self._watchers:
                self._channel.send("launches", True)
            self._watchers = {**self._watchers, key: watcher}
        return lambda: self._end_watching(key)

    def stats(self) -> Stats:
        """See `EngineClient.stats`."""
        assert self._stats is not None, "stats() before wait_ready()"
        return self._stats

    def launch_counts(self) -> LaunchCounts:
        """See `EngineClient.launch_counts`; as of the process's last sign of life."""
        assert self._launch_counts is not None, "launch_counts() before wait_ready()"
        return self._launch_counts

    @property
    def num_slots(self) -> int:
        """See `EngineClient.num_slots`."""
        return self.limits.num_slots

    @property
    def num_live(self) -> int:
        """See `EngineClient.num_live`."""
        return len(self._live)

    @property
    def failure(self) -> BaseException | None:
        """See `EngineClient.failure`."""
        return self._failure

    @property
    def is_healthy(self) -> bool:
        """See `EngineClient.is_healthy`."""
        return self._is_running

    @property
    def silence(self) -> float:
        """See `EngineClient.silence`; grows also while the process gives no sign of life."""
        unheard = time.monotonic() - self._heard
        return self._silence + unheard if self._silence or unheard > 1 else 0.0

    @property
    def num_compilations(self) -> int:
        """Programs that XLA has compiled in the engine's process."""
        return self._num_compilations

    def shutdown(self, timeout: float) -> bool:
        """See `EngineClient.shutdown`; afterwards the process is gone in any case."""
        with self._lock:
            was_started = self._reader.is_alive() or self._is_running
            self._is_running = False
        if was_started:
            self._channel.send("shutdown", timeout)
            if not self._closed.wait(timeout + _PARTING_SECONDS):
                self._fail(TimeoutError(f"launches in flight did not end within {timeout} s"))
        self.kill()
        if was_started:
            self._reader.join()
        return self._ended_well or not was_started

    def _end_watching(self, key: object) -> None:
        with self._lock:
            self._watchers = {k: each for k, each in self._watchers.items() if k is not key}
            if not self._watchers:
                self._channel.send("launches", False)

    # What follows runs on the threads of this class.

    def _read(self) -> None:
        """Until the process has closed, or is gone."""
        for what, *values in self._messages:
            self._heard = time.monotonic()
            if what == "outputs":
                stats, outputs, failure = values
                self._take_stats(stats, failure)
                self._publish(step_outputs(outputs))
            elif what == "tick":
                stats, counts, self._silence, self._num_compilations, failure = values
                self._launch_counts = launch_counts(counts)
                self._take_stats(stats, failure)
            elif what == "launches":
                self._tell_watchers(tuple(map(completed_launch, values[0])))
            else:
                assert what == "closed", what
                self._ended_well, stats, failure = values
                self._take_stats(stats, failure)
                self._closed.set()
                return
        self._fail(self._obituary())
        self._closed.set()

    def _take_stats(self, stats: tuple[Any, ...], failure: tuple[bool, str] | None) -> None:
        self._stats = Stats(*stats)
        if failure is not None and self._failure is None:
            is_told, text = failure
            with self._lock:
                self._is_running = False
                self._failure = DuetJAXError(text) if is_told else _EngineFailed(text)

    def _publish(self, outputs: StepOutputs) -> None:
        with self._lock:
            if self._has_told_all:
                return
            for request_id, _ in outputs.finished:
                self._live.pop(request_id, None)
        try:
            self._on_outputs(outputs)
        except Exception as error:
            _log.exception("on_outputs raised; nobody knows who was told what")
            self._fail(error)

    def _tell_watchers(self, launches: tuple[Any, ...]) -> None:
        for key, watcher in self._watchers.items():
            try:
                watcher(launches)
            except Exception:
                _log.exception("a watcher of launches raised; it is told no more")
                self._end_watching(key)

    def _watch(self, seconds: float) -> None:
        """The engine has a watchdog of its own; this is for a process that does nothing at all."""
        watch = Watch(max(seconds, _LEAST_SECONDS))
        while not self._closed.wait(watch.interval):
            wait = Wait("the engine's process", self._heard)
            now = time.monotonic()
            if watch.overdue([wait], now) is not None:
                failure = stalled(wait, now)
                _log.critical("the engine hangs: %s", failure)
                self._fail(failure)
                return

    def _fail(self, failure: BaseException) -> None:
        """Gives every live request its last output."""
        with self._lock:
            self._is_running = False
            self._failure = self._failure or failure
            self._has_told_all = True
            ended = dict.fromkeys(self._live, FinishReason.ERROR)
            self._live.clear()
        if ended:
            try:
                self._on_outputs(StepOutputs(finished=tuple(ended.items())))
            except Exception:
                _log.exception("on_outputs raised; %d requests may not know", len(ended))

    def _obituary(self) -> EngineDied:
        try:
            code = self._process.wait(_PARTING_SECONDS)
        except subprocess.TimeoutExpired:
            return EngineDied("the engine's process has left; see its log, then start it again")
        how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        hint = ", perhaps for want of memory" if code == -9 else ""
        return EngineDied(f"the engine's process {how}{hint}; see its log, then start it again")


def _texts(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Paths and names as plain strings."""
    plain_types = (bool, int, float, tuple, type(None))
    return tuple([v if isinstance(v, plain_types) else str(v) for v in values])
