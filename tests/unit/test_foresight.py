"""Schedulers that look ahead, on devices that do as foretold.

Share over: of the gaps between tokens, how many exceed the objective. test_attainment.py has the
devices that do otherwise.
"""

from functools import cache

import numpy as np
import pytest
from foresight_run import (
    AS_FORESEEN,
    BUDGET,
    SLO_MS,
    Run,
    Truth,
    arrivals,
    foresight,
    noisily,
    policy,
    simulate,
)

from duetjax.policy.flights import Pace
from duetjax.policy.launch import Lane, Program, Split

WHENEVER_MS = 60_000.0


@cache
def as_foreseen(kind, slo_ms=SLO_MS, requests=40):
    return simulate(kind, AS_FORESEEN, slo_ms=slo_ms, trace=arrivals(requests))


def size(launch):
    """Tokens of a launch, a decoding row being one."""
    return sum(count or 1 for count in launch.counts)


# A device that does as foretold.


def test_duet_holds_the_objective_where_aggregated_breaks_it():
    assert as_foreseen("aggregated").share_over(SLO_MS) > 0.05
    assert as_foreseen("duet").share_over(SLO_MS) < 0.01


def test_no_gap_of_a_duet_is_a_tenth_too_long_not_even_a_prompt_s_first():
    # An episode keeps its split, which the rows that join it may outgrow.
    gaps = as_foreseen("duet").gaps
    assert max(gap.ms for gap in gaps) <= 1.1 * SLO_MS
    assert max(gap.ms for gap in gaps if gap.is_first) > SLO_MS / 2  # they wait, as ever
    assert max(gap.ms for gap in as_foreseen("aggregated").gaps) > 5 * SLO_MS


def test_aggregated_slo_keeps_the_objective_with_smaller_budgets():
    run = as_foreseen("aggregated-slo")
    assert max(gap.ms for gap in run.gaps) <= SLO_MS + 1e-6
    mixed = [launch for launch in run.launches if 0 in launch.counts]
    assert 0 < max(map(size, mixed)) < BUDGET
    mixed = [launch for launch in as_foreseen("aggregated").launches if 0 in launch.counts]
    assert max(map(size, mixed)) == BUDGET


@pytest.mark.parametrize("kind", ["duet", "aggregated-slo"])
def test_where_nothing_is_foreseen_to_break_all_launches_are_those_of_aggregated(kind):
    run, plain = (as_foreseen(each, WHENEVER_MS, 15) for each in (kind, "aggregated"))
    assert run.launches == plain.launches
    assert run.gaps == plain.gaps
    assert run.decisions == {"aggregated": len(run.launches)}


def test_a_duet_s_launches_are_aggregated_ones_until_the_first_that_would_break_the_objective():
    run, plain = as_foreseen("duet"), as_foreseen("aggregated")
    pairs = zip(run.launches, plain.launches, strict=False)
    [apart, *_] = [ours.ticket for ours, theirs in pairs if ours != theirs]
    assert run.launches[apart].lane is not Lane.WHOLE
    assert all(
        0 not in launch.counts or launch.predicted_ms <= SLO_MS for launch in run.launches[:apart]
    )
    assert 0 in plain.launches[apart].counts
    assert plain.launches[apart].predicted_ms > SLO_MS


def test_no_mixed_launch_of_a_duet_is_foreseen_to_break_the_objective():
    mixed = [launch for launch in as_foreseen("duet").launches if 0 in launch.counts]
    assert mixed
    assert max(launch.predicted_ms for launch in mixed) <= SLO_MS


def test_launches_beside_each_other_agree_about_the_split():
    run = as_foreseen("duet")
    assert len({launch.split for launch in run.launches}) > 2
    assert run.num_splits == 1


def test_two_schedulers_that_look_ahead_launch_the_same():
    trace = arrivals(10)
    first, second = (simulate("duet", noisily(), trace=trace) for _ in range(2))
    assert first.launches == second.launches
    assert first.gaps == second.gaps


def test_a_static_split_shares_the_device_while_there_are_both():
    run = as_foreseen("static", requests=10)
    assert run.lanes == set(Lane)
    assert {launch.split for launch in run.launches} == {None, Split(48, 84)}


def test_two_devices_never_run_a_launch_of_both_phases():
    run = as_foreseen("disaggregated", requests=10)
    assert run.lanes == {Lane.PREFILL, Lane.DECODE}
    assert {launch.split for launch in run.launches} == {Split(132, 132)}
    programs = {(launch.lane, launch.program) for launch in run.launches}
    assert programs == {(Lane.PREFILL, Program.PREFILL), (Lane.DECODE, Program.DECODE)}


# What was foretold of each launch.


@pytest.mark.parametrize("kind", ["aggregated", "duet"])
def test_every_launch_says_how_long_it_should_take_and_is_right_where_the_device_is(kind):
    run = as_foreseen(kind)
    foretold = np.array([launch.predicted_ms for launch in run.launches])
    errors = np.abs(foretold / run.took_ms - 1)
    assert np.median(errors) < 1e-9
    assert errors.max() < 0.02  # a row that ends within a launch of k steps counts as if it did not
    assert run.stats.prediction_error < 1e-9


def test_a_prefill_launch_beside_decode_is_foreseen_to_be_no_longer_than_allowed():
    longest_ms = 30.0
    foresees = foresight()
    pace = Pace(foresees, tbt_slo_ms=SLO_MS, max_prefill_launch_ms=longest_ms)
    run = Run(policy("static", foresees), Truth(AS_FORESEEN), pace).run(arrivals(5))
    beside = [launch for launch in run.launches if launch.lane is Lane.PREFILL]
    assert max(launch.predicted_ms for launch in beside) <= longest_ms
    unbounded = Run(policy("static", foresight()), Truth(AS_FORESEEN), Pace()).run(arrivals(5))
    assert max(map(size, unbounded.launches)) > max(map(size, beside))
