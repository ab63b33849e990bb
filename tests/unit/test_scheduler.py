"""The scheduler, launch by launch and against an executor that notices any wrong page or token."""

import hashlib
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from fake_executor import FakeExecutor, expected
from hypothesis import given, settings
from hypothesis import strategies as st

from duetjax.config import InvalidRequest, SamplingParams
from duetjax.policy.launch import Launch, Program, RowFlag, SlotParams, StepResult
from duetjax.policy.request import FinishReason, NewRequest, RequestOutput, TokenLogprob
from duetjax.policy.scheduler import Scheduler, SchedulerLimits


def limits(**changes):
    defaults = {
        "num_pages": 17,
        "page_size": 4,
        "num_slots": 4,
        "max_model_len": 32,
        "max_num_batched_tokens": 8,
        "decode_buckets": (2, 4),
        "prefill_buckets": (4, 8),
        "max_prefill_rows": 2,
    }
    return SchedulerLimits(**{**defaults, **changes})


def request(request_id, prompt_len, max_tokens=4, *, stop_ids=(), **sampling):
    """Prompts of different ids differ: token ids go up from the id's hundred."""
    first = 100 * (1 + sum(map(ord, request_id)) % 50)
    prompt = tuple(range(first, first + prompt_len))
    params = SamplingParams(**{"temperature": 0.0, "seed": 0, **sampling})
    return NewRequest(request_id, prompt, max_tokens, params, stop_ids)


def sampled(token):
    return StepResult((token,), (RowFlag.SAMPLED,), (0.0,))


def answer(new, max_model_len):
    """What a request must generate, however it is scheduled."""
    length = min(new.max_tokens, max_model_len - len(new.prompt))
    tokens = expected(new.prompt, length, new.sampling.temperature, new.sampling.seed)
    for i, token in enumerate(tokens):
        if token in new.stop_ids:
            return tokens[: i + 1], FinishReason.STOP
    return tokens, FinishReason.LENGTH


class Run:
    """A scheduler with a fake device; every step is checked against what any plan must keep."""

    def __init__(self, bounds):
        self.bounds = bounds
        self.scheduler = Scheduler(bounds)
        self.executor = FakeExecutor(bounds.page_size)
        self.added = {}  # id -> request, in order of arrival
        self.tokens = {}
        self.finished = {}
        self.aborted = set()
        self.decoding = set()  # have a token and, unless preempted, get one more each step
        self.first_tokens = []
        self.steps = 0

    def add(self, *news):
        for new in news:
            self.scheduler.add(new)
            self.added[new.id] = new
            self.tokens[new.id] = ()

    def abort(self, request_id):
        was_live = self.scheduler.abort(request_id)
        if was_live:
            self.aborted.add(request_id)
            self.decoding.discard(request_id)
        self.scheduler.check_integrity()
        return was_live

    def step(self):
        preemptions = self.scheduler.stats().preemptions
        launches = self.scheduler.plan(float(self.steps))
        preemptions = self.scheduler.stats().preemptions - preemptions
        self.check_plan(launches)
        tickets = [self.executor.submit(launch) for launch in launches]
        seen, decoded = [], set()
        for launch, ticket in zip(launches, tickets, strict=True):
            result = self.executor.result(ticket)
            outputs = self.scheduler.commit(launch, result, self.steps + 0.5)
            self.scheduler.check_integrity()
            if launch.program is Program.DECODE:
                decoded = {output.id for output in outputs}
            seen += outputs
        if not self.bounds.deterministic:  # there, decoding skips a step for each prompt chunk
            self.check_nobody_starved(decoded, preemptions)
        for output in seen:
            self.take(output)
        self.steps += 1
        return launches

    def take(self, output):
        assert output.id not in self.finished, f"{output} after the end"
        assert output.id not in self.aborted, f"{output} after its abort"
        assert len(output.token_ids) == 1
        if not self.tokens[output.id]:
            self.first_tokens.append(output.id)
        self.tokens[output.id] += output.token_ids
        self.decoding.add(output.id)
        if output.finish is not None:
            self.finished[output.id] = output.finish
            self.decoding.discard(output.id)

    def check_plan(self, launches):
        programs = [launch.program for launch in launches]
        assert programs in ([Program.DECODE], [Program.PREFILL], [Program.DECODE, Program.PREFILL])
        total = 0
        for launch in launches:
            decode = launch.program is Program.DECODE
            size = len(launch.slots) if decode else len(launch.tokens)
            total += size
            buckets = self.bounds.decode_buckets if decode else self.bounds.prefill_buckets
            assert launch.bucket == min(b for b in buckets if b >= size)
            assert decode or len(launch.slots) <= self.bounds.max_prefill_rows
        assert total <= self.bounds.max_num_batched_tokens
        slots = [slot for launch in launches for slot in launch.slots]
        assert len(slots) == len(set(slots))
        assert max(slots) < self.bounds.num_slots

    def check_nobody_starved(self, decoded, preemptions):
        arrival = list(self.added)
        missing = self.decoding - decoded
        assert decoded <= self.decoding
        assert bool(decoded) == bool(self.decoding)
        assert len(missing) <= preemptions
        assert all(arrival.index(m) > arrival.index(d) for m in missing for d in decoded)
        self.decoding -= missing

    def finish(self):
        while self.scheduler.has_work:
            assert self.steps < 10_000
            self.step()
        self.check_answers()
        return self

    def check_answers(self):
        for request_id, new in self.added.items():
            tokens, finish = answer(new, self.bounds.max_model_len)
            if request_id in self.aborted:
                assert self.tokens[request_id] == tokens[: len(self.tokens[request_id])]
            else:
                assert (self.tokens[request_id], self.finished[request_id]) == (tokens, finish)
        arrival = [i for i in self.added if i in self.first_tokens]
        assert self.first_tokens == arrival, "a first token overtook an older request's"
        stats = self.scheduler.stats()
        assert (stats.running, stats.waiting, stats.pages_free) == (0, 0, stats.pages_total)
        assert stats.generation_tokens == sum(map(len, self.tokens.values()))
        assert stats.steps == self.steps


