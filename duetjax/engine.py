"""The engine's loop on its own thread, and `EngineClient`, the only door to it.

One round: take in what was submitted, aborted and finished -> plan -> submit -> hand the outputs
on. Whatever happens arrives in one inbox, so nothing waits for the device but by sleeping there.
Knows neither text nor HTTP nor devices; what goes in and comes out are plain values.
"""

import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from itertools import count
from typing import Protocol

from duetjax.config import MAX_STOP_IDS, DuetJAXError, InvalidRequest
from duetjax.policy.completed_launch import CompletedLaunch
from duetjax.policy.launch import Executor, FinishedStep, Launch
from duetjax.policy.launch_counts import LaunchCounts
from duetjax.policy.limits import SchedulerLimits
from duetjax.policy.request import Constraint, FinishReason, NewRequest, Permit, StepOutputs
from duetjax.policy.scheduler import Scheduler
from duetjax.policy.stats import Stats
from duetjax.watchdog import EngineStalled, Waits, Watch, stalled

_log = logging.getLogger(__name__)


class EngineDead(DuetJAXError):
    """The engine takes no more requests: it has failed or was shut down."""


class _Phase(Enum):
    NEW = "new"
    RUNNING = "running"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class _Abort:
    id: str
    unless_begun: bool


_PERMIT_SECONDS, _PERMIT_MOMENTS = 1e-3, 8

type _Item = NewRequest | _Abort | Permit | FinishedStep | BaseException
type _Word = Permit | BaseException | None
type CompletedLaunches = tuple[CompletedLaunch, ...]
type LaunchWatcher = Callable[[CompletedLaunches], None]


class Engine(Protocol):
    """What serves requests: an `EngineClient`, or one in a process of its own.

    Members do what those of `EngineClient` do.
    """

    @property
    def limits(self) -> SchedulerLimits: ...  # noqa: D102
    @property
    def vocab_size(self) -> int: ...  # noqa: D102
    @property
    def constrains(self) -> bool: ...  # noqa: D102
    @property
    def rung(self) -> str: ...  # noqa: D102
    @property
    def num_slots(self) -> int: ...  # noqa: D102
    @property
    def num_live(self) -> int: ...  # noqa: D102
    @property
    def failure(self) -> BaseException | None: ...  # noqa: D102
    @property
    def is_healthy(self) -> bool: ...  # noqa: D102
    @property
    def silence(self) -> float: ...  # noqa: D102
    def start(self, on_outputs: Callable[[StepOutputs], None]) -> None: ...  # noqa: D102
    def watch(self, seconds: float) -> None: ...  # noqa: D102
    def submit(self, new: NewRequest) -> None: ...  # noqa: D102
    def abort(self, request_id: str, *, unless_begun: bool = False) -> None: ...  # noqa: D102
    def watch_launches(self, watcher: LaunchWatcher) -> Callable[[], None]: ...  # noqa: D102
    def stats(self) -> Stats: ...  # noqa: D102
    def launch_counts(self) -> LaunchCounts: ...  # noqa: D102
    def shutdown(self, timeout: float) -> bool: ...  # noqa: D102


