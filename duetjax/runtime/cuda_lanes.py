"""Runs launches as replays of recorded programs, on the lanes and splits of a GPU.

Nothing here waits for the GPU but a thread that is woken when steps have completed. A launch is a
few copies, of what it changes and brings, and k replays of one recording, all on its lane's stream.
Slots' tables, token counts and KV pages are shared by both lanes, each row and page having one user
at a time (docs/design.md); progress is each lane's own, and handed over row by row.
"""

import os
import selectors
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from duetjax.policy.launch import (
    Deliver,
    FinishedStep,
    Lane,
    Launch,
    Program,
    Split,
    StepResult,
)
from duetjax.runtime.executor import Inputs, read_step
from duetjax.runtime.programs import Key, Programs
from duetjax.runtime.slot_state import PROGRESS_WORDS, HostTables

if TYPE_CHECKING:
    from duetjax._launcher import Device
    from duetjax._launcher import Program as Recording

try:
    from duetjax._launcher import Busy
except ImportError:  # installed where there was no C compiler: nobody makes recordings then
    Busy = NotImplementedError  # type: ignore[assignment,misc]

RESULT_SLOTS = 256
"""Steps of a lane whose results the host may owe: two launches of the longest look-ahead fit."""

_MOST_STEPS = RESULT_SLOTS // 4
_PAUSE_S = 20e-6
_PROGRESS_BYTES = 4 * PROGRESS_WORDS


@dataclass(frozen=True, slots=True)
class Replay:
    """A recording and where it finds what a launch brings, in the order of `Inputs.of`."""

    recording: "Recording"
    inputs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """An array in device memory by rows, one per slot and the dummy's."""

    address: int
    row_bytes: int

    def row(self, slot: int) -> int:
        """Where a slot's row is."""
        return self.address + slot * self.row_bytes


@dataclass(frozen=True, slots=True)
class Recordings:
    """Everything that has been recorded; see `recorder`.

    of: by lane and program; those of WHOLE replay on the decode lane of split 0, the whole device.
    splits: those that every recording has been built for, with the launcher's number of each.
    tables: by their name in `SlotTables`. host_tables: what was in them when they were recorded.
    progress: of both lanes. kept: whatever must live as long as the recordings.
    """

    device: "Device"
    of: Mapping[tuple[Lane, Key], Replay]
    splits: Mapping[Split, int]
    tables: Mapping[str, Table]
    host_tables: HostTables
    counts: Table
    progress: Mapping[Lane, Table]
    kept: tuple[object, ...] = ()


class CudaLanes:
    """Implements `policy.launch.Executor`.

    A split that has not been built is served by the one nearest to it. `submit` waits only while a
    ring of the launcher is full, which takes more than two launches of a lane in flight.
    """

    def __init__(self, programs: Programs, recordings: Recordings) -> None:
        self._recordings = recordings
        self._device = recordings.device
        self._inputs = Inputs(programs)
        self._rows_of = programs.buckets.rows_of
        self._tables = recordings.host_tables
        self._lanes = [_Steps(self._device, number) for number in (0, 1)]
        self._thread: threading.Thread | None = None

    @property
    def splits(self) -> tuple[Split, ...]:
        """Those that launches can run on."""
        return tuple(self._recordings.splits)

    def run(self, launch: Launch) -> StepResult:
        """Runs one step at once, on the calling thread; only before `start`."""
        self.submit(launch)
        steps = self._lanes[number_of(launch.lane)]
        steps.wait()
        [(_, finished)] = steps.take()
        return self._read(launch, finished)

    def start(self, deliver: Deliver) -> None:
        """See `Executor`."""
        self._deliver = deliver
        self._closing, self._wake = os.pipe()
        self._thread = threading.Thread(
            target=self._deliver_all, name="duetjax-results", daemon=True
        )
        self._thread.start()

    def submit(self, launch: Launch) -> None:
        """See `Executor`. Raises what the launcher raises: the device has failed then."""
        lane, device = self._lanes[number_of(launch.lane)], self._device
        split = self._split(launch)
        replay = self._recordings.of[launch.lane, (launch.program, launch.bucket)]
        for name, slot in self._tables.apply(launch):
            row = np.ascontiguousarray(self._tables.row(name, slot)).view(np.uint8)
            lane.copy_in(split, self._recordings.tables[name].row(slot), row)
        for new in launch.admitted:
            if new.history:
                counts = self._tables.counts(new).view(np.uint8)
                lane.copy_in(split, self._recordings.counts.row(new.slot), counts)
        for slot, _ in launch.handovers:  # those launches have completed, so nobody waits for them
            own, theirs = (self._recordings.progress[each] for each in (Lane.DECODE, Lane.PREFILL))
            device.copy(lane.number, split, own.row(slot), theirs.row(slot), _PROGRESS_BYTES)
        for address, values in zip(replay.inputs, self._inputs.of(launch), strict=True):
            lane.copy_in(split, address, values.view(np.uint8))
        lane.launch(replay.recording, split, launch)

    def close(self) -> None:
        """See `Executor`."""
        if self._thread is not None:
            os.write(self._wake, b"x")
            self._thread.join()
            os.close(self._wake)
            os.close(self._closing)
            self._thread = None
        self._device.close()

    def _split(self, launch: Launch) -> int:
        """The launcher's number of the split that a launch runs on."""
        asked, built = launch.split, self._recordings.splits
        if launch.lane is Lane.WHOLE or asked is None or not built:
            return 0
        if asked in built:
            return built[asked]
        return built[min(built, key=lambda one: (abs(one.decode - asked.decode), one.decode))]

    def _deliver_all(self) -> None:
        try:
            with selectors.DefaultSelector() as waiting:
                waiting.register(self._device, selectors.EVENT_READ)
                waiting.register(self._closing, selectors.EVENT_READ, "closing")
                is_closing = False
                while not (is_closing and all(lane.is_idle for lane in self._lanes)):
                    if any(key.data == "closing" for key, _ in waiting.select()):
                        is_closing = True
                        waiting.unregister(self._closing)
                    self._device.clear()  # before looking: what completes from now on wakes again
                    self._deliver_completed()
        except BaseException as failure:  # the engine decides what it means
            for lane in self._lanes:
                lane.is_abandoned = True
            self._deliver(failure)

    def _deliver_completed(self) -> None:
        for lane in self._lanes:
            for (launch, step), data in lane.take():
                self._deliver(FinishedStep(launch.ticket, step, self._read(launch, data)))

    def _read(self, launch: Launch, data: bytes) -> StepResult:
        decode = launch.program is Program.DECODE
        rows = launch.bucket if decode else self._rows_of(launch.bucket)
        words = np.frombuffer(data, np.int32)
        top = words[3 * rows :].reshape(rows, -1, 2) if launch.wants_top else None
        return read_step(launch, words[: 3 * rows].reshape(rows, 3), top)