# One launch at a time.


def test_a_first_launch_carries_parameters_and_all_pages():
    run = Run(limits())
    run.add(request("a", 6, temperature=0.5, seed=7))
    [launch] = run.step()
    assert launch == Launch(
        program=Program.PREFILL,
        bucket=8,
        slots=(0,),
        starts=(0,),
        counts=(6,),
        tokens=request("a", 6).prompt,
        samples=(True,),
        admitted=(SlotParams(0, SamplingParams(temperature=0.5, seed=7), num_prompt=6),),
        pages=((0, 0, 1), (0, 1, 2)),
        limits=((0, 8),),
    )


def test_a_decode_launch_carries_a_page_only_when_a_row_crosses_into_it():
    run = Run(limits())
    run.add(request("a", 6, max_tokens=5))
    run.step()
    assert run.step() == (Launch(Program.DECODE, 2, (0,)),)  # feeds position 6
    assert run.step() == (Launch(Program.DECODE, 2, (0,)),)
    crossing = Launch(Program.DECODE, 2, (0,), pages=((0, 2, 3),), limits=((0, 10),))
    assert run.step() == (crossing,)  # position 8; position 10 is sampled and not fed


def test_a_long_prompt_is_cut_at_the_budget_and_samples_after_its_last_chunk():
    run = Run(limits())
    new = request("a", 18)
    run.add(new)
    launches = [run.step()[0] for _ in range(3)]
    assert [launch.starts for launch in launches] == [(0,), (8,), (16,)]
    assert [launch.counts for launch in launches] == [(8,), (8,), (2,)]
    assert [launch.samples for launch in launches] == [(False,), (False,), (True,)]
    assert [launch.bucket for launch in launches] == [8, 8, 4]
    assert sum((launch.tokens for launch in launches), ()) == new.prompt
    assert [bool(launch.admitted) for launch in launches] == [True, False, False]
    assert [len(launch.pages) for launch in launches] == [5, 0, 0]
    assert run.tokens["a"] == expected(new.prompt, 1)


def test_prompts_share_a_launch_in_order_of_arrival():
    run = Run(limits())
    run.add(request("a", 3), request("b", 7), request("c", 1))
    [first] = run.step()
    assert (first.slots, first.counts, first.samples) == ((0, 1), (3, 5), (True, False))
    decode, second = run.step()
    assert decode.slots == (0,)
    assert (second.slots, second.starts, second.counts) == ((1, 2), (5, 0), (2, 1))
    run.finish()


