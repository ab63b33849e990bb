"""What is counted of launches: all of them once, in their buckets, and episodes with reasons."""

import marshal
import math
from bisect import bisect_left
from collections import Counter

import pytest
from foresight_run import AS_FORESEEN, SLO_MS, Truth, arrivals, foresight, policy
from foresight_run import Run as ForeseenRun
from scheduler_run import Run, limits, request

from duetjax.policy.durations import DurationTable
from duetjax.policy.flights import Pace
from duetjax.policy.launch import Lane, Program, Split
from duetjax.policy.launch_counts import (
    ERRORS,
    KINDS,
    NO_DECODES,
    NO_PROMPTS,
    SECONDS,
    STEPS,
    TOKENS,
    Histogram,
)
from duetjax.policy.policies import StaticSplit
from duetjax.wire import launch_counts, plain_counts

SPLIT = Split(decode=40, prefill=92)


def tally(bounds, values):
    """What a histogram of `values` says; the sum is approximate."""
    buckets = Counter(bisect_left(bounds, value) for value in values)
    counts = tuple(buckets[bucket] for bucket in range(len(bounds) + 1))
    return counts, pytest.approx(sum(values))


@pytest.fixture(scope="module")
def duet():
    """A duet's run, all that was told of its launches, and what was counted."""
    foresees = foresight()
    pace = Pace(foresees, tbt_slo_ms=SLO_MS)
    run = ForeseenRun(policy("duet", foresees), Truth(AS_FORESEEN), pace)
    told = []
    run.scheduler.watcher = told.append
    run.run(arrivals(15))
    return run, told, run.scheduler.launch_counts()


def test_every_launch_of_a_duet_is_counted_by_lane_program_and_split(duet):
    _, told, counts = duet
    cores = [each.split and (each.split.decode, each.split.prefill) for each in told]
    expected = Counter((e.lane, e.program, c) for e, c in zip(told, cores, strict=True))
    assert Counter({tuple(what): count for *what, count in counts.launches}) == expected
    assert len({split for _, _, split, _ in counts.launches}) > 2
    assert [(kind.lane, kind.program) for kind in counts.kinds] == [*KINDS]


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_its_histograms_hold_what_was_told_of_each(duet, kind):
    _, told, counts = duet
    mine = [each for each in told if (each.lane, each.program) == kind]
    assert mine
    [found] = [each for each in counts.kinds if (each.lane, each.program) == kind]
    predicted = [each.predicted_ms / 1e3 for each in mine]
    measured = [each.ended - each.began for each in mine]
    pairs = zip(predicted, measured, strict=True)
    assert found.steps == tally(STEPS, [each.k for each in mine])
    assert found.predicted == tally(SECONDS, predicted)
    assert found.measured == tally(SECONDS, measured)
    assert found.errors == tally(ERRORS, [abs(p - m) / m for p, m in pairs])


def test_tokens_are_counted_for_each_step(duet):
    _, told, counts = duet
    tokens = [each.decode_rows + each.prompt_tokens for each in told for _ in range(each.k)]
    assert counts.tokens == tally(TOKENS, tokens)


def test_every_episode_that_began_has_ended_for_a_reason(duet):
    run, _, counts = duet
    assert counts.begun > 1
    assert sum(number for _, number in counts.ended) == counts.begun
    assert {why for why, _ in counts.ended} <= {NO_PROMPTS, NO_DECODES, *run.decisions}


def ended(run):
    counts = run.scheduler.launch_counts()
    return counts.begun, dict(counts.ended)


def test_an_episode_ends_when_one_side_has_nothing_left():
    run = Run(limits(), StaticSplit(8, SPLIT, 1)).add(request("a", 3, 20))
    run.turn()
    assert ended(run) == (0, {})
    run.add(request("b", 8, 2))
    run.plan()
    assert ended(run) == (1, {})
    assert (run.stats.decode_cores, run.stats.prefill_cores) == (40, 92)
    run.finish_launch(Lane.DECODE)
    run.finish_launch(Lane.PREFILL)
    assert ended(run) == (1, {NO_PROMPTS: 1})
    assert (run.stats.decode_cores, run.stats.prefill_cores) == (0, 0)
    run.add(request("c", 20, 2))
    run.plan()
    run.abort("a")
    run.abort("b")
    run.finish_launch(Lane.DECODE)
    run.finish_launch(Lane.PREFILL)
    assert ended(run) == (2, {NO_PROMPTS: 1, NO_DECODES: 1})
    run.finish()
    run.check_end()


@pytest.mark.parametrize("foretold", [math.nan, math.inf])
def test_a_prediction_that_is_no_number_spoils_no_sum(foretold):
    table = DurationTable({(None, Program.PREFILL, 4): foretold, (None, Program.DECODE, 2): 5.0})
    run = Run(limits(), pace=Pace(table)).add(request("a", 3, 2))
    for run.now in (1.0, 2.0):
        run.plan()
        run.now += 0.5
        run.finish_launch()
    run.check_end()
    whole = {each.program: each for each in run.scheduler.launch_counts().kinds[:2]}
    assert whole["prefill"].predicted == tally(SECONDS, [])
    assert sum(whole["prefill"].measured[0]) == 1
    assert whole["decode"].predicted == tally(SECONDS, [0.005])


def test_a_value_on_a_bound_is_in_its_bucket_and_the_largest_in_the_last():
    histogram = Histogram((1, 2, 5))
    for value in (1, 1.5, 2, 5, 5.1):
        histogram.observe(value)
    histogram.observe(0, times=3)
    assert histogram.tally() == ((4, 2, 1, 1), 14.6)


def test_counts_cross_to_another_process(duet):
    counts = duet[2]
    assert launch_counts(marshal.loads(marshal.dumps(plain_counts(counts)))) == counts


# What a request is told of its launches.


def test_a_request_is_told_how_long_it_waited_and_how_many_launches_it_took():
    run = Run(limits(num_slots=1))
    told = []
    run.add(request("a", 10, 4), request("b", 3, 2))
    take = run.take
    run.take = lambda output: (told.append(output), take(output))
    began = run.now
    run.finish()
    run.check_end()
    first = {each.id: each for each in reversed(told)}
    last = {each.id: each for each in told}
    assert first["a"].queued_seconds == 0
    assert first["b"].queued_seconds > 0
    assert first["b"].queued_seconds <= run.now - began
    assert {name: each.num_launches for name, each in last.items()} == {"a": 2 + 3, "b": 1 + 1}
    others = [each for each in told if each not in (*first.values(), *last.values())]
    assert {(each.queued_seconds, each.num_launches) for each in others} == {(0.0, 0)}
