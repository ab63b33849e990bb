"""Cases timed on an executor that takes a known time: what is told is what its steps took."""

import heapq
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from profiled_setup import LIMITS, a_grid

from duetjax.config import DuetJAXError
from duetjax.policy.grid import STEPS, Case, Shape
from duetjax.policy.launch import FinishedStep, Lane, Launch, Program, RowFlag, Split, StepResult
from duetjax.runtime import case_timer as module
from duetjax.runtime.case_timer import CaseTimer

VOCAB, ROOM, SPLIT = 100, 64, Split(4, 4)
DECODE = Shape(Program.DECODE, 4, (10, 20, 30), k=2)
PREFILL = Shape(Program.PREFILL, 64, (), ((5, 40), (0, 9)))
MIXED = Shape(Program.PREFILL, 64, (7, 8), ((16, 30),))


@dataclass(order=True)
class Due:
    """A step that is to be delivered."""

    at: float
    number: int
    launch: Launch = field(compare=False)
    step: int = field(compare=False)


class Device:
    """Takes so many seconds a step on each lane, `times` as long beside the other one.

    It is the clock, and delivers a step when it is waited for: `get` stands for the queue's.
    """

    def __init__(self, decode_s=0.002, prefill_s=0.010, times=1.0, flags=RowFlag.SAMPLED):
        self.now, self.launches, self.flags = 100.0, [], flags
        self._seconds = {Program.DECODE: decode_s, Program.PREFILL: prefill_s}
        self._times = times
        self._free = dict.fromkeys(Lane, 0.0)
        self._due = []

    def start(self, deliver):
        self._deliver = deliver

    def submit(self, launch):
        self.launches.append(launch)
        seconds = self._seconds[launch.program]
        seconds *= 1.0 if launch.lane is Lane.WHOLE else self._times
        at = max(self.now, self._free[launch.lane])
        for step in range(launch.k):
            at += seconds
            heapq.heappush(self._due, Due(at, len(self.launches), launch, step))
        self._free[launch.lane] = at

    def advance(self):
        due = heapq.heappop(self._due)
        self.now = due.at
        rows = len(due.launch.slots)
        result = StepResult([0] * rows, [self.flags] * rows, [0.0] * rows)
        self._deliver(FinishedStep(due.launch.ticket, due.step, result))

    @property
    def is_idle(self):
        return not self._due


def timer(device, monkeypatch, limits=LIMITS, room=ROOM):
    made = CaseTimer(device, limits, room, VOCAB, clock=lambda: device.now)
    inner = made._delivered

    class Queue:
        def put(self, item):
            inner.put(item)

        def get(self, timeout):
            assert timeout == module.PATIENCE_S
            if inner.empty() and not device.is_idle:
                device.advance()
            return inner.get_nowait()

    monkeypatch.setattr(made, "_delivered", Queue())
    return made


@pytest.mark.parametrize(
    ("shape", "ms"),
    [(DECODE, 2.0), (PREFILL, 10.0), (MIXED, 10.0)],
    ids=["decode", "prefill", "mixed"],
)
@pytest.mark.parametrize("split", [None, SPLIT])
def test_a_step_takes_from_the_completion_before_it_to_its_own(shape, ms, split, monkeypatch):
    device = Device()
    [timing] = timer(device, monkeypatch).time(Case(split, (shape,)), [5])
    assert timing.ms == pytest.approx(ms)
    assert timing.num_steps >= 5
    assert device.is_idle


def test_both_lanes_are_kept_busy_until_each_has_been_timed_beside_the_other(monkeypatch):
    device = Device(times=1.5)
    decode, prefill = timer(device, monkeypatch).time(Case(SPLIT, (DECODE, PREFILL)), [5, 3])
    assert decode.ms == pytest.approx(3.0)
    assert prefill.ms == pytest.approx(15.0)
    assert prefill.num_steps >= 3
    assert decode.num_steps >= 3 * 5 - 2
    assert {each.lane for each in device.launches} == {Lane.WHOLE, Lane.DECODE, Lane.PREFILL}


def test_steps_that_ran_beside_nothing_do_not_count(monkeypatch):
    """Decode has room for 64 steps, which end while the second prompt is computed."""
    device = Device(decode_s=0.001, prefill_s=0.05)
    decode, prefill = timer(device, monkeypatch).time(Case(SPLIT, (DECODE, PREFILL)), [5, 3])
    assert decode.ms == pytest.approx(1.0)
    assert prefill is None