def test_decode_rows_come_first_and_prompts_take_what_is_left():
    run = Run(limits(max_num_batched_tokens=6, prefill_buckets=(6,)))
    run.add(request("a", 1), request("b", 1))
    run.step()
    run.add(request("c", 20))
    decode, prefill = run.step()
    assert decode.slots == (0, 1)
    assert prefill.counts == (4,)
    run.finish()


def test_no_more_prompts_share_a_launch_than_it_has_rows():
    run = Run(limits(max_prefill_rows=1))
    run.add(request("a", 1), request("b", 1))
    assert [launch.slots for launch in run.step()] == [(0,)]
    assert [launch.slots for launch in run.step()] == [(0,), (1,)]


def test_the_lowest_free_slot_goes_out_first():
    run = Run(limits())
    run.add(*(request(i, 1, max_tokens=20) for i in "abcd"))
    run.step()
    run.step()
    run.abort("c")
    run.abort("a")
    run.add(request("e", 1), request("f", 1))
    assert [launch.slots for launch in run.step()] == [(1, 3), (0, 2)]


def test_a_request_waits_for_a_slot():
    run = Run(limits(num_slots=1))
    run.add(request("a", 1, max_tokens=2), request("b", 1))
    run.step()
    assert run.scheduler.stats().waiting == 1
    run.step()
    [launch] = run.step()
    assert (launch.program, launch.slots, len(launch.admitted)) == (Program.PREFILL, (0,), 1)
    run.finish()


def test_a_small_request_does_not_overtake_a_large_one_that_waits_for_pages():
    run = Run(limits(num_pages=7))
    run.add(request("a", 12, max_tokens=3), request("b", 20, max_tokens=1), request("c", 1))
    run.finish()
    assert run.first_tokens == ["a", "b", "c"]
    assert run.scheduler.stats().preemptions == 0


# Where requests end, and how much fits.


def test_one_token_needs_no_decode_launch():
    run = Run(limits())
    run.add(request("a", 6, max_tokens=1))
    run.finish()
    assert [launch.program for launch in run.executor.launches] == [Program.PREFILL]
    assert run.finished == {"a": FinishReason.LENGTH}


def test_a_stop_id_as_first_token_is_reported_and_ends_the_request():
    new = request("a", 6)
    stop = expected(new.prompt, 1)
    run = Run(limits())
    run.add(request("a", 6, stop_ids=stop))
    run.finish()
    assert run.tokens == {"a": stop}
    assert run.finished == {"a": FinishReason.STOP}


def test_a_stop_id_as_the_last_allowed_token_counts_as_stop():
    new = request("a", 6, max_tokens=3)
    run = Run(limits())
    run.add(request("a", 6, max_tokens=3, stop_ids=expected(new.prompt, 3)[2:]))
    run.finish()
    assert run.finished == {"a": FinishReason.STOP}


def test_a_prompt_one_short_of_max_model_len_gets_one_token():
    run = Run(limits())
    run.add(request("a", 31, max_tokens=100))
    run.finish()
    assert len(run.tokens["a"]) == 1
    assert run.finished == {"a": FinishReason.LENGTH}


def test_generation_ends_at_max_model_len():
    run = Run(limits())
    run.add(request("a", 5, max_tokens=100))
    run.finish()
    assert len(run.tokens["a"]) == 27


@pytest.mark.parametrize(("prompt_len", "max_tokens"), [(12, 1), (11, 2), (5, 8), (1, 12)])
def test_a_request_that_needs_exactly_all_pages_runs(prompt_len, max_tokens):
    run = Run(limits(num_pages=4))
    run.add(request("a", prompt_len, max_tokens))
    run.finish()
    assert len(run.tokens["a"]) == max_tokens
    assert run.scheduler.stats().preemptions == 0


def test_what_a_finished_request_held_serves_the_next_one():
    run = Run(limits(num_pages=4, num_slots=1))
    run.add(request("a", 12, 1), request("b", 12, 1))
    run.step()
    run.step()
    [launch] = run.step()
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
        scheduler.add(new)
    assert (refused.value.param, refused.value.code) == (param, code)
    assert not scheduler.has_work


