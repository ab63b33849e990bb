"""The scheduler, launch by launch, against a device that notices any wrong page or token."""

import pytest
from fake_executor import expected
from scheduler_run import Run, limits, request

from duetjax.config import InvalidRequest, SamplingParams
from duetjax.policy.launch import (
    FinishedStep,
    Launch,
    Program,
    RowFlag,
    SlotParams,
    StepResult,
    pack,
)
from duetjax.policy.policies import PrefillFirst
from duetjax.policy.request import FinishReason, RequestOutput, TokenLogprob
from duetjax.policy.scheduler import Scheduler


def rows_of(launch):
    """(slot, count) of each row of a prefill launch."""
    return list(zip(launch.slots, launch.counts, strict=True))


# One launch at a time.


def test_a_first_launch_carries_parameters_and_all_pages():
    run = Run(limits()).add(request("a", 6, temperature=0.5, seed=7))
    [launch] = run.turn()
    assert launch == Launch(
        ticket=0,
        program=Program.PREFILL,
        bucket=8,
        slots=(0,),
        starts=(0,),
        counts=(6,),
        packed=pack(request("a", 6).prompt),
        samples=(True,),
        admitted=(SlotParams(0, SamplingParams(temperature=0.5, seed=7), num_prompt=6),),
        pages=((0, 0, 1), (0, 1, 2)),
        limits=((0, 8),),
    )


def test_a_decode_launch_carries_a_page_only_when_a_row_crosses_into_it():
    run = Run(limits()).add(request("a", 6, max_tokens=5))
    run.turn()
    assert run.turn() == (Launch(1, Program.DECODE, 2, (0,)),)  # feeds position 6
    assert run.turn() == (Launch(2, Program.DECODE, 2, (0,)),)
    crossing = Launch(3, Program.DECODE, 2, (0,), pages=((0, 2, 3),), limits=((0, 10),))
    assert run.turn() == (crossing,)  # position 8; position 10 is sampled and not fed


def test_a_prompt_larger_than_a_launch_is_cut_and_samples_after_its_last_chunk():
    new = request("a", 18)
    run = Run(limits()).add(new)
    launches = [run.turn()[0] for _ in range(3)]
    assert [launch.starts for launch in launches] == [(0,), (8,), (16,)]
    assert [launch.counts for launch in launches] == [(8,), (8,), (2,)]
    assert [launch.samples for launch in launches] == [(False,), (False,), (True,)]
    assert [launch.bucket for launch in launches] == [8, 8, 4]
    assert sum((launch.tokens for launch in launches), ()) == new.prompt
    assert [bool(launch.admitted) for launch in launches] == [True, False, False]
    assert [len(launch.pages) for launch in launches] == [5, 0, 0]
    assert run.tokens["a"] == expected(new.prompt, 1)


def test_prompts_share_a_launch_in_order_of_arrival():
    run = Run(limits()).add(request("a", 3), request("b", 7), request("c", 1))
    [first] = run.turn()
    assert rows_of(first) == [(0, 3), (1, 5)]
    assert first.samples == (True, False)
    [second] = run.turn()
    assert rows_of(second) == [(0, 0), (1, 2), (2, 1)]
    assert second.starts[1:] == (5, 0)
    run.finish()


def test_a_mixed_launch_has_its_decoding_rows_first_and_prompts_take_what_is_left():
    run = Run(limits(max_num_batched_tokens=6, prefill_buckets=(6,)))
    run.add(request("a", 1), request("b", 1))
    run.turn()
    run.add(request("c", 20))
    [mixed] = run.turn()
    assert mixed.program is Program.PREFILL
    assert rows_of(mixed) == [(0, 0), (1, 0), (2, 4)]
    assert (mixed.starts, mixed.samples) == ((0, 0, 0), (True, True, False))
    assert mixed.tokens == request("c", 20).prompt[:4]
    assert len(run.tokens["a"]) == len(run.tokens["b"]) == 2
    run.finish()


def test_a_policy_may_let_prompts_go_before_whatever_decodes():
    run = Run(limits(), PrefillFirst(8)).add(request("a", 3))
    run.turn()
    run.add(request("b", 11))
    assert [rows_of(run.turn()[0]) for _ in range(2)] == [[(1, 8)], [(1, 3)]]
    assert run.turn()[0].slots == (0, 1)
    run.finish()


def test_the_second_launch_is_planned_before_the_first_has_finished():
    run = Run(limits(launches_per_lane=2)).add(request("a", 6, max_tokens=3))
    prefill, decode = run.plan()
    assert (prefill.program, decode.program) == (Program.PREFILL, Program.DECODE)
    assert run.plan() == ()
    run.finish()
    assert len(run.launches) == 3


def test_a_launch_in_flight_counts_as_tokens_that_need_not_be_planned_again():
    run = Run(limits(launches_per_lane=2)).add(request("a", 6, max_tokens=1), request("b", 14))
    first, second = run.plan()
    assert rows_of(first) == [(0, 6), (1, 2)]
    assert rows_of(second) == [(1, 8)]
    assert second.starts == (2,)
    run.finish()