def test_rows_decode_at_their_contexts_on_pages_of_their_own(monkeypatch):
    device = Device()
    timer(device, monkeypatch).time(Case(SPLIT, (DECODE, PREFILL)), [5, 3])
    first, *others = device.launches
    assert (first.lane, first.program, first.bucket) == (Lane.WHOLE, Program.PREFILL, 64)
    assert (first.slots, first.starts) == ((0, 1, 2), (9, 19, 29))
    assert (first.counts, first.samples) == ((1, 1, 1), (True, True, True))
    assert [new.slot for new in first.admitted] == [0, 1, 2, 3, 4]
    assert dict(first.limits) == {0: 10 + ROOM, 1: 20 + ROOM, 2: 30 + ROOM, 3: 45, 4: 9}
    pages = [page for _, _, page in first.pages]
    assert sorted(pages) == list(range(1, len(pages) + 1))
    for slot, tokens in dict(first.limits).items():
        assert len([one for one in first.pages if one[0] == slot]) == -(-tokens // LIMITS.page_size)
    assert not any(each.admitted or each.pages or each.limits for each in others)
    assert {each.slots for each in others} == {(0, 1, 2), (3, 4)}


def test_without_rows_that_decode_the_first_launch_brings_what_is_new(monkeypatch):
    device = Device()
    timer(device, monkeypatch).time(Case(None, (PREFILL,)), [3])
    first, *others = device.launches
    assert (first.starts, first.counts) == ((5, 0), (40, 9))
    assert len(first.tokens) == 49
    assert max(first.tokens) < VOCAB
    assert len(first.admitted) == 2
    assert not any(each.admitted for each in others)


def test_a_mixed_launch_has_its_decoding_rows_first(monkeypatch):
    device = Device()
    timer(device, monkeypatch).time(Case(None, (MIXED,)), [3])
    launch = device.launches[1]
    assert (launch.slots, launch.starts, launch.counts) == ((0, 1, 2), (0, 0, 16), (0, 0, 30))
    assert launch.samples == (True, True, True)


@pytest.mark.parametrize("longest", [8, 32, 1024])
def test_tickets_never_come_twice_and_no_row_outruns_its_pages(longest, monkeypatch):
    device = Device(times=1.3)
    grid = a_grid(3, limits=replace(LIMITS, max_model_len=longest))
    each_case = timer(device, monkeypatch, room=grid.steps)
    cases = grid.cases(120, 1e9)
    for case in cases:
        timings = each_case.time(case, [4] * len(case.shapes))
        assert longest < 1024 or timings[0] is not None
    tickets = [launch.ticket for launch in device.launches]
    assert len(set(tickets)) == len(tickets)
    steps = np.zeros(LIMITS.num_slots)
    for launch in device.launches:
        for new in launch.admitted:
            steps[new.slot] = 0
        if launch.program is Program.DECODE:
            steps[list(launch.slots)] += launch.k
            assert steps.max() <= min(STEPS, grid.steps)


def test_what_the_executor_delivers_in_place_of_a_step_is_raised(monkeypatch):
    device = Device()
    made = timer(device, monkeypatch)
    made._delivered.put((RuntimeError("the device is gone"), 0.0))
    with pytest.raises(RuntimeError, match="is gone"):
        made.time(Case(None, (DECODE,)), [3])


def test_a_row_that_samples_nothing_is_not_what_serves(monkeypatch):
    device = Device(flags=RowFlag.NON_FINITE)
    with pytest.raises(DuetJAXError, match="not finite; choose another --dtype"):
        timer(device, monkeypatch).time(Case(None, (DECODE,)), [3])


def test_a_step_that_never_comes_is_given_up(monkeypatch):
    monkeypatch.setattr(module, "PATIENCE_S", 0.01)

    class Deaf:
        def start(self, deliver):
            pass

        def submit(self, launch):
            pass

    with pytest.raises(DuetJAXError, match=r"within 0\.01 s"):
        CaseTimer(Deaf(), LIMITS, ROOM, VOCAB).time(Case(None, (DECODE,)), [3])