def test_an_id_in_use_is_refused_and_free_again_afterwards():
    run = Run(limits())
    run.add(request("a", 3))
    with pytest.raises(InvalidRequest, match="'a' is already in use"):
        run.scheduler.add(request("a", 3))
    run.finish()
    run.scheduler.add(request("a", 3))
    run.scheduler.abort("a")
    run.scheduler.add(request("a", 3))


@pytest.mark.parametrize(
    "changes",
    [
        {"decode_buckets": (2, 3)},
        {"decode_buckets": (4, 2)},
        {"decode_buckets": ()},
        {"prefill_buckets": (4, 7)},
        {"max_num_batched_tokens": 4},
        {"num_pages": 1},
        {"max_prefill_rows": 0},
    ],
)
def test_limits_that_contradict_each_other_are_noticed(changes):
    with pytest.raises(AssertionError):
        limits(**changes)


def test_a_bucket_need_not_exceed_the_largest_chunk_that_rows_and_lengths_allow():
    bounds = limits(max_model_len=4, max_num_batched_tokens=100, prefill_buckets=(6,))
    run = Run(bounds)
    run.add(*(request(i, 3, 1) for i in "abc"))
    run.finish()
    assert [launch.bucket for launch in run.executor.launches] == [6, 6]


# Aborts.


def test_an_abort_while_waiting_leaves_no_trace_in_the_launches():
    run = Run(limits())
    run.add(request("a", 3), request("b", 3), request("c", 3))
    assert run.abort("b")
    run.finish()
    assert [len(launch.admitted) for launch in run.executor.launches] == [2, 0, 0, 0]
    assert run.tokens["b"] == ()


def test_an_abort_in_the_middle_of_a_prompt_frees_its_pages_at_once():
    run = Run(limits())
    run.add(request("a", 20))
    run.step()
    assert run.scheduler.stats().pages_free == 10
    assert run.abort("a")
    assert run.scheduler.stats().pages_free == 16
    assert not run.scheduler.has_work


def test_an_abort_while_decoding_leaves_the_neighbours_alone():
    run = Run(limits())
    run.add(request("a", 3), request("b", 3), request("c", 2))
    run.step()
    run.step()
    assert run.abort("a")
    run.finish()
    assert len(run.tokens["a"]) == 2
    assert set(run.finished) == {"b", "c"}


def test_an_abort_of_an_unknown_or_finished_request_says_so():
    run = Run(limits())
    run.add(request("a", 3, 1))
    run.finish()
    assert not run.abort("a")
    assert not run.abort("never")


# Preemption.


def crowded(*others):
    """Runs until a takes a page from b: each needs 4 pages in the end, and there are 6."""
    run = Run(limits(num_pages=7))
    run.add(request("a", 8, max_tokens=8), request("b", 8, max_tokens=8), *others)
    while run.scheduler.stats().preemptions == 0:
        run.step()
    return run


def test_the_youngest_is_preempted_when_pages_run_out():
    run = crowded()
    assert [launch.slots for launch in run.executor.launches[-1:]] == [(0,)]
    stats = run.scheduler.stats()
    assert (stats.running, stats.waiting, stats.preemptions) == (1, 1, 1)


def test_a_preempted_request_recomputes_its_output_and_repeats_none_of_it():
    run = crowded()
    said = run.tokens["b"]
    assert 0 < len(said) < 8
    before = len(run.executor.launches)
    run.finish()
    again = [launch for launch in run.executor.launches[before:] if launch.tokens]
    assert sum((launch.tokens for launch in again), ()) == (*run.added["b"].prompt, *said)
    assert [len(launch.admitted) for launch in again] == [1] + [0] * (len(again) - 1)
    assert run.tokens["b"][: len(said)] == said
    assert run.scheduler.stats().preempted_tokens == 8 + len(said) - 1
    assert run.scheduler.stats().prompt_tokens == 16


def test_a_preempted_request_goes_before_those_that_waited_when_it_was_running():
    run = crowded(request("c", 8))
    said = run.tokens["b"]
    while run.tokens["b"] == said:
        assert run.tokens["c"] == ()
        run.step()
    run.finish()


def test_the_youngest_gives_way_to_itself_being_the_one_that_grows():
    run = Run(limits(num_pages=6, max_num_batched_tokens=20, prefill_buckets=(20,)))
    run.add(request("a", 10, max_tokens=6), request("b", 7, max_tokens=6))
    run.step()
    [launch] = run.step()
    assert launch.slots == (0, 1)  # a is at position 10, b at 7, 5 of 5 pages in use
    [launch] = run.step()
    assert launch.slots == (0,)
    assert run.scheduler.stats().preemptions == 1
    run.finish()


