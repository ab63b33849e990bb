"""A device that computes nothing: each launch takes the time that somebody foretells.

Knows lanes, slots' positions and limits, and nothing of KV: whether pages are right is for the
tests' fake device to find out.
"""

import heapq
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from duetjax.policy.durations import Durations, Step
from duetjax.policy.launch import (
    Deliver,
    FinishedStep,
    Lane,
    Launch,
    Program,
    RowFlag,
    SlotParams,
    StepResult,
    Ticket,
)
from duetjax.sim.clock import Clock, VirtualClock

type Sampler = Callable[[SlotParams, int], int]
"""The token that a slot's owner samples for a position."""

_SAMPLED, _STOPPED, _AT_LIMIT = (
    int(flag) for flag in (RowFlag.SAMPLED, RowFlag.STOPPED, RowFlag.AT_LIMIT)
)

type _Row = tuple[int, int]
_NOTHING: _Row = (0, 0)


def _token_zero(params: SlotParams, position: int) -> int:
    return 0


class SimulatedExecutor:
    """Implements `policy.launch.Executor` with given durations.

    A launch begins when it is submitted or when the one before it on its lane ends, whichever is
    later; its i-th step ends i + 1 step durations later. Lanes do not slow each other down beyond
    what the durations say of their split. Steps are handed out by time, then ticket, then step.

    On a real clock `start` it, and a thread delivers each step when its time has come. On a virtual
    clock nobody waits: leave `start` alone and call `advance` from the thread that submits.

    Logprobs are 0.0, alternatives none. Of the rows only positions, limits and stop ids are real.
    """

    def __init__(self, durations: Durations, clock: Clock, sampler: Sampler = _token_zero) -> None:
        self._durations = durations
        self._clock = clock
        self._slots = _Slots(sampler)  # touched by whoever calls `advance` alone
        self._fed = _Fed()  # touched by whoever calls `submit` alone
        self._thread: threading.Thread | None = None
        # _changed guards what follows.
        self._changed = threading.Condition()
        self._ends: list[tuple[float, Ticket, int]] = []  # a heap of steps in flight
        self._launches: dict[Ticket, Launch] = {}  # in flight
        self._free_at = dict.fromkeys(Lane, 0.0)
        self._is_closing = False

    def start(self, deliver: Deliver) -> None:
        """Starts the thread that waits for steps to end; see `Executor`."""
        assert not isinstance(self._clock, VirtualClock), "a virtual clock is driven by advance()"
        assert self._thread is None, "started twice"
        self._thread = threading.Thread(
            target=self._run, args=(deliver,), name="duetjax-simulated-device", daemon=True
        )
        self._thread.start()

    def submit(self, launch: Launch) -> None:
        """Puts a launch on its lane."""
        step_seconds = self._durations.step_ms(self._fed.step(launch)) / 1e3
        with self._changed:
            assert not self._is_closing, f"{launch} after close()"
            busy = {other.lane for other in self._launches.values()} - {launch.lane}
            assert not busy or Lane.WHOLE not in (launch.lane, *busy), f"{launch} beside {busy}"
            begin = max(self._clock.now(), self._free_at[launch.lane])
            ends = [begin + (step + 1) * step_seconds for step in range(launch.k)]
            for step, end in enumerate(ends):
                heapq.heappush(self._ends, (end, launch.ticket, step))
            self._free_at[launch.lane] = ends[-1]
            self._launches[launch.ticket] = launch
            self._changed.notify()

    @property
    def next_end(self) -> float | None:
        """When the next step ends, in the clock's seconds; None where none is in flight."""
        with self._changed:
            return self._ends[0][0] if self._ends else None

    def advance(self) -> tuple[FinishedStep, ...]:
        """Lets time pass until the next step ends: it, and whatever else has ended by then.

        Empty where nothing is in flight.
        """
        with self._changed:
            while self._ends and self._ends[0][0] > self._clock.now():
                self._clock.wait(self._changed, self._ends[0][0])
            ended = []
            while self._ends and self._ends[0][0] <= self._clock.now():
                _, ticket, step = heapq.heappop(self._ends)
                launch = self._launches[ticket]
                ended.append((launch, step))
                if step == launch.k - 1:
                    del self._launches[ticket]
        return tuple(
            FinishedStep(launch.ticket, step, self._slots.run(launch, step))
            for launch, step in ended
        )

    def close(self) -> None:
        """Waits for launches in flight, whose steps are delivered if `start` was called."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()
        else:
            while self.advance():
                pass

    def _run(self, deliver: Deliver) -> None:
        try:
            while self._wait_for_work():
                for finished in self.advance():
                    deliver(finished)
        except BaseException as failure:  # the engine decides what it means
            deliver(failure)

    def _wait_for_work(self) -> bool:
        """Sleeps until something is in flight; False once nothing is and nothing will be."""
        with self._changed:
            self._changed.wait_for(lambda: self._ends or self._is_closing)
            return bool(self._ends)


class _Fed:
    """How far each slot will be once what has been submitted is done, if no row stops early."""

    def __init__(self) -> None:
        self._position: dict[int, int] = {}
        self._limit: dict[int, int] = {}

    def step(self, launch: Launch) -> Step:
        """What the launch's first step computes; moves its slots on."""
        self._limit.update(launch.limits)
        counts = launch.counts or (0,) * len(launch.slots)
        starts = launch.starts or counts
        new, cached = [], []
        for slot, start, count in zip(launch.slots, starts, counts, strict=True):
            before = start if count else self._position[slot]
            new.append(count or 1)
            cached.append(before)
            after = before + (count or launch.k)
            self._position[slot] = after if count else min(after, self._limit[slot])
        columns = np.array(new, np.int64), np.array(cached, np.int64)
        return Step(launch.lane, launch.split, launch.program, launch.bucket, *columns)


