"""Whether launches wait for rows under a grammar, on a device whose time is told."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from constrained_run import ConstrainedRun, constraint
from scheduler_run import limits, request

from duetjax.policy.flights import Pace
from duetjax.policy.gathering import Gathering
from duetjax.policy.launch import Lane, Program
from duetjax.policy.policies import Aggregate
from duetjax.policy.scheduler import Scheduler

LAUNCH_MS, GAP_MS, TOKENS = 10.0, 1.0, 40
BOUNDS = limits(
    num_pages=200,
    max_model_len=128,
    num_slots=16,
    decode_buckets=(16,),
    prefill_buckets=(24,),
    max_num_batched_tokens=24,
    launches_per_lane=2,
)


class TimedRun(ConstrainedRun):
    """Every launch takes as long, and from a launch's end it takes a moment until the next plan.

    unseen_ms: after which it runs, if nothing else does. idle_ms: how long the device waited for
    launches, behind the first.
    """

    def __init__(self, gap_ms=GAP_MS, slo_ms=50.0, unseen_ms=0.0):
        super().__init__(BOUNDS)
        self.scheduler = Scheduler(BOUNDS, pace=Pace(tbt_slo_ms=slo_ms))
        self.gap_ms, self.idle_ms, self.free = gap_ms, 0.0, 0.0
        self.unseen_ms = unseen_ms

    def finish(self, later=None):
        """later: requests that come when there have been so many launches."""
        began, later = {}, later or {}
        while self.scheduler.has_work:
            if (new := later.pop(len(self.launches), None)) is not None:
                self.add(new)
            began |= {launch.ticket: self.now for launch in self.plan()}
            [launch, _] = self.in_flight[Lane.WHOLE][0]
            start = max(self.free, began[launch.ticket] + self.unseen_ms / 1e3)
            self.idle_ms += 1e3 * (start - self.free)
            self.now = self.free = start + LAUNCH_MS / 1e3
            self.finish_launch()
            self.now += self.gap_ms / 1e3
        self.check_end()
        return self

    @property
    def decodes(self):
        return sum(launch.program is Program.DECODE for launch in self.launches)


def answered(*texts, **timing):
    """A run with a request for each text, two prompts a launch. None: plain, and twice as long."""
    run = TimedRun(**timing)
    for i, text in enumerate(texts):
        tokens = TOKENS if text or not any(texts) else 2 * TOKENS
        new = request(f"r{i}", prompt_len=12, max_tokens=tokens)
        run.add(replace(new, constraint=constraint(text)))
    run.finish().check_answers()
    return run


def grammars(count):
    return [f"one {i}" for i in range(count)]


def test_rows_under_grammars_find_together():
    together = answered(*grammars(8))
    assert 0.9 * TOKENS < together.decodes < 1.2 * TOKENS
    assert together.idle_ms < 1.2 * GAP_MS * together.decodes


def test_without_waiting_they_would_take_turns(monkeypatch):
    monkeypatch.setattr(Gathering, "waits", lambda *_: False)
    assert answered(*grammars(8)).decodes > 1.8 * TOKENS


def test_a_few_plain_rows_among_them_wait_too():
    run = answered(*grammars(8), None)
    assert GAP_MS * 0.8 * TOKENS < run.idle_ms < GAP_MS * 1.2 * TOKENS
    assert run.decodes <= 2.2 * TOKENS


@pytest.mark.parametrize(
    ("texts", "timing"),
    [
        pytest.param([*grammars(1), *[None] * 7], {}, id="most rows are plain"),
        pytest.param([*[f"free {i}" for i in range(7)], None], {}, id="permits for all steps"),
        pytest.param(
            [*grammars(6), None],
            {"slo_ms": LAUNCH_MS + GAP_MS / 2},
            id="it would break the objective",
        ),
    ],
)
def test_nobody_waits_where(texts, timing):
    assert answered(*texts, **timing).idle_ms == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("timing", [{"gap_ms": 8.0}, {"gap_ms": 1.0, "unseen_ms": 7.0}], ids=str)
def test_nobody_goes_on_waiting_where_gaps_are_long(timing):
    run = answered(*grammars(6), None, **timing)
    assert 0 < run.idle_ms < 0.3 * 8.0 * TOKENS


def test_who_has_waited_too_long_tries_again_later():
    run = TimedRun()
    gathering = run.scheduler._gathering
    gathering._gap_ms = LAUNCH_MS
    for number in range(20):
        for text in (*grammars(2), None, None):
            new = request(f"{number} {text} {len(run.added)}", prompt_len=12, max_tokens=TOKENS)
            run.add(replace(new, constraint=constraint(text)))
    run.finish()
    assert gathering._gap_ms < 0.5 * LAUNCH_MS


def test_prompts_hardly_lose_by_it():
    run = TimedRun()
    run.add(replace(request("g", max_tokens=TOKENS), constraint=constraint("one 1")))
    for number in range(30):
        run.add(request(f"p{number}", prompt_len=100, max_tokens=1))
    run.finish()
    prefills = sum(launch.program is Program.PREFILL for launch in run.launches)
    assert prefills > 100
    assert run.idle_ms < 0.1 * GAP_MS * prefills


def test_a_lane_that_has_nothing_to_do_is_no_gap():
    run = TimedRun()
    gathering = run.scheduler._gathering
    for number in range(20):
        news = [request(f"{number} {text}", max_tokens=4) for text in grammars(2)]
        run.add(*(replace(new, constraint=constraint("one 1")) for new in news))
        run.finish()
        run.now = run.free = run.now + 10.0  # nobody is there
    assert gathering._gap_ms == pytest.approx(GAP_MS, rel=0.1)


def test_only_the_lane_that_rows_are_held_for_has_a_gap():
    busy = set()
    lanes = SimpleNamespace(
        is_busy=busy.__contains__, idle_ms=lambda lane: 30.0, took_ms=lambda lane: 150.0
    )
    gathering = Gathering(lanes, SimpleNamespace(held=["g"]), lambda: 50.0)

    def learned(before, after):
        busy.update(before)
        gathering.planned()
        busy.clear()
        gathering.begins(after)
        launch = SimpleNamespace(lane=after, k=1, program=Program.DECODE)
        gathering.ended(SimpleNamespace(launch=launch, began=0.0), began=0.0)
        return gathering._gap_ms > GAP_MS

    assert not learned({Lane.DECODE, Lane.PREFILL}, Lane.PREFILL)
    assert not learned({Lane.DECODE}, Lane.WHOLE)
    assert not learned({Lane.WHOLE}, Lane.DECODE)
    assert learned({Lane.DECODE, Lane.PREFILL}, Lane.DECODE)


class Owing:
    """Decode alone, then the prompts that are owed a launch, in turn."""

    def __init__(self):
        self._owes = False

    def decide(self, load):
        owed, self._owes = self._owes, False
        if not (load.rows and load.prompt_tokens):
            return Aggregate(24)
        if owed:
            return Aggregate(24, decodes=False)
        self._owes = True
        return Aggregate(load.rows)


def test_what_a_policy_owes_to_prompts_is_not_lost_by_waiting():
    run, late = TimedRun(), request("late", prompt_len=20, max_tokens=2)
    run.scheduler = Scheduler(BOUNDS, Owing(), Pace())
    for number, text in enumerate(grammars(8)):
        new = request(f"g{number}", prompt_len=3, max_tokens=TOKENS)
        run.add(replace(new, constraint=constraint(text)))
    run.finish(later={5: late})
    prefills = [i for i, launch in enumerate(run.launches) if launch.program is Program.PREFILL]
    assert 5 <= prefills[-1] < 10
    assert len(run.launches) > TOKENS