type _Step = tuple[Launch, int]


class _Steps:
    """A lane of the launcher: one thread gives it work, another takes the results.

    number: of the lane, as the launcher counts them. is_abandoned: nobody takes results any more.
    """

    def __init__(self, device: "Device", number: int) -> None:
        self.number = number
        self.is_abandoned = False
        self._device = device
        self._in_flight: deque[_Step | None] = deque()  # None: a fence
        self._submitted = 0
        self._taken = 0

    @property
    def is_idle(self) -> bool:
        """Whether everything submitted has been taken."""
        return not self._in_flight

    def copy_in(self, split: int, address: int, data: np.ndarray) -> None:
        """Before the next launch. Where the ring is full of copies for it, they go ahead."""
        try:
            self._device.copy_in(self.number, split, address, data.data)
        except Busy:
            self._submit([None], lambda: self._device.fence(self.number, split))
            self._when_free(lambda: self._device.copy_in(self.number, split, address, data.data))

    def launch(self, recording: "Recording", split: int, launch: Launch) -> None:
        """Its k steps, with the results that it wants; a long look-ahead in several pieces."""
        num_results = 2 if launch.wants_top else 1
        for first in range(0, launch.k, _MOST_STEPS):
            steps = range(first, min(first + _MOST_STEPS, launch.k))
            run = partial(recording.launch, self.number, split, len(steps), num_results)
            self._submit([(launch, step) for step in steps], run)

    def wait(self) -> None:
        """For all that has been submitted."""
        while not self._device.wait(self.number, self._submitted, 1.0):
            pass

    def take(self) -> Iterator[tuple[_Step, bytes]]:
        """The steps that have completed since the last time, with their results."""
        for number in range(self._taken + 1, self._device.completed(self.number) + 1):
            step, self._taken = self._in_flight.popleft(), number
            data = b"" if step is None else self._device.result(self.number, number)
            self._device.release(self.number, number)
            if step is not None:
                yield step, data

    def _submit(self, steps: Sequence["_Step | None"], enqueue: Callable[[], int]) -> None:
        self._in_flight.extend(steps)  # before one of them can complete
        self._submitted += len(steps)
        try:
            last = self._when_free(enqueue)
        except BaseException:
            self._submitted -= len(steps)
            for _ in steps:
                self._in_flight.pop()
            raise
        assert last == self._submitted, f"step {last} of the lane, not {self._submitted}"

    def _when_free[T](self, call: Callable[[], T]) -> T:
        while True:
            try:
                return call()
            except Busy:  # results are released, and copies' room is reclaimed, as steps complete
                if self.is_abandoned:
                    raise
                time.sleep(_PAUSE_S)


def number_of(lane: Lane) -> int:
    """The launcher's number of a lane; the whole device is the decode lane's."""
    return 0 if lane is Lane.PREFILL else 1  # enum duet_lane