@dataclass(slots=True)
class _Slot:
    """What a device keeps for a slot's owner: the position its next token is fed at, its limit."""

    params: SlotParams
    position: int = 0
    limit: int = 0
    has_stopped: bool = False


class _Slots:
    """Answers launches step by step, in the order in which a device would take them."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        self._slots: dict[int, _Slot] = {}

    def run(self, launch: Launch, step: int) -> StepResult:
        """One step; the launch's deltas apply before its first."""
        if step == 0:
            self._apply_deltas(launch)
        if launch.program is Program.DECODE:
            rows = [self._decode(self._slots[slot]) for slot in launch.slots]
        else:
            columns = (launch.slots, launch.starts, launch.counts, launch.samples)
            rows = [
                self._prefill(self._slots[slot], start, count, samples)
                for slot, start, count, samples in zip(*columns, strict=True)
            ]
        return StepResult(
            tokens=np.array([token for token, _ in rows], np.int32),
            flags=np.array([flags for _, flags in rows], np.uint8),
            logprobs=np.zeros(len(rows), np.float32),
            top=((),) * len(rows) if launch.wants_top else (),
        )

    def _apply_deltas(self, launch: Launch) -> None:
        for params in launch.admitted:
            self._slots[params.slot] = _Slot(params)
        for slot, limit in launch.limits:
            self._slots[slot].limit = limit

    def _prefill(self, slot: _Slot, start: int, count: int, samples: bool) -> _Row:
        """A row of a prefill launch: a chunk, or a decoding row where `count` is 0."""
        if count == 0:
            return self._decode(slot)
        slot.position = start + count
        return self._sample(slot) if samples else _NOTHING

    def _decode(self, slot: _Slot) -> _Row:
        if slot.has_stopped or slot.position >= slot.limit:
            return _NOTHING
        slot.position += 1
        return self._sample(slot)

    def _sample(self, slot: _Slot) -> _Row:
        """The token that will stand at the slot's position, and what becomes of the row."""
        params, flags = slot.params, _SAMPLED
        token = self._sampler(params, slot.position)
        if token in params.stop_ids:
            if slot.position < params.num_prompt + params.sampling.min_tokens:
                token = _lowest_but(params.stop_ids)  # stop ids have no probability yet
            else:
                slot.has_stopped = True
                flags |= _STOPPED
        if slot.position >= slot.limit:
            flags |= _AT_LIMIT
        return token, flags


def _lowest_but(stop_ids: tuple[int, ...]) -> int:
    """The lowest token id that is not one of these."""
    return next(token for token in range(len(stop_ids) + 1) if token not in stop_ids)