def test_an_unfinished_prompt_is_preempted_before_any_decoding_row():
    run = Run(limits(num_pages=8, max_num_batched_tokens=5, prefill_buckets=(5,)))
    run.add(request("a", 3, max_tokens=9))
    run.step()
    run.add(request("b", 20, max_tokens=2))
    run.step()
    while run.scheduler.stats().preemptions == 0:
        launches = run.step()
    assert [launch.slots for launch in launches] == [(0,)]
    assert run.tokens["b"] == ()
    run.finish()


def test_a_preempted_request_can_be_aborted():
    run = crowded()
    assert run.abort("b")
    run.finish()
    assert set(run.finished) == {"a"}


def test_a_preempted_request_that_needs_all_pages_to_end_is_admitted_again():
    run = Run(limits(num_pages=4))
    run.add(request("a", 3, max_tokens=6), request("b", 7, max_tokens=6))  # b feeds 12 positions
    run.finish()
    assert run.scheduler.stats().preemptions > 0


# What a row reports beside its token.


def finished(launch, **columns):
    rows = len(launch.slots)
    usual = {"tokens": (7,) * rows, "flags": (RowFlag.SAMPLED,) * rows, "logprobs": (-0.5,) * rows}
    return StepResult(**{**usual, **columns})


def test_a_row_that_is_not_finite_ends_its_request_and_no_other():
    scheduler = Scheduler(limits())
    for request_id in "ab":
        scheduler.add(request(request_id, 3))
    [prefill] = scheduler.plan(0.0)
    flags = (RowFlag.NON_FINITE, RowFlag.SAMPLED)
    outputs = scheduler.commit(prefill, finished(prefill, flags=flags), 0.0)
    assert outputs == (
        RequestOutput("a", (), FinishReason.ERROR),
        RequestOutput("b", (7,)),
    )
    scheduler.check_integrity()
    [decode] = scheduler.plan(0.0)
    assert decode.slots == (1,)


def test_a_chunk_that_is_not_finite_ends_its_request_before_the_prompt_has_ended():
    scheduler = Scheduler(limits())
    scheduler.add(request("a", 18))
    [prefill] = scheduler.plan(0.0)
    outputs = scheduler.commit(prefill, finished(prefill, flags=(RowFlag.NON_FINITE,)), 0.0)
    assert outputs == (RequestOutput("a", (), FinishReason.ERROR),)
    assert not scheduler.has_work
    assert scheduler.stats().pages_free == 16


def test_a_device_that_stops_where_the_scheduler_does_not_is_our_fault():
    scheduler = Scheduler(limits())
    scheduler.add(request("a", 3))
    [prefill] = scheduler.plan(0.0)
    result = finished(prefill, flags=(RowFlag.SAMPLED | RowFlag.STOPPED,))
    with pytest.raises(AssertionError, match="STOPPED"):
        scheduler.commit(prefill, result, 0.0)


def test_logprobs_come_with_as_many_alternatives_as_each_request_asked_for():
    scheduler = Scheduler(limits())
    scheduler.add(request("a", 2, logprobs=2))
    scheduler.add(request("b", 2, logprobs=0))
    [prefill] = scheduler.plan(0.0)
    assert prefill.wants_top
    top = ((7, -0.5), (8, -1.5), (9, -2.5))
    a, b = scheduler.commit(prefill, finished(prefill, top=(top, top)), 0.0)
    assert a.logprobs == (TokenLogprob(-0.5, top[:2]),)
    assert b.logprobs == (TokenLogprob(-0.5, ()),)


def test_alternatives_are_copied_only_by_launches_whose_samples_want_them():
    run = Run(limits())
    run.add(request("a", 10, max_tokens=2, logprobs=1), request("b", 4, max_tokens=6))
    run.finish()
    wanting = [(new.program, new.slots) for new in run.executor.launches if new.wants_top]
    assert wanting == [(Program.PREFILL, (0, 1)), (Program.DECODE, (0, 1))]