class Permits(Protocol):
    """Says what constrained requests may sample; called by the engine's thread, never waits."""

    def start(self, deliver: Callable[[_Word], None]) -> None:
        """Begins: `deliver` gets what comes of the calls below, from other threads.

        In order of the calls for each request. An exception: nothing more will come.
        """

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing that will be delivered in a moment."""

    def begin(self, request_id: str, constraint: Constraint) -> None:
        """A new request: its first permit, or the error that there is none; may take long."""

    def sampled(self, request_id: str, token: int | None) -> None:
        """A request has sampled a token: the next permit where it needs one.

        None: it begins its output anew.
        """

    def end(self, request_id: str) -> None:
        """A request has ended."""

    def close(self) -> None:
        """Nothing more is asked for."""


class EngineClient:
    """Submits generations to an engine thread and hands back their tokens, step by step.

    `submit`, `abort`, `watch_launches`, `stats` and the properties may be used from any thread.
    Every submitted request gets exactly one output with a finish reason, whatever happens to the
    engine; the one exception is under `start`.

    vocab_size bounds the token ids of prompts. clock: seconds, monotonic. on_close: called once, on
    the engine thread, after its last launch. rung: in a word, how launches run, for those who ask.
    permits: for requests that are constrained; without it they are refused.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        *,
        vocab_size: int,
        clock: Callable[[], float] = time.monotonic,
        on_close: Callable[[], None] = lambda: None,
        rung: str = "",
        permits: Permits | None = None,
    ) -> None:
        self._rung = rung
        self._permits = permits
        # On the engine thread: those that are live, and of them those not yet to be planned.
        # They go by another id to who issues permits: an id may be used again before he knows.
        self._constrained: dict[str, str] = {}
        self._unpermitted: dict[str, NewRequest] = {}
        self._permit_numbers = count()
        self._permitted_at = 0.0  # when the last permit came, or was asked for behind none
        # After start(), touched by the engine thread alone, but for its `launch_counts`.
        self._scheduler = scheduler
        self.limits = scheduler.limits
        self.vocab_size = vocab_size
        self._clock = clock
        self._on_close = on_close
        # The thread owns the executor: device memory is free once it has ended.
        self._thread = threading.Thread(
            target=self._run, args=(executor,), name="duetjax-engine", daemon=True
        )
        self._stats = scheduler.stats()
        self._waits = Waits()
        self._over = threading.Event()  # the thread is about to end, or hangs
        self._completed: list[CompletedLaunch] = []  # this round, for watchers
        # _wakeup guards what follows; it is held for moments, never while a step or callback runs.
        self._wakeup = threading.Condition()
        self._phase = _Phase.NEW
        self._inbox: list[_Item] = []
        self._live: dict[str, None] = {}  # ids without a final output yet, oldest first
        self._handing_on: tuple[str, ...] = ()  # whose last outputs on_outputs has not yet taken
        self._failure: BaseException | None = None
        # Replaced and never changed, so that the thread may read it at any time.
        self._watchers: Mapping[object, LaunchWatcher] = {}

    def start(self, on_outputs: Callable[[StepOutputs], None]) -> None:
        """Starts the engine thread, which calls `on_outputs` with all outputs of a step at once.

        The next plan waits for `on_outputs`, so it should only pass the batch on. If it raises,
        nobody knows who was told what: the engine fails as if the device had, and every live
        request, those of the lost batch included, is offered an ERROR output in a last call.
        """
        with self._wakeup:
            assert self._phase is _Phase.NEW, f"start() of an engine that is {self._phase.value}"
            self._on_outputs = on_outputs
            self._phase = _Phase.RUNNING
        self._thread.start()

    def watch(self, seconds: float) -> None:
        """From now on the engine fails once a step, or a round of its thread, takes too long.

        Too long is more than `seconds`, or than `Watch` allows a step that was foretold to be
        long; 0 is never. The failure is an `EngineStalled` that says what hangs, and comes from a
        thread of its own: every live request then gets an ERROR output, whatever the engine's
        thread is waiting for. After `start`.
        """
        assert self._phase is not _Phase.NEW, "start() the engine before watching it"
        if seconds:
            threading.Thread(
                target=self._watch, args=(seconds,), name="duetjax-watchdog", daemon=True
            ).start()

    def submit(self, new: NewRequest) -> None:
        """Queues a request without waiting.

        Raises `InvalidRequest` for one that can never run or whose id is in use, `EngineDead`
        after a failure or shutdown; then it gets no output.
        """
        check_request(new, self.limits, self.vocab_size)
        check_constraint(new, self.constrains)
        with self._wakeup:
            if self._phase is not _Phase.RUNNING:
                assert self._phase is not _Phase.NEW, "start() the engine before submitting to it"
                raise EngineDead(why_not_running(self._failure))
            if new.id in self._live:
                raise InvalidRequest(f"request id {new.id!r} is already in use; choose another")
            self._live[new.id] = None
            self._inbox.append(new)
            self._wakeup.notify()

    def abort(self, request_id: str, *, unless_begun: bool = False) -> None:
        """Asks for a request to end before the next step; of no effect if it already has.

        Its last output then says ABORT, or how it finished if a step got there first.
        unless_begun: of no effect either on one that is no longer, or not only now, in the queue.
        """
        with self._wakeup:
            if request_id in self._live:
                self._inbox.append(_Abort(request_id, unless_begun))
                self._wakeup.notify()

    def watch_launches(self, watcher: LaunchWatcher) -> Callable[[], None]:
        """Tells `watcher` of launches as they complete, until what is returned here is called.

        All of one round of the engine's thread at once, on that thread, after the outputs have been
        handed on; so it should only keep them. A call may still be under way when it is ended, and
        nothing says that the engine has failed. If it raises, that is logged and it is told no
        more: whoever only looks on does requests no harm.
        """
        key = object()
        with self._wakeup:
            self._watchers = {**self._watchers, key: watcher}
        return lambda: self._end_watching(key)

    def stats(self) -> Stats:
        """The scheduler as of the last step's end, never older than the last outputs."""
        return self._stats

    def launch_counts(self) -> LaunchCounts:
        """Launches completed since the start, to the last one or two."""
        return self._scheduler.launch_counts()

    @property
    def rung(self) -> str:
        """In a word, how launches run."""
        return self._rung

    @property
    def constrains(self) -> bool:
        """Whether requests may be constrained: by a tokenizer, and an id that ends answers."""
        return self._permits is not None

    @property
    def num_slots(self) -> int:
        """How many requests can run at once."""
        return self.limits.num_slots

    @property
    def num_live(self) -> int:
        """Requests submitted and without a final output yet, those of this moment included."""
        return len(self._live)

    @property
    def failure(self) -> BaseException | None:
        """What killed the engine, None unless it is dead."""
        return self._failure

    @property
    def is_healthy(self) -> bool:
        """Whether the engine thread runs and takes requests, however busy it is."""
        return self._phase is _Phase.RUNNING and self._thread.is_alive()

    @property
    def silence(self) -> float:
        """Seconds that the slowest of what the engine waits for has taken so far; 0 when idle.

        A device that hangs shows here, by the engine's clock.
        """
        now = self._clock()
        return max((now - wait.since for wait in self._waits.current.values()), default=0.0)

    def shutdown(self, timeout: float) -> bool:
        """Ends the launches in flight, then every live request with ABORT, then the thread.

        False if that takes longer than `timeout` seconds, at once if the engine hangs: the live
        requests have then been given ERROR outputs from the calling thread, `failure` says why, and
        what launches may yet bring is dropped. May be called twice, but not from `on_outputs`.
        """
        with self._wakeup:
            was_started = self._phase is not _Phase.NEW
            self._phase = _Phase.CLOSED
            self._wakeup.notify()
        if not was_started:
            return True
        if self._over.wait(timeout) and not isinstance(self._failure, EngineStalled):
            self._thread.join()
        if self._thread.is_alive():
            self._fail(TimeoutError(f"launches in flight did not end within {timeout} s"))
            return False
        return True

    def _watch(self, seconds: float) -> None:
        """On the watchdog's thread, until the engine's ends or is given up."""
        watch = Watch(seconds)
        while not self._over.wait(watch.interval) and self._failure is None:
            now = self._clock()
            wait = watch.overdue(self._waits.current.values(), now)
            if wait is not None:
                failure = stalled(wait, now)
                _log.critical("the engine hangs: %s\n%s", failure, _stacks())
                self._fail(failure)

    def _end_watching(self, key: object) -> None:
        with self._wakeup:
            self._watchers = {k: each for k, each in self._watchers.items() if k is not key}

    def _deliver(self, item: FinishedStep | BaseException) -> None:
        """On the executor's thread."""
        with self._wakeup:
            self._inbox.append(item)
            self._wakeup.notify()

    def _deliver_permit(self, word: _Word) -> None:
        """On a thread that issues them; each time it wakes the engine's the two are in turns."""
        assert self._permits is not None, "a permit from nobody"
        with self._wakeup:
            if self._permits.is_idle or not self._inbox:
                self._wakeup.notify()
            if word is not None:
                self._inbox.append(word)

    # What follows runs on the engine thread.

    def _run(self, executor: Executor) -> None:
        self._waits.round_began(self._clock())
        try:
            executor.start(self._deliver)
            if self._permits is not None:
                self._permits.start(self._deliver_permit)
            self._serve(executor)
            self._abort_all()
        except BaseException as failure:  # whatever it is, nobody may be left waiting
            _log.critical("the engine failed and takes no more requests", exc_info=failure)
            self._fail(failure.with_traceback(None))  # its frames hold the executor
        try:
            if self._permits is not None:
                self._permits.close()
            executor.close()
            self._on_close()
        finally:
            self._over.set()

    def _serve(self, executor: Executor) -> None:
        """Round after round until shutdown, then until nothing is in flight."""
        self._waits.round_ended(self._clock(), has_requests=False)  # the executor has started
        while (inbox := self._next_inbox()) is not None:
            self._waits.round_began(self._clock())
            outputs = self._take_in(inbox)
            if self._constrained and self._scheduler.awaits_permits:
                outputs += self._take_in(self._next_permits())
            launches: tuple[Launch, ...] = ()
            if self._phase is _Phase.RUNNING:
                launches = self._scheduler.plan(self._clock())
                self._tell_permits(())  # who begins anew is found by planning
            for launch in launches:
                self._waits.begun(launch, self._clock())  # submitting may take as long as it does
                executor.submit(launch)
            self._stats = self._scheduler_stats()
            for batch in outputs:
                self._publish(batch)
            if self._completed:
                self._tell_watchers()
            self._waits.round_ended(
                self._clock(), has_requests=bool(self._live), permits=self._awaited_permits()
            )
        self._waits.round_began(self._clock())  # a last one, to close

    def _next_inbox(self) -> list[_Item] | None:
        """Sleeps until something happens; None once closed and nothing is in flight."""
        with self._wakeup:
            while not self._inbox:
                if self._phase is _Phase.CLOSED and not self._scheduler.num_in_flight:
                    return None
                self._wakeup.wait()
            inbox, self._inbox = self._inbox, []
            return inbox

    def _next_permits(self) -> list[Permit]:
        """Those that come in a moment: who is not in the next launch waits for the one after it.

        While nothing runs also those that come in the moments after that, as long as any come.
        """
        permits = self._permits
        assert permits is not None, "a request is held, and nobody issues permits"
        moments = 1 if self._scheduler.num_in_flight else _PERMIT_MOMENTS
        with self._wakeup:
            for _ in range(moments):
                before = sum(isinstance(item, Permit) for item in self._inbox)
                self._wakeup.wait_for(lambda: permits.is_idle, _PERMIT_SECONDS)
                came = [item for item in self._inbox if isinstance(item, Permit)]
                if permits.is_idle or len(came) == before:
                    break
            self._inbox = [item for item in self._inbox if not isinstance(item, Permit)]
            return came

    def _take_in(self, inbox: Iterable[_Item]) -> list[StepOutputs]:
        """Applies what happened, in the order in which it did."""
        self._scheduler.watcher = self._completed.append if self._watchers else None
        outputs = []
        for item in inbox:
            if isinstance(item, FinishedStep):
                now = self._clock()
                outputs.append(self._scheduler.commit(item, now))
                self._waits.finished(item, now)
            elif isinstance(item, NewRequest):
                self._add(item)
            elif isinstance(item, Permit):
                outputs += self._permit(item)
            elif isinstance(item, BaseException):
                raise item
            elif self._unpermitted.pop(item.id, None) is not None or self._scheduler.abort(
                item.id, unless_begun=item.unless_begun
            ):
                outputs.append(_ended(item.id, FinishReason.ABORT))
        self._tell_permits(outputs)
        return outputs

    def _scheduler_stats(self) -> Stats:
        """The scheduler now; whose grammar is not ready is in no line of his, but waits."""
        stats = self._scheduler.stats()
        if not self._unpermitted:
            return stats
        return replace(stats, waiting=stats.waiting + len(self._unpermitted))

    def _awaited_permits(self) -> float | None:
        """Since when the next one is waited for, if one is."""
        if not self._constrained:
            return None
        awaits = self._unpermitted or self._scheduler.awaits_permits
        return self._permitted_at if awaits else None

    def _add(self, new: NewRequest) -> None:
        if new.constraint is None:
            self._scheduler.add(new, self._clock())
        else:
            assert self._permits is not None, "a constrained request got past submit()"
            self._ask(self._permits)
            self._unpermitted[new.id] = new
            name = f"{new.id} {next(self._permit_numbers)}"
            self._constrained[new.id] = name
            self._permits.begin(name, new.constraint)

    def _permit(self, permit: Permit) -> list[StepOutputs]:
        self._permitted_at = self._clock()
        request_id = permit.id.rpartition(" ")[0]
        if self._constrained.get(request_id) != permit.id:
            return []  # it has ended
        new = self._unpermitted.pop(request_id, None)
        if permit.error:
            if new is None and not self._scheduler.abort(request_id):
                return []  # it has ended
            _log.warning("request %s cannot go on: %s", request_id, permit.error)
            return [_ended(request_id, FinishReason.CONSTRAINT)]
        own = replace(permit, id=request_id)
        if new is None:
            self._scheduler.permit(own)
        else:
            self._scheduler.add(new, self._clock(), own)
        return []

    def _ask(self, permits: Permits) -> None:
        """Something is about to be asked for; what is asked for already has waited for longer."""
        if permits.is_idle and not self._unpermitted:
            self._permitted_at = self._clock()

    def _tell_permits(self, outputs: Iterable[StepOutputs]) -> None:
        """What constrained requests have sampled, and which have ended."""
        permits = self._permits
        if permits is None or not self._constrained:
            return
        for request_id, token in self._scheduler.take_sampled():
            self._ask(permits)
            permits.sampled(self._constrained[request_id], token)
        for batch in outputs:
            for request_id, _ in batch.finished:
                if (name := self._constrained.pop(request_id, None)) is not None:
                    permits.end(name)

    def _publish(self, outputs: StepOutputs) -> None:
        """Hands on a step's outputs; the finished ones' ids are free from here on."""
        with self._wakeup:
            if self._failure is not None or not outputs:  # failed: everybody has been told
                return
            self._handing_on = tuple(request_id for request_id, _ in outputs.finished)
            for request_id in self._handing_on:
                del self._live[request_id]
        self._on_outputs(outputs)  # if it raises or hangs, `_fail` tells them again
        with self._wakeup:
            self._handing_on = ()

    def _tell_watchers(self) -> None:
        completed = tuple(self._completed)
        self._completed.clear()
        for key, watcher in self._watchers.items():
            try:
                watcher(completed)
            except Exception:
                _log.exception("a watcher of launches raised; it is told no more")
                self._end_watching(key)

    def _abort_all(self) -> None:
        """After shutdown: gives back what live requests hold and tells them, once each."""
        with self._wakeup:
            self._inbox.clear()
            live = tuple(self._live)
        for request_id in live:
            self._scheduler.abort(request_id)
        self._unpermitted.clear()
        self._stats = self._scheduler_stats()
        self._publish(StepOutputs(finished=tuple((i, FinishReason.ABORT) for i in live)))

    def _fail(self, failure: BaseException) -> None:
        """Marks the engine dead and gives every live request its last output."""
        with self._wakeup:
            self._phase = _Phase.CLOSED
            self._failure = self._failure or failure
            if isinstance(self._failure, EngineStalled):
                self._over.set()
            # Steps that have come still count, or the thread would wait for them.
            came = (FinishedStep, BaseException)
            self._inbox = [item for item in self._inbox if isinstance(item, came)]
            ended = dict.fromkeys((*self._live, *self._handing_on), FinishReason.ERROR)
            self._live.clear()
            self._handing_on = ()
        if not ended:
            return
        try:
            self._on_outputs(StepOutputs(finished=tuple(ended.items())))
        except Exception:
            _log.exception("on_outputs raised; %d requests may not know of the failure", len(ended))


