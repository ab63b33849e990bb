"""Launches that repeat themselves are skipped, which changes nothing; faults of it are found."""

import math
from dataclasses import replace

import numpy as np
import pytest
from simulation_run import PLAIN, SEEDS, crowded, foresight, outcome, ran, scenario

from duetjax.config import PolicyName
from duetjax.policy.calibration import FIRST_FACTOR
from duetjax.policy.launch import Lane, Program
from duetjax.policy.roster import Roster
from duetjax.sim.executor import SimulatedExecutor
from duetjax.sim.ledger import Ledger
from duetjax.sim.workload import Arrival


def differs(case):
    """Whether skipping changes what comes out of a scenario, or breaks it."""
    try:
        skipped = outcome(case.run())
    except (AssertionError, IndexError, ValueError):
        return True
    return skipped != outcome(case.run(skips=False))


@pytest.mark.parametrize("policy", PolicyName)
def test_skipping_changes_nothing_but_the_number_of_events(policy):
    events = np.zeros(2, int)
    for seed in SEEDS:
        skipped, plain = ran(policy, seed)[0], scenario(seed, policy).run(skips=False)
        assert outcome(skipped) == outcome(plain), f"scenario {seed}"
        events += skipped.events, plain.events
    assert events[0] < 0.6 * events[1]


@pytest.mark.parametrize("policy", PolicyName)
def test_skipping_changes_nothing_where_a_lane_has_one_launch_at_a_time(policy):
    for seed in range(20):
        case = scenario(seed, policy).with_limits(launches_per_lane=1)
        skipped, plain = case.run(), case.run(skips=False)
        busy = plain.stats.busy_seconds
        assert skipped.stats.busy_seconds == pytest.approx(busy, rel=1e-12)
        skipped = replace(skipped, stats=replace(skipped.stats, busy_seconds=busy))
        assert outcome(skipped) == outcome(plain), f"scenario {seed}"


@pytest.mark.parametrize("policy", [PolicyName.AGGREGATED, PolicyName.PREFILL_FIRST])
def test_skipping_changes_nothing_where_launches_are_deterministic(policy):
    preemptions = 0
    for seed in range(30):
        case = scenario(seed, policy).with_limits(deterministic=True)
        skipped = case.run()
        assert outcome(skipped) == outcome(case.run(skips=False)), f"scenario {seed}"
        preemptions += skipped.stats.preemptions
    assert preemptions > 20


def test_the_random_scenarios_are_hard_enough():
    stats = [ran(policy, seed)[0].stats for policy in PolicyName for seed in SEEDS]
    assert sum(each.preemptions > 0 for each in stats) > 50
    assert sum(each.prefix_hits > 0 for each in stats) > 50
    assert {"split", "decode_alone"} < {why for each in stats for why, _ in each.decisions}
    assert sum(ran(policy, seed)[0].ledger.refused for policy in PolicyName for seed in SEEDS) > 10


def test_a_long_answer_is_a_few_events():
    case = replace(
        PLAIN.with_limits(max_model_len=5001, num_pages=2600),
        workload=(Arrival(0.0, 4, 4000), Arrival(0.0, 4, 4990)),
    )
    skipped, plain = case.run(), case.run(skips=False)
    assert (skipped.events, plain.events) == (8, 4991)
    assert outcome(skipped) == outcome(plain)


def test_skipping_changes_nothing_where_a_preempted_request_is_decoded_again():
    case = PLAIN.with_limits(deterministic=True)
    plain = case.run(skips=False)
    assert plain.stats.preemptions == 1
    assert plain.ledger.tokens.tolist() == [24, 24]
    assert case.run().ledger.tokens.tolist() == [24, 24]


def test_skipping_changes_nothing_where_rows_have_no_room_for_all_steps_of_a_launch():
    for seed in range(40):
        case = crowded(seed)
        skipped, plain = case.run(), case.run(skips=False)
        assert plain.ledger.tokens.tolist() == [each.output_tokens for each in case.workload]
        assert outcome(skipped) == outcome(plain), f"scenario {seed}"


def test_skipping_changes_nothing_where_the_scheduler_learns():
    case, results = replace(scenario(30, PolicyName.DUET), step_ms=None), []
    for skips in (True, False):
        own = foresight()
        for _ in range(64):
            own.calibration.observe(Lane.WHOLE, Program.DECODE, 1.0, 2 * FIRST_FACTOR)
        results.append(case.run(own=own, skips=skips))
    skipped, plain = results
    assert skipped.ledger.last.tolist() == pytest.approx(plain.ledger.last.tolist(), rel=1e-9)


# Faults that are planted, and must be found.


def one_step_more(patch, steps_to_spare=Roster.steps_to_spare):
    patch.setattr(Roster, "steps_to_spare", lambda roster: steps_to_spare(roster) + 1)


def pages_not_looked_at(patch):
    def steps_to_spare(roster):
        columns, slots = roster.columns, roster.decoding.batch().slots
        return int((columns.end[slots] - columns.planned[slots]).min()) - 1

    patch.setattr(Roster, "steps_to_spare", steps_to_spare)


def nothing_reserved(patch, skip=Roster.skip):
    def without(roster, count):
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(Roster, "reserve", lambda *args, **kwargs: None)
            skip(roster, count)

    patch.setattr(Roster, "skip", without)


def arrivals_after_steps(patch, skip=SimulatedExecutor.skip):
    def later(executor, steady, until, steps_ms):
        return skip(executor, steady, math.nextafter(until, math.inf), steps_ms)

    patch.setattr(SimulatedExecutor, "skip", later)


def only_the_last_step_told(patch, skip=Ledger.skip):
    patch.setattr(Ledger, "skip", lambda ledger, ids, ends: skip(ledger, ids, ends[-1:]))


FAULTS = (
    one_step_more,
    pages_not_looked_at,
    nothing_reserved,
    arrivals_after_steps,
    only_the_last_step_told,
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_of_skipping_is_found(fault, monkeypatch):
    fault(monkeypatch)
    assert any(differs(scenario(seed, policy)) for seed in range(10, 30) for policy in PolicyName)