def test_penalties_take_the_history_along_and_nothing_else_does():
    run = Run(limits(num_pages=7))
    run.add(request("a", 8, max_tokens=8), request("b", 8, max_tokens=8, presence_penalty=0.5))
    run.finish()
    admitted = [new for launch in run.executor.launches for new in launch.admitted]
    assert run.scheduler.stats().preemptions == 1
    assert [bool(new.history) for new in admitted] == [False, True, True]
    assert admitted[2].history[8:] == run.tokens["b"][: len(admitted[2].history) - 8] != ()
    assert [new.num_prompt for new in admitted] == [8, 8, 8]


# Deterministic launches.


def shape_of(launches, prompt):
    """What a request's launches looked like to its own rows: chunks of its prompt, one bucket."""
    return [
        (launch.bucket, launch.starts, launch.counts, launch.tokens)
        for launch in launches
        if launch.tokens and launch.tokens[0] in prompt
    ]


def test_deterministic_prompts_are_cut_the_same_whatever_runs_beside_them():
    bounds = limits(deterministic=True, decode_buckets=(4,), prefill_buckets=(8,))
    alone, crowd = Run(bounds), Run(bounds)
    new = request("m", 18)
    alone.add(new)
    crowd.add(request("a", 3, max_tokens=9), request("b", 11), new, request("c", 5))
    alone.finish()
    crowd.finish()
    wanted = shape_of(alone.executor.launches, new.prompt)
    assert [counts for _, _, counts, _ in wanted] == [(8,), (8,), (2,)]
    assert shape_of(crowd.executor.launches, new.prompt) == wanted


def test_deterministic_prefill_and_decode_alternate():
    run = Run(limits(deterministic=True, decode_buckets=(4,), prefill_buckets=(8,)))
    run.add(request("a", 3, max_tokens=9), request("b", 20, max_tokens=2))
    run.finish()
    programs = [launch.program for launch in run.executor.launches[:6]]
    assert programs == [Program.PREFILL, Program.DECODE] * 3


def test_a_deterministic_request_decodes_again_what_preemption_took_and_sends_it_once():
    run = Run(limits(num_pages=7, deterministic=True, decode_buckets=(4,), prefill_buckets=(8,)))
    run.add(request("a", 8, max_tokens=8), request("b", 8, max_tokens=8))
    run.finish()
    assert run.scheduler.stats().preemptions > 0
    prompts = {new.prompt for new in run.added.values()}
    assert {launch.tokens for launch in run.executor.launches if launch.tokens} == prompts


# The order of calls.


def test_a_second_plan_before_the_first_is_committed_is_our_fault():
    scheduler = Scheduler(limits())
    scheduler.add(request("a", 3))
    scheduler.plan(0.0)
    with pytest.raises(AssertionError, match="in flight"):
        scheduler.plan(0.0)


def test_an_abort_with_a_launch_in_flight_is_our_fault():
    scheduler = Scheduler(limits())
    scheduler.add(request("a", 3))
    scheduler.plan(0.0)
    with pytest.raises(AssertionError, match="in flight"):
        scheduler.abort("a")


def test_commits_come_in_the_order_of_the_plan():
    scheduler = Scheduler(limits())
    scheduler.add(request("a", 3))
    [prefill] = scheduler.plan(0.0)
    scheduler.commit(prefill, sampled(5), 0.0)
    scheduler.add(request("b", 3))
    _, later = scheduler.plan(0.0)
    with pytest.raises(AssertionError, match="before"):
        scheduler.commit(later, sampled(5), 0.0)


def test_a_launch_is_committed_once():
    scheduler = Scheduler(limits())
    scheduler.add(request("a", 3))
    [prefill] = scheduler.plan(0.0)
    assert scheduler.commit(prefill, sampled(5), 0.0) == (RequestOutput("a", (5,)),)
    with pytest.raises(AssertionError, match="not planned"):
        scheduler.commit(prefill, sampled(5), 0.0)


def test_an_idle_scheduler_plans_nothing():
    scheduler = Scheduler(limits())
    assert scheduler.plan(0.0) == ()
    assert not scheduler.has_work
    assert scheduler.stats().steps == 0


def test_busy_seconds_run_from_a_plan_to_its_last_commit():
    run = Run(limits())
    run.add(request("a", 3, 2), request("b", 8, 1))
    run.finish()
    assert run.scheduler.stats().busy_seconds == run.steps * 0.5


# Any trace at all.


