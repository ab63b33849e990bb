"""Decisions of the policies that look ahead, one at a time and under a scheduler."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from foresight_run import (
    BUDGET,
    PREFILL_BUCKETS,
    SIZES,
    Run,
    Truth,
    calibrated,
    profiles,
    request,
    steadily,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from duetjax.policy.duet import AggregatedSlo, Disaggregated, DuetPolicy, Prospect
from duetjax.policy.durations import Step
from duetjax.policy.flights import Pace
from duetjax.policy.foresight import Foresight
from duetjax.policy.launch import Lane, Program, Split
from duetjax.policy.partition import Bounds, Outcome, choose
from duetjax.policy.policies import Aggregate, Details, Duet, Load

EXACT = calibrated(1.0)
"""Nothing observes into it: it may be shared."""
LONG = ((0, 8000),)
SOON_MS, LATE_MS = 40.0, 1000.0  # a launch of LONG takes some 150 ms


def details(rows=8, context=1000, *, slo=SOON_MS, prompts=LONG, max_k=1000, split=None):
    return Details(np.full(rows, context), prompts, slo, max_k, split)


def load(seen=None, **changes):
    seen = seen or details(**changes)
    return Load(len(seen.contexts), sum(left for _, left in seen.prompts), lambda: seen)


def unlooked(rows, prompt_tokens):
    def look():
        raise AssertionError("nobody should have looked")

    return Load(rows, prompt_tokens, look)


def duet(foresees=EXACT, **sizes):
    return DuetPolicy(foresees, replace(SIZES, **sizes))


def whole_decode_ms(seen):
    bucket = SIZES.bucket(Program.DECODE, len(seen.contexts))
    return EXACT.step_ms(Step(Lane.WHOLE, None, Program.DECODE, bucket, 1, seen.contexts))


def decode_ms(seen, split):
    bucket = SIZES.bucket(Program.DECODE, len(seen.contexts))
    return EXACT.step_ms(Step(Lane.DECODE, split, Program.DECODE, bucket, 1, seen.contexts))


def cut(prompts, tokens):
    """The next `tokens` of prompts, given as (start, left): tokens of each, and before each."""
    new, cached = [], []
    for start, left in prompts:
        if tokens > sum(new):
            new.append(min(left, tokens - sum(new)))
            cached.append(start)
    return new, cached


def prefill_ms(seen, split, tokens):
    new, cached = (np.array(column, np.int64) for column in cut(seen.prompts, tokens))
    bucket = SIZES.bucket(Program.PREFILL, tokens)
    return EXACT.step_ms(Step(Lane.PREFILL, split, Program.PREFILL, bucket, new, cached))


def foreseen_ms(seen, budget):
    return Prospect(EXACT, SIZES, seen).mixed_ms(budget)


def alone(**changes):
    """Rows that keep the objective with the whole device for themselves and in no other way."""
    return load(slo=1.1 * whole_decode_ms(details(**changes)), **changes)


# Aggregated, as long as that is good enough.


@pytest.mark.parametrize(("rows", "prompt_tokens"), [(8, 0), (0, 8000)])
@pytest.mark.parametrize("kind", [DuetPolicy, AggregatedSlo])
def test_one_phase_alone_has_the_whole_device_and_nothing_is_foreseen(kind, rows, prompt_tokens):
    assert kind(EXACT, SIZES).decide(unlooked(rows, prompt_tokens)) == Aggregate(BUDGET)


@pytest.mark.parametrize("kind", [DuetPolicy, AggregatedSlo])
def test_a_mixed_launch_that_keeps_the_objective_takes_the_whole_budget(kind):
    assert kind(EXACT, SIZES).decide(load(slo=LATE_MS)) == Aggregate(BUDGET)


def test_a_mixed_launch_exactly_as_long_as_the_objective_keeps_it():
    slo = foreseen_ms(details(), BUDGET)
    assert isinstance(duet().decide(load(slo=slo)), Aggregate)
    assert isinstance(duet().decide(load(slo=0.999 * slo)), Duet)


def test_a_mixed_launch_is_foreseen_with_the_prompts_that_fit_beside_the_rows():
    prompts = ((100, 5000), (0, 5000))
    seen = details(rows=4, context=9, prompts=prompts)
    new, cached = [1, 1, 1, 1, 5000, 3188], [9, 9, 9, 9, 100, 0]
    step = Step(Lane.WHOLE, None, Program.PREFILL, BUDGET, np.array(new), np.array(cached))
    assert foreseen_ms(seen, BUDGET) == EXACT.step_ms(step)


# Split, where it is not.


def test_beyond_the_objective_the_device_is_split():
    policy = duet()
    decision = policy.decide(load())
    assert isinstance(decision, Duet)
    assert decision.why == Outcome.SPLIT
    assert decision.split in EXACT.splits
    assert decode_ms(details(), decision.split) <= SOON_MS
    assert policy.last_choice.split == decision.split


def test_two_launches_of_the_decode_lane_and_a_step_last_no_longer_than_the_objective():
    decision = duet().decide(load(split=Split(64, 68)))
    assert decision.k > 1
    step_ms = decode_ms(details(), decision.split)
    k = decision.k
    assert (2 * k + 1) * step_ms <= SOON_MS < (2 * (k + 1) + 1) * step_ms


def test_a_step_takes_a_third_of_the_objective_on_the_least_split_that_allows_it():
    decision = duet().decide(load())
    step_ms = decode_ms(details(), decision.split)
    assert (
        step_ms <= SOON_MS / 3 < decode_ms(details(), EXACT.splits[decision.split.decode // 8 - 2])
    )


def test_where_no_split_allows_it_a_step_takes_up_to_the_objective():
    slo = 1.5 * whole_decode_ms(details())
    decision = duet().decide(load(slo=slo))
    assert decision.why == Outcome.SPLIT
    assert slo / 3 < decode_ms(details(), decision.split) <= slo


def test_a_row_handed_over_decodes_alone_before_a_mixed_launch_that_would_make_it_wait():
    short, waited = details(prompts=((0, 500),)), 20.0
    mixed_ms = Prospect(EXACT, SIZES, short).mixed_ms(BUDGET)
    assert mixed_ms < SOON_MS
    for slo, why in (
        (mixed_ms + waited + 0.1, "aggregated"),
        (mixed_ms + waited - 0.1, "hand_over"),
    ):
        seen = replace(short, tbt_slo_ms=slo, handed_over_ms=waited)
        decision = duet().decide(load(seen))
        assert (decision.why, decision.k) == (why, 1)
        assert (decision.budget == 8) == (why == "hand_over")


def test_a_step_longer_than_half_the_objective_is_launched_by_itself():
    decision = duet().decide(load(slo=1.5 * whole_decode_ms(details())))
    assert isinstance(decision, Duet)
    assert decision.k == 1


def test_the_split_is_that_of_the_episode_in_progress():
    for split in EXACT.splits[6:]:
        assert duet().decide(load(split=split)).split == split


def test_a_split_is_kept_from_one_episode_to_the_next_where_another_gains_little():
    def split_of(policy, context):
        return policy.decide(load(rows=32, context=context)).split

    kept, moved, now = duet(), 0, None
    for context in range(8000, 100, -100):
        before, now = now, split_of(kept, context)
        moved += before not in (None, now)
        fresh = split_of(duet(), context)
        assert now in (before, fresh)
    changes = [split_of(duet(), context) for context in range(8000, 100, -100)]
    assert moved < sum(a != b for a, b in pairwise(changes))


def test_a_prefill_launch_is_no_longer_than_allowed():
    def longest_ms(decision):
        return prefill_ms(details(), decision.split, decision.budget)

    assert longest_ms(duet().decide(load())) <= 4 * SOON_MS
    assert longest_ms(duet(max_prefill_ms=30.0).decide(load())) <= 30.0


def test_an_objective_that_holds_nowhere_gives_decode_the_largest_share():
    decision = duet().decide(load(slo=1.0))
    largest = max(EXACT.splits, key=lambda split: split.decode)
    expected = Duet(largest, 1, PREFILL_BUCKETS[0], Outcome.LARGEST_DECODE_SHARE)
    assert decision == expected


# Decode alone, in turn with the prefill it owes.


def test_decode_alone_and_the_prefill_it_owes_take_turns():
    policy, some = duet(), alone()
    decisions = [policy.decide(some) for _ in range(4)]
    steps, owed = decisions[:2]
    assert steps.why == owed.why == Outcome.DECODE_ALONE
    assert steps.decodes
    assert steps.budget == some.rows
    assert steps.k > 1
    assert owed == Aggregate(PREFILL_BUCKETS[0], decodes=False, why=Outcome.DECODE_ALONE)
    assert decisions[2:] == decisions[:2]


@pytest.mark.parametrize("calm", [load(slo=LATE_MS), unlooked(8, 0), unlooked(0, 8000)])
def test_a_prefill_is_no_longer_owed_once_the_objective_was_kept_without_it(calm):
    policy, some = duet(), alone()
    policy.decide(some)
    assert policy.decide(calm) == Aggregate(BUDGET)
    assert policy.decide(some).decodes


def test_an_episode_that_decode_has_outgrown_owes_no_prefill():
    # Decode goes on in the episode: it was not alone, so nothing is owed for it.
    policy = duet()
    assert policy.decide(load(slo=10.0, split=EXACT.splits[0])).why == Outcome.DECODE_ALONE
    assert isinstance(policy.decide(load(slo=10.0)), Duet)


def test_a_row_s_last_steps_on_the_decode_lane_are_not_taken_for_rows_that_decode():
    # The scheduler counts them as a row, so that prefill goes on; their contexts are gone.
    ending = Details(np.array([], np.int64), ((0, 16000),), SOON_MS, 1, EXACT.splits[3])
    assert duet().decide(Load(1, 16000, lambda: ending)) == Aggregate(BUDGET)


# Without predictions to rely on.


def test_a_device_that_offers_no_split_is_aggregated_with_half_the_budget():
    model, hardware = profiles()
    whole = Foresight(model, replace(hardware, min_decode_cores=hardware.cores))
    assert whole.splits == ()
    policy = duet(whole)
    assert policy.decide(load()) == Aggregate(BUDGET // 2, why=Outcome.UNPREDICTED)
    assert policy.decide(load(slo=LATE_MS)) == Aggregate(BUDGET)


def distrusted():
    foresees = calibrated(1.0)
    step = Step(Lane.WHOLE, None, Program.DECODE, 8, 1, np.full(8, 100))
    for number in range(300):
        foresees.observe(step, 1000.0 if number % 2 else 0.01)
    assert not foresees.is_trusted
    return foresees


def test_predictions_that_proved_wrong_are_not_asked_and_the_budget_is_halved():
    policy = duet(distrusted())
    assert policy.decide(unlooked(8, 8000)) == Aggregate(BUDGET // 2, why="distrusted")
    assert policy.decide(unlooked(8, 0)) == Aggregate(BUDGET)


def test_half_a_budget_has_room_for_a_prompt_beside_all_rows():
    assert duet(distrusted(), budget=65).decide(unlooked(64, 8000)).budget == 65


def test_trust_that_returns_brings_the_splits_back():
    foresees = distrusted()
    policy = duet(foresees)
    step = Step(Lane.WHOLE, None, Program.DECODE, 8, 1, np.full(8, 100))
    assert policy.decide(load()).why == "distrusted"
    took_ms = foresees.step_ms(step)
    for _ in range(200):
        foresees.observe(step, took_ms)
    assert policy.decide(load()).why == Outcome.SPLIT


# What it says of itself.


@pytest.mark.parametrize("slo", [1.0, 1.1 * whole_decode_ms(details()), SOON_MS])
def test_a_choice_explains_itself_in_one_sentence(slo):
    policy = duet()
    assert policy.last_choice is None
    policy.decide(load(slo=slo))
    reason = policy.last_choice.reason
    assert any(f"{each:.4g} ms" in reason for each in (slo, slo / 3))
    assert "\n" not in reason
    assert ". " not in reason


# The best of one lane.


def test_aggregated_slo_takes_the_largest_budget_that_keeps_the_objective():
    budget = AggregatedSlo(EXACT, SIZES).decide(load()).budget
    assert foreseen_ms(details(), budget) <= SOON_MS
    larger = PREFILL_BUCKETS[PREFILL_BUCKETS.index(budget) + 1]
    assert foreseen_ms(details(), larger) > SOON_MS


@pytest.mark.parametrize(("rows", "budget"), [(8, 128), (64, 128)])
def test_aggregated_slo_goes_on_with_the_smallest_budget_where_none_keeps_it(rows, budget):
    assert AggregatedSlo(EXACT, SIZES).decide(load(rows=rows, slo=1.0)) == Aggregate(budget)


def test_aggregated_slo_never_exceeds_the_operator_s_budget():
    policy = AggregatedSlo(EXACT, replace(SIZES, budget=300))
    assert policy.decide(load(slo=LATE_MS)) == Aggregate(300)


def test_two_devices_run_prefill_and_decode_whatever_there_is():
    policy = Disaggregated(BUDGET, 132, 4)
    loads = [unlooked(8, 8000), unlooked(8, 0), unlooked(0, 8000)]
    assert [policy.decide(some) for some in loads] == [Duet(Split(132, 132), 4, BUDGET)] * 3


# Whatever comes.

SEEN = st.builds(
    details,
    st.integers(1, 64),
    st.integers(0, 16000),
    slo=st.floats(0.5, 300.0),
    prompts=st.lists(
        st.tuples(st.integers(0, 8000), st.integers(1, 8000)), min_size=1, max_size=4
    ).map(tuple),
    max_k=st.integers(1, 40),
    split=st.sampled_from([None, *EXACT.splits]),
)


@settings(max_examples=60)
@given(st.lists(SEEN, min_size=1, max_size=5))
def test_a_decision_can_always_run_and_respects_what_it_was_told(calls):
    policy = duet()
    for seen in calls:
        decision = policy.decide(load(seen))
        rows, tokens = len(seen.contexts), sum(left for _, left in seen.prompts)
        if isinstance(decision, Duet):
            assert decision.split in EXACT.splits
            assert seen.split in (None, decision.split)
            assert 1 <= decision.budget <= min(tokens, BUDGET)
            assert 1 <= decision.k <= min(SIZES.max_k, seen.max_k)
            ms = 2 * decision.k * decode_ms(seen, decision.split)
            assert decision.k == 1 or ms <= seen.tbt_slo_ms
        else:
            assert decision.budget >= (rows if decision.decodes else 1)
            assert 1 <= decision.k <= min(SIZES.max_k, seen.max_k)


@settings(max_examples=30)
@given(st.lists(SEEN, min_size=1, max_size=5))
def test_the_same_calls_are_decided_alike(calls):
    first, second = duet(), duet()
    assert [first.decide(load(seen)) for seen in calls] == [
        second.decide(load(seen)) for seen in calls
    ]


@settings(max_examples=60)
@given(SEEN)
def test_a_decision_beyond_the_objective_is_one_of_the_optimiser_s(seen):
    policy = duet()
    decision = policy.decide(load(seen))
    keeps = foreseen_ms(seen, BUDGET) <= seen.tbt_slo_ms
    assert keeps == (policy.last_choice is None)
    assert decision.why == ("aggregated" if keeps else policy.last_choice.outcome)
    if isinstance(decision, Duet):
        choice = policy.last_choice
        ms = decode_ms(seen, choice.split), prefill_ms(seen, choice.split, choice.prefill_tokens)
        assert (choice.decode_ms, choice.prefill_ms) == pytest.approx(ms, rel=1e-9)


# Under a scheduler.


def ran_with(trace, *, slo_ms=LATE_MS, policy=None, **pace):
    foresees = calibrated(1.0)
    run = Run(
        policy or DuetPolicy(foresees, SIZES),
        Truth(steadily(1.0)),
        Pace(foresees, tbt_slo_ms=slo_ms, **pace),
    )
    return run.run(trace)


def stream_and_prompt(**fields):
    """A stream, another beside it with `fields`, and then a long prompt."""
    return [
        (0.0, request("stream", 100, 60)),
        (0.0, request("strict", 100, 60, **fields)),
        (0.05, request("prompt", 8000, 4)),
    ]


def test_one_request_s_own_objective_splits_the_device_for_it():
    ran = ran_with(stream_and_prompt(tbt_slo_ms=SOON_MS))
    assert ran.lanes == set(Lane)
    assert max(gap.ms for gap in ran.gaps if not gap.is_first) <= SOON_MS
    assert ran_with(stream_and_prompt()).lanes == {Lane.WHOLE}


def test_an_objective_looser_than_the_engine_s_loosens_nothing_for_the_others():
    ran = ran_with(stream_and_prompt(tbt_slo_ms=LATE_MS), slo_ms=SOON_MS)
    assert ran.lanes == set(Lane)


def test_an_engine_s_objective_is_nobody_s_where_all_bring_their_own():
    streams = [request(name, 100, 60, tbt_slo_ms=LATE_MS) for name in "ab"]
    trace = [*((0.0, stream) for stream in streams), (0.05, request("prompt", 8000, 4))]
    ran = ran_with(trace, slo_ms=SOON_MS)
    assert ran.lanes == {Lane.WHOLE}


def test_an_objective_that_has_left_is_forgotten():
    trace = [
        (0.0, request("stream", 100, 150)),
        (0.0, request("strict", 100, 20, tbt_slo_ms=SOON_MS)),
        (0.5, request("prompt", 8000, 4)),
    ]
    assert ran_with(trace).lanes == {Lane.WHOLE}


def test_a_prompt_that_outlives_all_that_decoded_beside_it_goes_on():
    trace = [
        (0.0, request("stream", 100, 20)),
        (0.05, request("prompt", 16000, 4)),
        (0.05, request("other", 16000, 4)),
    ]
    ran = ran_with(trace, slo_ms=SOON_MS)
    assert set(ran.ttft_ms) == {"stream", "prompt", "other"}
    assert ran.lanes == set(Lane)


def test_where_decode_needs_the_whole_device_launches_of_the_two_take_turns():
    streams = [(0.0, request(f"stream{i}", 1000, 200)) for i in range(8)]
    slo = 1.1 * whole_decode_ms(details(context=1100))
    ran = ran_with([*streams, (0.5, request("prompt", 2000, 4))], slo_ms=slo)
    assert ran.lanes == {Lane.WHOLE}
    prompt = [launch.ticket for launch in ran.launches if launch.slots == (8,) and launch.counts]
    assert len(prompt) == -(-2000 // PREFILL_BUCKETS[0])
    between = {ran.launches[ticket + 1].program for ticket in prompt}
    assert between == {Program.DECODE}


def test_a_prefill_launch_beside_decode_is_cut_to_the_longest_that_is_allowed():
    def prompts(**pace):
        ran = ran_with(stream_and_prompt(tbt_slo_ms=SOON_MS), **pace)
        return [launch for launch in ran.launches if launch.lane is Lane.PREFILL]

    assert max(launch.predicted_ms for launch in prompts()) > 30.0
    assert max(launch.predicted_ms for launch in prompts(max_prefill_launch_ms=30.0)) <= 30.0


def test_a_prefill_bucket_that_is_foreseen_to_be_too_long_everywhere_runs_at_its_smallest():
    ran = ran_with(stream_and_prompt(tbt_slo_ms=SOON_MS), max_prefill_launch_ms=0.001)
    prompts = [launch for launch in ran.launches if launch.lane is Lane.PREFILL]
    assert {launch.bucket for launch in prompts} == {PREFILL_BUCKETS[0]}


def test_two_schedulers_decide_alike():
    trace = stream_and_prompt(tbt_slo_ms=SOON_MS)
    assert ran_with(trace).launches == ran_with(trace).launches


# Prefill sizes that are not asked about.


@settings(max_examples=100)
@given(
    rows=st.integers(1, 64),
    context=st.integers(0, 4000),
    prompts=st.lists(st.tuples(st.integers(0, 4000), st.integers(1, 8000)), min_size=1, max_size=3),
    slo=st.floats(1.0, 200.0),
    longest=st.floats(1.0, 400.0),
)
def test_what_is_chosen_is_as_good_as_if_all_sizes_had_been_weighed(
    rows, context, prompts, slo, longest
):
    prospect = Prospect(EXACT, SIZES, details(rows, context, prompts=tuple(prompts)))
    mixed_ms, within = prospect.mixed_ms(BUDGET), Bounds(slo, 16, longest, hysteresis=0.0)
    chosen = prospect.choose(within, mixed_ms, None)
    best = choose(prospect.candidates(longest, mixed_ms), within, None)
    assert chosen.outcome is best.outcome
    assert chosen.throughput >= 0.97 * best.throughput


def test_where_all_larger_launches_are_too_long_the_smallest_is_asked_about_too():
    seen = details(prompts=((0, 8000),))
    prospect = Prospect(EXACT, SIZES, seen)
    mixed_ms = prospect.mixed_ms(BUDGET)
    for longest in np.linspace(1.0, 300.0, 200):
        within = Bounds(SOON_MS, 16, float(longest))
        likely = prospect.candidates(within.max_prefill_ms, mixed_ms, SOON_MS)
        if choose(likely, within, None).outcome is not Outcome.SPLIT:
            break
    assert len(likely.prefill_tokens) < 3
    assert prospect.choose(within, mixed_ms, None).outcome is Outcome.SPLIT
