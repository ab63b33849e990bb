"""A device that computes nothing: each launch takes the time that somebody foretells.

Knows lanes, slots' positions and limits, and nothing of KV: whether pages are right is for the
tests' fake device to find out.
"""

import heapq
import threading
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from duetjax.policy.durations import Durations, Step
from duetjax.policy.launch import (
    Deliver,
    FinishedStep,
    Lane,
    Launch,
    RowFlag,
    SlotParams,
    StepResult,
    Ticket,
)
from duetjax.policy.scheduler import Steady
from duetjax.sim.clock import Clock, VirtualClock

type Sampler = Callable[[SlotParams, int], int]
"""The token that a slot's owner samples for a position."""

_SAMPLED, _STOPPED, _AT_LIMIT, _NON_FINITE = (
    int(flag) for flag in (RowFlag.SAMPLED, RowFlag.STOPPED, RowFlag.AT_LIMIT, RowFlag.NON_FINITE)
)

type StepsMs = Callable[[Step, int], NDArray[np.float64]]
"""Milliseconds of so many decode steps in a row, each row feeding one token more every time."""

type Columns = NDArray[np.int64]
type Floats = NDArray[np.float64]

MOST_SLOTS = 65_536
"""Slots are numbered below it."""


class SimulatedExecutor:
    """Implements `policy.launch.Executor` with given durations.

    A launch begins when it is submitted or when the one before it on its lane ends, whichever is
    later; its i-th step ends i + 1 step durations later. Lanes do not slow each other down beyond
    what the durations say of their split. Steps are handed out by time, then ticket, then step.

    On a real clock `start` it, and a thread delivers each step when its time has come. On a virtual
    clock nobody waits: leave `start` alone and call `advance` from the thread that submits.

    Logprobs are 0.0, alternatives none. Of the rows only positions, limits and stop ids are real.
    Without a sampler every token is 0 and stops nobody.
    """

    def __init__(self, durations: Durations, clock: Clock, sampler: Sampler | None = None) -> None:
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

    def skip(self, steady: Steady, until: float, steps_ms: StepsMs) -> Floats:
        """When the next steps end [n], n <= most, that do so before `until`; they have ended then.

        For a virtual clock, and whoever needs no results: in flight are one-step decode launches of
        the same rows, and each is followed by another. These take as long as steps_ms(the first of
        them, count) says, [count].
        """
        launch, most = steady.launch, steady.most
        with self._changed:
            flying = sorted(self._ends)
            step = self._fed.next_step(launch)
            seconds = steps_ms(step, most) / 1e3
            last = np.cumsum(np.concatenate(([flying[-1][0]], seconds)))
            ends = np.concatenate(([end for end, _, _ in flying[:-1]], last))
            count = min(most, int(np.searchsorted(ends, until)))
            if not count:
                return ends[:0]
            later = ends[count : count + len(flying)].tolist()
            self._ends = [(end, *rest) for end, (_, *rest) in zip(later, flying, strict=True)]
            self._free_at[launch.lane] = later[-1]
            for ticket, earlier in self._launches.items():
                self._slots.apply_deltas(earlier)
                self._launches[ticket] = replace(earlier, admitted=(), limits=())
            self._clock.wait(self._changed, ends.item(count - 1))
        fed = self._fed.skip(launch, count)
        self._slots.skip(launch, count, fed)
        return ends[:count]

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


class _Index:
    """Slots as an array; made once for launches that follow each other with the same rows."""

    def __init__(self) -> None:
        self._slots: tuple[int, ...] = ()
        self._index = np.zeros(0, np.int64)

    def of(self, slots: tuple[int, ...]) -> Columns:
        """The array."""
        if slots is not self._slots:
            self._slots, self._index = slots, np.array(slots, np.int64)
        return self._index


class _Fed:
    """How far each slot will be once what has been submitted is done, if no row stops early."""

    def __init__(self) -> None:
        self._position = np.zeros(MOST_SLOTS, np.int64)
        self._limit = np.zeros(MOST_SLOTS, np.int64)
        self._index = _Index()

    def step(self, launch: Launch) -> Step:
        """What the launch's first step computes; moves its slots on."""
        for slot, limit in launch.limits:
            self._limit[slot] = limit
        slots = self._index.of(launch.slots)
        before = self._position[slots]
        after = np.minimum(before + launch.k, self._limit[slots])
        new: Columns | int = 1
        if launch.counts:
            counts = np.array(launch.counts, np.int64)
            is_chunk, new = counts > 0, np.maximum(counts, 1)
            before = np.where(is_chunk, launch.starts, before)
            after = np.where(is_chunk, before + counts, after)
        self._position[slots] = after
        return self._step(launch, new, before)

    def next_step(self, launch: Launch) -> Step:
        """What another decode launch with the same rows would compute."""
        return self._step(launch, 1, self._position[self._index.of(launch.slots)])

    def skip(self, launch: Launch, count: int) -> Columns:
        """So many more steps of a launch's rows; how far they are then."""
        slots = self._index.of(launch.slots)
        self._position[slots] += count
        return self._position[slots]

    def _step(self, launch: Launch, new: Columns | int, before: Columns) -> Step:
        return Step(launch.lane, launch.split, launch.program, launch.bucket, new, before)


