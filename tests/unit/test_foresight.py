"""Schedulers that look ahead, on devices that do as foretold, and on those that do not.

Share over: of the gaps between tokens, how many exceed the objective.
"""

import itertools
import math
import random
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from foresight_run import (
    BUDGET,
    SLO_MS,
    Run,
    Truth,
    arrivals,
    foresight,
    policy,
    profiles,
    simulate,
    steadily,
)
from prometheus_client.parser import text_string_to_metric_families

from duetjax.engine import EngineClient
from duetjax.policy.flights import Pace
from duetjax.policy.foresight import Foresight
from duetjax.policy.launch import Lane, Program, Split
from duetjax.serve.metrics import Metrics

SOON, LATER = range(200), range(200, 10**9)
"""The launches in which calibration has to learn, and those after them."""
AS_FORESEEN = steadily(1.3)
"""The factor that a calibration starts with."""
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


def test_a_duet_s_step_too_long_is_short_of_a_tenth_too_long_but_for_a_prompt_s_first():
    # An episode keeps its split, which the rows that join it may outgrow.
    run = as_foreseen("duet")
    assert max(gap.ms for gap in run.gaps if not gap.is_first) <= 1.1 * SLO_MS
    assert max(gap.ms for gap in as_foreseen("aggregated").gaps) > 5 * SLO_MS


def test_a_row_handed_over_waits_for_two_launches_and_its_own_step_at_most():
    run = as_foreseen("duet")
    decode = [launch for launch in run.launches if launch.lane is Lane.DECODE]
    before = {
        third.ticket: run.took_ms[first.ticket] + run.took_ms[second.ticket]
        for first, second, third in zip(decode, decode[1:], decode[2:], strict=False)
    }
    late = [gap for gap in run.gaps if gap.is_first and gap.ms > SLO_MS]
    assert late
    for gap in late:
        launch = run.launches[gap.ended_by]
        own_ms = run.took_ms[launch.ticket] / launch.k
        assert gap.ms <= before[launch.ticket] + own_ms + 1e-6, gap


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


def test_predictions_come_right_once_enough_was_measured():
    run = twice_as_slow()
    foretold = np.array([launch.predicted_ms for launch in run.launches])
    errors = np.abs(foretold / run.took_ms - 1)
    assert np.median(errors[:10]) == pytest.approx(1 - 1.3 / 2)
    assert np.median(errors[200:]) < 1e-9


def test_a_prefill_launch_beside_decode_is_foreseen_to_be_no_longer_than_allowed():
    longest_ms = 30.0
    foresees = foresight()
    pace = Pace(foresees, tbt_slo_ms=SLO_MS, max_prefill_launch_ms=longest_ms)
    run = Run(policy("static", foresees), Truth(AS_FORESEEN), pace).run(arrivals(5))
    beside = [launch for launch in run.launches if launch.lane is Lane.PREFILL]
    assert max(launch.predicted_ms for launch in beside) <= longest_ms
    unbounded = Run(policy("static", foresight()), Truth(AS_FORESEEN), Pace()).run(arrivals(5))
    assert max(map(size, unbounded.launches)) > max(map(size, beside))


# Devices that do otherwise: calibration in the loop.


@cache
def twice_as_slow():
    return simulate("duet", steadily(2.0), trace=arrivals(30))


SLOWED_DOWN = range(600, 10**9)


def drifting(launch):
    """From faster than foreseen to much slower, up to launch 500."""
    return 0.8 + 1.2 * min(launch / 500, 1.0)


def noisily(factor=AS_FORESEEN, seed=0) -> Callable[[int], float]:
    """Launch n takes about factor(n) times what the roofline says, with a deviation of 20 %."""
    draw = random.Random(seed)
    return lambda launch: factor(launch) * draw.lognormvariate(0.0, 0.2)


def wildly(until, seed=0) -> Callable[[int], float]:
    """Anything from a tenth to ten times, and from launch `until` on as foreseen."""
    draw = random.Random(seed)
    return lambda launch: 10 ** draw.uniform(-1.0, 1.0) if launch < until else 1.3


class Misheard(Foresight):
    """Is told nonsense about three launches of five."""

    def __init__(self) -> None:
        super().__init__(*profiles())
        self._nonsense = itertools.cycle((math.nan, None, 0.0, math.inf, None))

    def observe(self, step, measured_ms):
        said = next(self._nonsense)
        super().observe(step, measured_ms if said is None else said)


def all_finite(run):
    return all(math.isfinite(launch.predicted_ms) for launch in run.launches)


def test_on_a_device_twice_as_slow_the_objective_is_held_after_200_launches():
    run = twice_as_slow()
    assert run.share_over(SLO_MS, SOON) > 0.02
    assert run.share_over(SLO_MS, LATER) < 0.01
    assert run.stats.predictions_trusted


def test_on_a_device_twice_as_slow_trust_is_lost_and_comes_back_within_200_launches():
    run = twice_as_slow()
    assert run.trusted[0]
    assert not all(run.trusted[:100])
    assert all(run.trusted[200:])
    assert run.decisions["distrusted"] > 0
    assert run.decisions["split"] > 0


def test_on_a_device_that_slows_down_predictions_follow():
    # A lane's factor lags behind, so steps planned up to the objective exceed it meanwhile.
    run = simulate("duet", drifting, trace=arrivals(30))
    assert all_finite(run)
    assert all(run.trusted[200:])
    later = [gap.ms for gap in run.gaps if gap.ended_by in LATER and not gap.is_first]
    assert max(later) <= 1.4 * SLO_MS
    assert run.share_over(SLO_MS, SLOWED_DOWN) < 0.02


