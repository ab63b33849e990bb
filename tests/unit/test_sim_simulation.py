"""The simulator: what must come out right, a queue whose answer is known, giving up, noise."""

import hashlib
import math
import os
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from simulation_run import (
    DISAGGREGATED,
    PLAIN,
    POLICIES,
    SEEDS,
    Scenario,
    foresight,
    outcome,
    ran,
    scenario,
)

from duetjax.config import PolicyName
from duetjax.policy.calibration import FIRST_FACTOR
from duetjax.policy.launch import Lane, Program
from duetjax.policy.limits import SchedulerLimits
from duetjax.sim.ledger import Objectives
from duetjax.sim.workload import Arrival

# Repeatable.


def digest():
    """Everything that comes of some simulations, as one number for other processes to compare."""
    total = hashlib.sha256()
    for policy in POLICIES:
        for seed in range(3):
            total.update(repr(outcome(scenario(seed, policy).run())).encode())
            total.update(repr(outcome(scenario(seed, policy).run(noise=0.2, seed=7))).encode())
    return total.hexdigest()


def test_two_processes_simulate_the_same_whatever_their_hash_seed():
    script, digests = "import test_sim_simulation as here; print(here.digest())", {digest()}
    for seed in ("1", "2"):
        path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path}
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        digests.add(done.stdout.strip())
    assert len(digests) == 1


# What must come out right.

RANDOM = [(policy, seed) for policy in PolicyName for seed in SEEDS]
RANDOM += [(DISAGGREGATED, seed) for seed in range(20)]


def each_run():
    """Scenario, result and scheduler of all random ones."""
    for policy, seed in RANDOM:
        yield scenario(seed, policy), *ran(policy, seed)


def fits(case):
    """Whether a request may run [N]."""
    return np.array([each.prompt_tokens < case.limits.max_model_len for each in case.workload])


def test_every_request_gets_all_its_tokens_or_is_refused():
    for case, result, _ in each_run():
        room = case.limits.max_model_len
        due = [min(each.output_tokens, room - each.prompt_tokens) for each in case.workload]
        ledger = result.ledger
        assert ledger.tokens.tolist() == [max(0, tokens) for tokens in due]
        assert ledger.finished + ledger.refused == len(case.workload)
        assert ledger.refused == np.count_nonzero(~fits(case))
        assert result.is_whole


def test_tokens_are_counted_once():
    for case, result, _ in each_run():
        stats, runs = result.stats, fits(case)
        prompts = np.array([each.prompt_tokens for each in case.workload])[runs]
        assert stats.generation_tokens == result.ledger.tokens.sum()
        assert stats.prompt_tokens == prompts.sum()
        assert 0 <= stats.prefix_hits <= max(0, stats.prefix_queries - stats.preemptions)
        if not stats.preemptions:
            assert stats.prefix_queries == prompts.sum()
        if not case.limits.prefix_caching:
            assert stats.prefix_hits == 0


def test_in_the_end_nobody_runs_and_every_page_is_free_or_cached():
    for case, result, scheduler in each_run():
        stats = result.stats
        scheduler.check_integrity()
        assert (stats.running, stats.waiting, scheduler.num_in_flight) == (0, 0, 0)
        assert stats.pages_free + stats.pages_cached == stats.pages_total
        assert stats.pages_cached == 0 or case.limits.prefix_caching
        assert sum(count for _, count in stats.decisions) <= stats.steps