class _Slots:
    """Answers launches step by step, in the order in which a device would take them.

    position: where the next token of a slot is fed.
    """

    def __init__(self, sampler: Sampler | None) -> None:
        self._sampler = sampler
        self._params: dict[int, SlotParams] = {}
        self._allowed: dict[int, bytes] = {}  # masks of slots that may not sample everything
        self._position = np.zeros(MOST_SLOTS, np.int64)
        self._limit = np.zeros(MOST_SLOTS, np.int64)
        self._has_stopped = np.zeros(MOST_SLOTS, np.bool_)
        self._index = _Index()

    def run(self, launch: Launch, step: int) -> StepResult:
        """One step; the launch's deltas apply before its first."""
        if step == 0:
            self.apply_deltas(launch)
        slots = self._index.of(launch.slots)
        after, limit = self._position[slots] + 1, self._limit[slots]
        samples = after <= limit
        if self._sampler is not None:
            samples &= ~self._has_stopped[slots]
        if launch.counts:
            counts = np.array(launch.counts, np.int64)
            is_chunk = counts > 0
            moves = is_chunk | samples
            after = np.where(is_chunk, counts + launch.starts, after)
            samples = np.where(is_chunk, launch.samples, samples)
            self._position[slots[moves]] = after[moves]
        else:
            self._position[slots] += samples
        flags = samples * np.uint8(_SAMPLED)
        if (at_limit := samples & (after >= limit)).any():
            flags[at_limit] |= _AT_LIMIT
        tokens = np.zeros(len(slots), np.int32)
        if self._sampler is not None:
            for row in samples.nonzero()[0].tolist():
                tokens[row], stopped = self._sample(self._sampler, launch.slots[row])
                flags[row] |= stopped
        return StepResult(
            tokens=tokens,
            flags=flags,
            logprobs=np.zeros(len(slots), np.float32),
            top=((),) * len(slots) if launch.wants_top else (),
        )

    def apply_deltas(self, launch: Launch) -> None:
        """Slots have new owners and limits."""
        for params in launch.admitted:
            self._params[params.slot] = params
            self._position[params.slot] = self._limit[params.slot] = 0
            self._has_stopped[params.slot] = False
            self._allowed.pop(params.slot, None)
        for slot, limit in launch.limits:
            self._limit[slot] = limit
        for slot, mask in launch.allowed:
            self._allowed[slot] = mask

    def skip(self, launch: Launch, count: int, limits: Columns) -> None:
        """So many more steps of a launch's rows, which may go as far as `limits`, or further.

        Where they have got new pages meanwhile, a later launch tells.
        """
        slots = self._index.of(launch.slots)
        self._position[slots] += count
        self._limit[slots] = np.maximum(self._limit[slots], limits)

    def _sample(self, sampler: Sampler, slot: int) -> tuple[int, int]:
        """The token that will stand at the slot's position, and whether it stops the row."""
        params, position = self._params[slot], self._position.item(slot)
        token = sampler(params, position)
        if mask := self._allowed.get(slot):
            chosen = _allowed(mask, token, params.stop_ids)
            if chosen is None:
                self._has_stopped[slot] = True
                return token, _NON_FINITE
            token = chosen
        if token not in params.stop_ids:
            return token, 0
        if position < params.num_prompt + params.sampling.min_tokens:
            return _lowest_but(params.stop_ids), 0  # stop ids have no probability yet
        self._has_stopped[slot] = True
        return token, _STOPPED


def _allowed(mask: bytes, token: int, stop_ids: tuple[int, ...]) -> int | None:
    """A token that a mask of `Launch.allowed` has: an end if there is one, or one by `token`."""
    ids = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little").nonzero()[0].tolist()
    ends = [end for end in stop_ids if end in ids]
    if not ids:
        return None
    return ends[0] if ends else ids[token % len(ids)]


def _lowest_but(stop_ids: tuple[int, ...]) -> int:
    """The lowest token id that is not one of these."""
    return next(token for token in range(len(stop_ids) + 1) if token not in stop_ids)