def test_who_has_stopped_meanwhile_is_skipped_in_the_launch_that_names_it():
    stop = expected(request("a", 6).prompt, 2)[-1]
    run = Run(limits(launches_per_lane=2)).add(request("a", 6, max_tokens=9, stop_ids=(stop,)))
    run.finish()
    assert [launch.slots for launch in run.launches] == [(0,), (0,), (0,)]
    assert len(run.tokens["a"]) == 2


def test_the_lowest_free_slot_goes_out_first():
    run = Run(limits()).add(*(request(i, 1, max_tokens=20) for i in "abcd"))
    run.turn()
    run.abort("c")
    run.abort("a")
    run.add(request("e", 1), request("f", 1))
    assert rows_of(run.turn()[0]) == [(1, 0), (3, 0), (0, 1), (2, 1)]


def test_a_request_waits_for_a_slot():
    run = Run(limits(num_slots=1)).add(request("a", 1, max_tokens=2), request("b", 1))
    run.turn()
    assert run.stats.waiting == 1
    run.turn()
    [launch] = run.turn()
    assert (launch.program, launch.slots, len(launch.admitted)) == (Program.PREFILL, (0,), 1)
    run.finish()


# Where requests end, and how much fits.


def test_one_token_needs_no_decode_launch():
    run = Run(limits(launches_per_lane=2)).add(request("a", 6, max_tokens=1)).finish()
    assert [launch.program for launch in run.launches] == [Program.PREFILL]
    assert run.finished == {"a": FinishReason.LENGTH}


@pytest.mark.parametrize("at", [1, 3])
def test_a_stop_id_is_reported_and_ends_the_request_even_as_its_last_allowed_token(at):
    stop = expected(request("a", 6).prompt, at)[-1]
    run = Run(limits()).add(request("a", 6, max_tokens=3, stop_ids=(stop,))).finish()
    assert run.tokens["a"][-1] == stop
    assert (len(run.tokens["a"]), run.finished["a"]) == (at, FinishReason.STOP)


@pytest.mark.parametrize(("prompt_len", "num_tokens"), [(31, 1), (5, 27)])
def test_generation_ends_at_max_model_len(prompt_len, num_tokens):
    run = Run(limits(num_pages=9)).add(request("a", prompt_len, max_tokens=100)).finish()
    assert len(run.tokens["a"]) == num_tokens
    assert run.finished == {"a": FinishReason.LENGTH}


@pytest.mark.parametrize(("prompt_len", "max_tokens"), [(12, 1), (11, 2), (5, 8), (1, 12)])
def test_a_request_that_needs_exactly_all_pages_runs(prompt_len, max_tokens):
    run = Run(limits(num_pages=4)).add(request("a", prompt_len, max_tokens)).finish()
    assert len(run.tokens["a"]) == max_tokens
    assert run.stats.preemptions == 0


def test_what_a_finished_request_held_serves_the_next_one():
    run = Run(limits(num_pages=4, num_slots=1, prefix_caching=False))
    run.add(request("a", 12, 1), request("b", 12, 1))
    run.turn()
    run.turn()
    [launch] = run.turn()
    assert launch.pages == ((0, 0, 1), (0, 1, 2), (0, 2, 3))
    run.finish()


# What is refused.


@pytest.mark.parametrize(
    ("new", "bounds", "param", "code", "message"),
    [
        (request("a", 0), {}, "prompt", "invalid_value", "no tokens"),
        (request("a", 32), {}, "prompt", "context_length_exceeded", "32 tokens.*at most 31"),
        (request("a", 6, 0), {}, "max_tokens", "invalid_value", "at least 1, not 0"),
        (request("a", 12, 2), {"num_pages": 4}, "max_tokens", "invalid_value", "4 KV pages of 4"),
    ],
)
def test_a_request_that_never_fits_is_refused(new, bounds, param, code, message):
    scheduler = Scheduler(limits(**bounds))
    with pytest.raises(InvalidRequest, match=message) as refused:
        scheduler.add(new, 0.0)
    assert (refused.value.param, refused.value.code) == (param, code)
    assert not scheduler.has_work


def test_an_id_in_use_is_refused_and_free_again_afterwards():
    run = Run(limits()).add(request("a"))
    with pytest.raises(InvalidRequest, match="'a' is already in use"):
        run.scheduler.add(request("a"), 0.0)
    run.finish()
    run.scheduler.add(request("a"), 0.0)
    run.scheduler.abort("a")
    run.scheduler.add(request("a"), 0.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"decode_buckets": (2, 3)},
        {"decode_buckets": (4, 2)},
        {"decode_buckets": ()},
        {"prefill_buckets": (4, 7)},
        {"max_num_batched_tokens": 4},
        {"num_pages": 1},
        {"launches_per_lane": 0},
    ],
)
def test_limits_that_contradict_each_other_are_noticed(changes):
    with pytest.raises(AssertionError):
        limits(**changes)