def test_on_a_noisy_device_trust_is_kept():
    run = simulate("duet", noisily(), trace=arrivals(20))
    assert all_finite(run)
    assert all(run.trusted)
    assert 0.05 < run.stats.prediction_error < 0.2


TRUTHS = {"as foreseen": AS_FORESEEN, "twice as slow": steadily(2.0), "drifting": drifting}


@pytest.mark.parametrize("heard", [foresight, Misheard])
@pytest.mark.parametrize("factor", TRUTHS.values(), ids=TRUTHS)
def test_of_ten_gaps_after_200_launches_nine_keep_the_objective_for_certain(factor, heard):
    run = simulate("duet", factor, foresees=heard(), trace=arrivals(30))
    assert all_finite(run)
    assert run.share_over(SLO_MS, LATER) < 0.1


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("factor", TRUTHS.values(), ids=TRUTHS)
def test_of_ten_gaps_after_200_launches_nine_keep_the_objective_under_noise(factor, seed):
    run = simulate("duet", noisily(factor, seed), trace=arrivals(30))
    assert all_finite(run)
    assert run.share_over(SLO_MS, LATER) < 0.1
    assert run.decisions["split"] > 0
    assert run.trusted[-1]


HEARD_200 = range(500, 10**9)
"""Launches after 200 of which the truth was heard, of five always two."""


@pytest.mark.parametrize("factor", TRUTHS.values(), ids=TRUTHS)
def test_nine_of_ten_gaps_keep_the_objective_where_measurements_are_noisy_or_no_numbers(factor):
    run = simulate("duet", noisily(factor, 0), foresees=Misheard(), trace=arrivals(60))
    assert all_finite(run)
    assert run.share_over(SLO_MS, HEARD_200) < 0.1
    assert run.trusted[-1]


def test_noise_is_planned_for_and_its_absence_costs_nothing():
    quiet, loud = foresight(), foresight()
    simulate("duet", AS_FORESEEN, foresees=quiet, trace=arrivals(20))
    simulate("duet", noisily(), foresees=loud, trace=arrivals(20))
    assert quiet.slack < 1 + 1e-6
    assert 1.2 < loud.slack < 1.4  # e to the power of 1.28 x 0.2 is 1.29


def test_measurements_that_are_no_numbers_teach_nothing_and_the_others_suffice():
    run = simulate("duet", steadily(2.0), foresees=Misheard(), trace=arrivals(20))
    assert all_finite(run)
    assert math.isfinite(run.stats.prediction_error)
    assert run.share_over(SLO_MS, SOON) > 0.03
    assert run.share_over(SLO_MS, LATER) < 0.01


@cache
def wild_at_first():
    """Half of the requests come when the first have long been answered."""
    trace = arrivals(30)
    late = [(when + 60.0, new) for when, new in trace[15:]]
    return simulate("duet", wildly(until=60), trace=[*trace[:15], *late])


def test_what_no_factor_can_follow_is_planned_without_predictions_until_it_is_regular():
    run = wild_at_first()
    assert all_finite(run)
    assert not any(run.trusted[40:60])
    assert all(run.trusted[200:])
    assert run.decisions["distrusted"] > 0
    assert any(launch.lane is Lane.DECODE for launch in run.launches[200:])


def test_without_trust_launches_are_aggregated_with_half_the_budget():
    run = wild_at_first()
    blind = [launch for launch in run.launches if not run.trusted[launch.ticket]]
    mixed = [launch for launch in blind if 0 in launch.counts]
    assert max(map(size, mixed)) == BUDGET // 2
    assert not any(launch.lane is Lane.PREFILL for launch in blind)


def test_the_objective_is_held_again_once_a_wild_device_is_regular():
    run = wild_at_first()
    since = run.trusted.index(True, run.trusted.index(False))
    assert run.share_over(SLO_MS, range(since)) > 0.05
    assert run.share_over(SLO_MS, range(since + 10, 10**9)) < 0.01


# What operators see of it.


def scraped(run):
    """The engine's own series at /metrics, by name and labels."""
    client = EngineClient(run.scheduler, run.executor, vocab_size=2**31)
    text = Metrics(client, "model", lambda: 0).render().decode()
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("duetjax_")
    }


def test_decisions_and_trust_lost_are_at_metrics():
    run = simulate("duet", wildly(until=10**9), trace=arrivals(10))
    samples = scraped(run)
    assert not run.stats.predictions_trusted
    assert samples["duetjax_predictions_trusted",] == 0
    assert samples["duetjax_prediction_error",] == run.stats.prediction_error > 0.3
    outcomes = {name[1]: n for name, n in samples.items() if name[0] == "duetjax_decisions_total"}
    assert outcomes == run.decisions
    assert outcomes["distrusted"] > 0


def test_trust_regained_is_at_metrics():
    samples = scraped(wild_at_first())
    assert samples["duetjax_predictions_trusted",] == 1
    assert samples["duetjax_prediction_error",] < 0.2
    assert samples["duetjax_decisions_total", "distrusted"] > 0
    assert samples["duetjax_decisions_total", "split"] > 0


def test_without_anybody_who_foretells_there_is_no_error_to_see():
    run = Run(policy("aggregated", foresight()), Truth(AS_FORESEEN), Pace()).run(arrivals(2))
    samples = scraped(run)
    assert run.stats.prediction_error is None
    assert ("duetjax_prediction_error",) not in samples
    assert ("duetjax_predictions_trusted",) not in samples
    assert samples["duetjax_decisions_total", "aggregated"] == len(run.launches)