@st.composite
def any_limits(draw):
    """Every second machine has many slots and a pool for little more than the longest request."""
    crowded = draw(st.booleans())
    num_slots = draw(st.integers(3, 5) if crowded else st.integers(1, 5))
    page_size = draw(st.integers(1, 3) if crowded else st.integers(1, 5))
    max_model_len = draw(st.integers(14, 24) if crowded else st.integers(2, 24))
    longest = -(-(max_model_len - 1) // page_size)
    num_pages = 1 + longest + draw(st.integers(0, 2)) if crowded else draw(st.integers(2, 14))
    budget = num_slots + draw(st.integers(1, 16))
    return SchedulerLimits(
        num_pages=num_pages,
        page_size=page_size,
        num_slots=num_slots,
        max_model_len=max_model_len,
        max_num_batched_tokens=budget,
        decode_buckets=tuple(sorted({draw(st.integers(1, num_slots)), num_slots})),
        prefill_buckets=tuple(sorted({draw(st.integers(1, budget)), budget})),
        max_prefill_rows=draw(st.integers(1, 3)),
    )


def arrivals(prompt_lens, max_tokens):
    return st.tuples(st.just("add"), prompt_lens, max_tokens, st.none() | st.integers(0, 12))


short, any_length = arrivals(st.integers(1, 5), st.integers(8, 20)), st.integers(1, 20)
bursts = st.lists(short, min_size=3, max_size=6)
aborts = st.tuples(st.just("abort"), st.integers(0, 15))
steps = st.tuples(st.just("step"), st.integers(1, 6))
events = arrivals(any_length, any_length) | short | aborts | steps
traces = st.builds(list.__add__, st.just([]) | bursts, st.lists(events, max_size=30))


def play(bounds, trace):
    """Runs a trace to its end; refuses exactly the requests that cannot fit."""
    run = Run(bounds)
    for sequence, (kind, *numbers) in enumerate(trace):
        if kind == "step":
            for _ in range(numbers[0]):
                if run.scheduler.has_work:
                    run.step()
        elif kind == "abort":
            ids = ["unknown", *run.added]
            run.abort(ids[numbers[0] % len(ids)])
        else:
            add(run, str(sequence), *numbers)
    return run.finish()


def add(run, request_id, prompt_len, max_tokens, stop_after):
    bounds = run.bounds
    new = request(request_id, prompt_len, max_tokens, seed=int(request_id))
    if stop_after is not None:
        stop = expected(new.prompt, stop_after + 1, seed=new.sampling.seed)[-1]
        seed = new.sampling.seed
        new = request(request_id, prompt_len, max_tokens, seed=seed, stop_ids=(stop, 10**6))
    fed = min(prompt_len + max_tokens, bounds.max_model_len) - 1
    usable_tokens = (bounds.num_pages - 1) * bounds.page_size
    if prompt_len < bounds.max_model_len and fed <= usable_tokens:
        run.add(new)
    else:
        with pytest.raises(InvalidRequest):
            run.scheduler.add(new)


@given(any_limits(), traces)
@settings(max_examples=200, deadline=None, database=None)
def test_every_trace_gives_every_request_its_tokens_and_returns_every_page(bounds, trace):
    play(bounds, trace)


@given(any_limits(), traces)
@settings(max_examples=50, deadline=None, database=None)
def test_a_trace_gives_the_same_launches_twice(bounds, trace):
    assert play(bounds, trace).executor.launches == play(bounds, trace).executor.launches


def long_trace_digest():
    """A trace with preemption, aborts and stops, as one number for another process to compare."""
    draw = random.Random(5)
    trace = []
    for _ in range(80):
        stop_after = draw.choice((None, None, 3))
        trace.append(("add", draw.randint(1, 20), draw.randint(1, 12), stop_after))
        trace.append(("step", draw.randint(1, 4)))
        trace.append(("abort", draw.randint(0, 450)))
    run = play(limits(num_pages=9), trace)
    assert run.scheduler.stats().preemptions > 10
    assert len(run.aborted) > 5
    return hashlib.sha256(repr(run.executor.launches).encode()).hexdigest()


def test_two_processes_plan_the_same_launches_whatever_their_hash_seed():
    script = "import test_scheduler; print(test_scheduler.long_trace_digest())"
    digests = {long_trace_digest()}
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