def test_a_bucket_need_not_exceed_the_largest_launch_that_slots_and_lengths_allow():
    bounds = limits(max_model_len=4, num_slots=2, max_num_batched_tokens=100, prefill_buckets=(6,))
    run = Run(bounds).add(*(request(i, 3, 1) for i in "abc")).finish()
    assert [launch.bucket for launch in run.launches] == [6, 6]


# What a row reports beside its token.


def finished(launch, **columns):
    rows = len(launch.slots)
    usual = {"tokens": (7,) * rows, "flags": (RowFlag.SAMPLED,) * rows, "logprobs": (-0.5,) * rows}
    return FinishedStep(launch.ticket, 0, StepResult(**{**usual, **columns}))


def planned(*news, **changes):
    """A scheduler that has planned once for `news`, and what it planned."""
    scheduler = Scheduler(limits(**changes))
    for new in news:
        scheduler.add(new, 0.0)
    return scheduler, scheduler.plan(0.0)


def test_a_row_that_is_not_finite_ends_its_request_and_no_other():
    scheduler, [prefill] = planned(request("a"), request("b"))
    flags = (RowFlag.NON_FINITE, RowFlag.SAMPLED)
    outputs = scheduler.commit(finished(prefill, flags=flags), 0.0)
    assert sorted(outputs, key=lambda output: output.id) == [
        RequestOutput("a", (), FinishReason.ERROR, num_launches=1),
        RequestOutput("b", (7,)),
    ]
    scheduler.check_integrity()
    [decode] = scheduler.plan(0.0)
    assert decode.slots == (1,)


@pytest.mark.parametrize("launches_per_lane", [1, 2])
def test_a_chunk_that_is_not_finite_ends_its_request_before_the_prompt_has_ended(launches_per_lane):
    scheduler, launches = planned(request("a", 18), launches_per_lane=launches_per_lane)
    outputs = scheduler.commit(finished(launches[0], flags=(RowFlag.NON_FINITE,)), 0.0)
    ended = RequestOutput("a", (), FinishReason.ERROR, num_launches=launches_per_lane)
    assert list(outputs) == [ended]
    assert not scheduler.has_work
    for launch in launches[1:]:
        assert not scheduler.commit(finished(launch, flags=(RowFlag.NON_FINITE,)), 0.0)
    assert scheduler.stats().pages_free == 16


def test_poison_in_one_row_leaves_its_neighbours_their_answers():
    poison = expected(request("b").prompt, 2)[-1]
    run = Run(limits(launches_per_lane=2))
    run.executor.poison(poison)
    run.add(*(request(i) for i in "abc")).finish()
    assert run.finished["b"] is FinishReason.ERROR
    assert run.tokens["b"][-1] == poison
    assert {run.finished["a"], run.finished["c"]} == {FinishReason.LENGTH}


def test_a_device_that_stops_where_the_scheduler_does_not_is_our_fault():
    scheduler, [prefill] = planned(request("a"))
    with pytest.raises(AssertionError, match="at its end"):
        scheduler.commit(finished(prefill, flags=(RowFlag.SAMPLED | RowFlag.STOPPED,)), 0.0)


def test_logprobs_come_with_as_many_alternatives_as_each_request_asked_for():
    scheduler, [prefill] = planned(request("a", 2, logprobs=2), request("b", 2, logprobs=0))
    assert prefill.wants_top
    top = ((7, -0.5), (8, -1.5), (9, -2.5))
    a, b = scheduler.commit(finished(prefill, top=(top, top)), 0.0)
    assert a.logprobs == (TokenLogprob(-0.5, top[:2]),)
    assert b.logprobs == (TokenLogprob(-0.5, ()),)


def test_alternatives_are_copied_only_by_launches_whose_samples_want_them():
    run = Run(limits()).add(request("a", 10, max_tokens=2, logprobs=1), request("b", 4)).finish()
    wanting = [(new.ticket, new.slots) for new in run.launches if new.wants_top]
    assert [launch.counts for launch in run.launches[:2]] == [(8,), (2, 4)]
    assert wanting == [(1, (0, 1)), (2, (0, 1))]


# The order of calls.


def test_steps_of_a_launch_are_committed_once_and_in_order():
    scheduler, [prefill] = planned(request("a"))
    late = FinishedStep(prefill.ticket, 1, finished(prefill).result)
    with pytest.raises(AssertionError, match="step 1 of"):
        scheduler.commit(late, 0.0)
    assert list(scheduler.commit(finished(prefill), 0.0)) == [RequestOutput("a", (7,))]
    with pytest.raises(AssertionError, match="launch 0, which is not in flight"):
        scheduler.commit(finished(prefill), 0.0)


def test_an_idle_scheduler_plans_nothing():
    scheduler = Scheduler(limits())
    assert scheduler.plan(0.0) == ()
    assert not scheduler.has_work
    assert scheduler.stats().steps == 0


def test_busy_seconds_run_while_a_launch_is_in_flight():
    run = Run(limits()).add(request("a", 8, 1))
    run.now = 10.0
    run.plan()
    run.now = 12.5
    run.finish_launch()
    run.now = 99.0
    assert run.plan() == ()
    assert run.stats.busy_seconds == 2.5