def _ended(request_id: str, why: FinishReason) -> StepOutputs:
    return StepOutputs(finished=((request_id, why),))


def why_not_running(failure: BaseException | None) -> str:
    """Of an engine that takes no more requests; failure: what killed it, if anything did."""
    if failure is None:
        return "the engine has been shut down; start it again"
    return f"the engine has failed ({failure!r}); see its log, then start it again"


def check_constraint(new: NewRequest, constrains: bool) -> None:
    """Raises `InvalidRequest` for a constrained request to an engine that cannot have any."""
    if new.constraint is not None and not constrains:
        raise InvalidRequest(
            "this model has no tokenizer, or no end-of-sequence id, to keep an answer to a grammar"
            " or a budget by",
            code="unsupported_parameter",
        )


def check_request(new: NewRequest, limits: SchedulerLimits, vocab_size: int) -> None:
    """Raises `InvalidRequest` for a request that can never run.

    Also for ids outside [0, vocab_size), which the device would clamp without a word.
    """
    limits.check(new)
    if len(new.stop_ids) > MAX_STOP_IDS:
        raise InvalidRequest(
            f"stop_token_ids and the model's end-of-sequence ids are {len(new.stop_ids)}"
            f" together; at most {MAX_STOP_IDS} are possible",
            param="stop_token_ids",
        )
    _check_range(new.prompt, "prompt", vocab_size)
    _check_range(new.stop_ids, "stop_token_ids", vocab_size)
    _check_range(tuple(token for token, _ in new.sampling.biases), "logit_bias", vocab_size)


def _check_range(ids: tuple[int, ...], param: str, vocab_size: int) -> None:
    if not ids:
        return
    if set(map(type, ids)) != {int} or min(ids) < 0 or max(ids) >= vocab_size:
        at, wrong = next(
            (i, t) for i, t in enumerate(ids) if type(t) is not int or not 0 <= t < vocab_size
        )
        raise InvalidRequest(
            f"{param} token {at} is {wrong!r}; token ids are integers from 0 to {vocab_size - 1}",
            param=param,
        )


def _stacks() -> str:
    """Where every thread is, for the log: the only trace of what hangs."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
    )