def test_the_most_pages_held_are_known():
    result = replace(PLAIN, workload=(Arrival(0.0, 4, 8),)).run()
    assert result.most_pages == 3  # of 4 tokens each: the last of 12 is never fed
    for case, result, _ in each_run():
        lengths = result.ledger.tokens + [each.prompt_tokens for each in case.workload]
        longest = lengths[fits(case)].max(initial=1)
        assert -(-(longest - 1) // case.limits.page_size) <= result.most_pages
        assert result.most_pages <= result.stats.pages_total


def test_times_go_forward_and_end_with_the_last_token():
    for case, result, _ in each_run():
        ledger, runs = result.ledger, fits(case)
        first, last = ledger.first[runs], ledger.last[runs]
        assert (first > ledger.arrived[runs]).all()
        assert (last >= first).all()
        assert np.isnan(ledger.first[~runs]).all()
        gaps = np.concatenate([np.zeros(0), *ledger._gaps])
        counts = np.concatenate([np.zeros(0, int), *ledger._counts])
        assert (gaps > 0).all()
        assert counts.sum() == (ledger.tokens - 1)[runs].sum()
        assert (gaps * counts).sum() == pytest.approx((last - first).sum())
        assert result.stats.busy_seconds <= result.seconds * (1 + 1e-12)
        if runs.any():
            assert ledger.finished_at == last.max()
        if runs[-1]:  # a request that is refused at the end lasts longer
            assert result.seconds == last.max()


def test_what_is_noted_of_decode_launches_beside_prefill_is_one_row_for_each():
    for case, result, _ in each_run():
        line = result.timeline
        assert line.at == sorted(line.at)
        assert len(line.at) == len(line.decode_cores) == len(line.k)
        assert set(line.k) <= set(range(1, case.look_ahead + 1))
        assert bool(line.at) or case.policy != DISAGGREGATED or result.ledger.tokens.max() < 2


# A queue whose answer is known: M/D/1.

SERVICE = 0.01
"""Seconds, of every request; each is one launch, and there is one at a time."""
QUEUE = Scenario(
    SchedulerLimits(
        num_pages=2,
        page_size=4,
        num_slots=1,
        max_model_len=4,
        max_num_batched_tokens=4,
        decode_buckets=(1,),
        prefill_buckets=(4,),
        prefix_caching=False,
        launches_per_lane=1,
    ),
    (),
    step_ms=1e3 * SERVICE,
)


def begins(arrived):
    """When each is served, by Lindley's recursion."""
    ends, found = 0.0, []
    for at in arrived:
        found.append(max(at, ends))
        ends = found[-1] + SERVICE
    return np.array(found)


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_requests_wait_as_long_as_in_the_queue_of_one_server(load):
    gaps = np.random.default_rng(0).exponential(SERVICE / load, 1_000_000)
    arrived = np.cumsum(gaps).tolist()
    case = replace(QUEUE, workload=tuple(Arrival(at, 2, 1) for at in arrived[:5000]))
    # Bit for bit, as far as is simulated, and the formula holds for all the others.
    assert case.run().ledger.first.tolist() == (begins(arrived[:5000]) + SERVICE).tolist()
    waited = (begins(arrived) - arrived).mean()
    assert waited == pytest.approx(load / (2 * (1 - load)) * SERVICE, rel=0.01)


# Giving up.


def crowd(ttft_slo_ms, count=400, rate=150.0, early=0):
    """Requests for a queue that serves 100 a second; so many `early` ones come before the rest."""
    times = [-1e-3 * number for number in range(early, 0, -1)]
    times += [number / rate for number in range(count)]
    workload = tuple(Arrival(at - times[0], 2, 1) for at in times)
    return replace(QUEUE, workload=workload, objectives=Objectives((50.0,), ttft_slo_ms))


def test_a_run_with_too_many_late_requests_is_given_up():
    case = crowd(ttft_slo_ms=100.0, rate=math.inf)
    whole, given_up = case.run(), case.run(most_missed=20)
    assert whole.is_whole
    assert np.count_nonzero(~whole.ledger.met()) > 300
    assert not given_up.is_whole
    assert given_up.events < whole.events / 2
    assert given_up.seconds < whole.seconds / 2
    assert np.count_nonzero(given_up.ledger.missed(given_up.seconds)) > 20
    assert given_up.ledger.finished == 99


def test_a_run_whose_requests_are_all_in_time_is_not_given_up():
    case = crowd(ttft_slo_ms=1e4)
    assert case.run(most_missed=0).ledger.met().all()
    assert case.run(most_missed=0).is_whole


def test_nobody_is_taken_for_missed_who_is_in_time_in_the_end():
    for case, result, _ in islice(each_run(), 0, None, 3):
        loosest = int(np.argmax(case.objectives.tbt_slo_ms))
        in_time = result.ledger.met(loosest)
        assert not (result.ledger.missed(result.seconds) & in_time).any()
        failed = np.count_nonzero(~in_time)
        assert outcome(case.run(most_missed=failed)) == outcome(result)


def test_a_run_that_has_come_to_its_end_was_not_given_up():
    result = crowd(ttft_slo_ms=1.0, count=50, rate=1.0).run(most_missed=0)
    assert (result.events, result.ledger.finished) == (100, 50)
    assert result.is_whole


def test_a_run_with_too_many_late_requests_is_given_up_whatever_every_100th_event_is():
    case = crowd(ttft_slo_ms=50.0, count=300, rate=100.0, early=9)
    assert np.count_nonzero(~case.run().ledger.met()) > 290
    assert not case.run(most_missed=5).is_whole


# Noise.


@pytest.mark.parametrize("policy", POLICIES)
def test_with_noise_nothing_is_skipped_and_seeds_matter(policy):
    case = replace(scenario(0, policy), step_ms=None)
    result, same = case.run(noise=0.3, seed=1), case.run(noise=0.3, seed=1, skips=False)
    assert (outcome(result), result.events) == (outcome(same), same.events)
    assert outcome(result) != outcome(case.run(noise=0.3, seed=2))
    assert outcome(result) != outcome(case.run())


def test_with_noise_the_scheduler_learns_by_a_foresight_of_its_own():
    own, case = foresight(), replace(scenario(19, PolicyName.DUET), step_ms=None)
    result, scheduler = case.start(noise=0.3, own=own)
    assert result.stats.steps > 100
    assert scheduler.stats().prediction_error > 0.05
    learned = own.calibration.factor(Lane.WHOLE, Program.DECODE)
    assert learned == pytest.approx(FIRST_FACTOR, rel=0.2)
    assert learned != FIRST_FACTOR


def test_the_noise_of_a_step_has_a_median_of_1_and_the_deviation_that_was_asked_for():
    case = replace(
        PLAIN.with_limits(max_model_len=5001, num_pages=2600), workload=(Arrival(0.0, 4, 4990),)
    )
    gaps = np.log(np.concatenate(case.run(noise=0.2).ledger._gaps) / 0.010)
    assert len(gaps) == 4989
    assert np.median(gaps) == pytest.approx(0.0, abs=0.01)
    assert gaps.std() == pytest.approx(0.2, rel=0.05)
