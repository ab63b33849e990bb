"""Two lanes on a split device: decode is planned, finished and planned again beside prefill."""

from dataclasses import dataclass, field, replace
from itertools import count, product

import pytest
from fake_executor import expected
from scheduler_run import Run, limits, request

from duetjax.config import InvalidRequest
from duetjax.policy.durations import DurationTable
from duetjax.policy.flights import Pace
from duetjax.policy.launch import Lane, Program, RowFlag, Split
from duetjax.policy.policies import Aggregate, Duet, StaticSplit
from duetjax.policy.request import FinishReason

SPLIT = Split(decode=40, prefill=92)
BUDGET = 64


def wide(**changes):
    """Prompts of up to 64 tokens in one launch, answers of many k."""
    sizes = {"num_pages": 129, "max_model_len": 128, "prefill_buckets": (8, 16, 32, 64)}
    return limits(**{**sizes, "max_num_batched_tokens": BUDGET, **changes})


def split_run(*, k=8, pace=None, **changes):
    return Run(wide(**changes), StaticSplit(BUDGET, SPLIT, k), pace)


def episode(*decoding, long=60, **changes):
    """A run in which `decoding` decode and the prefill of "long" has just been planned."""
    run = split_run(**changes).add(*decoding)
    run.turn()
    run.add(request("long", long, max_tokens=3))
    return run, run.plan()


# Episodes.


def test_the_decode_lane_goes_on_by_itself_while_one_prefill_launch_is_in_flight():
    stop = expected(request("a", 5).prompt, 14)[-1]
    decoding = request("a", 5, 90, stop_ids=(stop,)), request("b", 5, 90), request("c", 5, 90)
    run, (decode, prefill) = episode(*decoding)
    slots = [decode.slots]
    for happens in ("nothing", "a stop", "an abort and an admission"):
        outputs = run.finish_launch(Lane.DECODE)
        if happens == "a stop":
            assert run.finished == {"a": FinishReason.STOP}
        if happens == "an abort and an admission":
            assert {output.id for output in outputs} == {"b", "c"}
            run.abort("b")
            run.add(request("d", 7))
        [decode] = run.plan()
        assert (decode.lane, decode.program, decode.k) == (Lane.DECODE, Program.DECODE, 8)
        assert [flight[0] for flight in run.in_flight[Lane.PREFILL]] == [prefill]
        slots.append(decode.slots)
    assert slots == [(0, 1, 2), (0, 1, 2), (1, 2), (2,)]
    assert len(run.tokens["a"]) == 14
    assert run.stats.running == 3  # c, long and d, which has got a slot in the meantime
    run.finish_launch(Lane.PREFILL)
    [next_prefill] = run.plan()
    assert [new.slot for new in next_prefill.admitted] == [0]
    assert next_prefill.tokens == request("d", 7).prompt
    run.finish()


def test_the_decode_side_is_submitted_first():
    _, (decode, prefill) = episode(request("a", 5, 50))
    assert (decode.lane, prefill.lane) == (Lane.DECODE, Lane.PREFILL)
    assert decode.ticket < prefill.ticket
    assert decode.split == prefill.split == SPLIT
    assert (prefill.program, prefill.k) == (Program.PREFILL, 1)
    assert 0 not in prefill.counts


@dataclass(frozen=True)
class Fickle:
    """Splits the device differently each time it is asked."""

    splits: count = field(default_factory=lambda: count(1))

    def decide(self, load):
        if load.rows and load.prompt_tokens:
            return Duet(Split(next(self.splits), 1), 2, BUDGET)
        return Aggregate(BUDGET)


@pytest.mark.parametrize("launches_per_lane", [1, 2])
def test_the_split_is_fixed_inside_an_episode(launches_per_lane):
    run = Run(wide(launches_per_lane=launches_per_lane), Fickle())
    run.add(request("a", 5, 100))
    run.turn()
    episodes = []
    for number in range(3):
        run.add(request(f"long {number}", 100, max_tokens=1))
        splits = set()
        while f"long {number}" not in run.finished:
            splits |= {launch.split for launch in run.turn() if launch.lane is not Lane.WHOLE}
        while any(run.in_flight.values()):  # the next episode begins with the next prompt
            run.finish_launch(run.lanes_in_flight()[0])
        assert len(splits) == 1
        episodes += splits
    assert len(set(episodes)) == 3
    run.finish()


@pytest.mark.parametrize("last", [Lane.PREFILL, Lane.DECODE])
def test_the_whole_device_waits_for_both_lanes(last):
    run, _ = episode(request("a", 5, 50), k=1)
    first = Lane.DECODE if last is Lane.PREFILL else Lane.PREFILL
    run.finish_launch(Lane.PREFILL)
    run.plan()
    if run.in_flight[first]:
        run.finish_launch(first)
    while run.in_flight[last]:
        assert not any(launch.lane is Lane.WHOLE for launch in run.plan())
        run.finish_launch(last)
    while not run.in_flight[Lane.WHOLE]:
        assert run.plan()
    run.finish()


def test_an_episode_waits_for_the_whole_device():
    run = split_run(launches_per_lane=2).add(request("a", 5, 50))
    whole = run.plan()
    assert [launch.lane for launch in whole] == [Lane.WHOLE] * 2
    run.add(request("long", 60))
    run.finish_launch()
    assert run.plan() == ()
    run.finish_launch()
    assert {launch.lane for launch in run.plan()} == {Lane.DECODE, Lane.PREFILL}
    run.finish()


def test_prefill_runs_beside_the_last_steps_of_whatever_decodes():
    _, launches = episode(request("a", 5, 9))  # its 8 steps left are all in the decode launch
    assert [launch.lane for launch in launches] == [Lane.DECODE, Lane.PREFILL]


def test_both_lanes_are_planned_two_launches_ahead():
    run = split_run(launches_per_lane=2, k=2, max_num_batched_tokens=16, prefill_buckets=(16,))
    run.add(request("a", 5, 50))
    run.plan()
    run.add(request("long", 60))
    while run.in_flight[Lane.WHOLE]:
        run.finish_launch()
    lanes = [launch.lane for launch in run.plan()]
    assert sorted(lanes) == [Lane.DECODE, Lane.DECODE, Lane.PREFILL, Lane.PREFILL]
    run.finish()


# From prefill to decode.


def test_a_prompt_is_handed_over_by_the_first_decode_launch_after_it_completed():
    run, (_, prefill) = episode(request("a", 5, 50))
    [slot] = prefill.slots
    run.finish_launch(Lane.DECODE)
    [decode] = run.plan()
    assert slot not in decode.slots
    run.finish_launch(Lane.PREFILL)
    assert len(run.tokens["long"]) == 1
    assert run.plan() == ()
    run.finish_launch(Lane.DECODE)
    [joined] = run.plan()
    assert slot in joined.slots
    assert joined.handovers == ((slot, prefill.ticket),)
    run.finish()
    assert [launch.handovers for launch in run.launches].count(joined.handovers) == 1


def test_the_device_takes_no_row_whose_prompt_is_not_complete():
    run, (decode, prefill) = episode(request("a", 5, 50))
    forged = replace(decode, ticket=3, pages=(), limits=(), slots=(*decode.slots, *prefill.slots))
    with pytest.raises(AssertionError, match="in flight on the other lane"):
        run.executor.submit(forged)
    early = replace(forged, handovers=((prefill.slots[0], prefill.ticket),), slots=decode.slots)
    with pytest.raises(AssertionError, match="handed over before launch 2 has completed"):
        run.executor.submit(early)
    run.finish_launch(Lane.PREFILL)
    run.finish_launch(Lane.DECODE)
    run.executor.submit(replace(forged, ticket=len(run.launches)))
    with pytest.raises(AssertionError, match="decodes before it is handed over"):
        run.executor.result(len(run.launches) - 1)


def test_an_answer_of_one_token_is_never_handed_over():
    run = split_run().add(request("a", 5, 30))
    run.turn()
    run.add(request("b", 60, max_tokens=1)).finish()
    assert run.finished["b"] is FinishReason.LENGTH
    assert not any(launch.handovers for launch in run.launches)


def test_an_abort_between_completion_and_hand_over_leaves_nothing_to_hand_over():
    run, _ = episode(request("a", 5, 50))
    run.finish_launch(Lane.PREFILL)
    assert run.abort("long")
    run.finish()
    assert not any(launch.handovers for launch in run.launches)


def test_a_prompt_finished_in_an_episode_may_be_handed_over_to_the_whole_device():
    run, (_, prefill) = episode(request("a", 5, 12))
    run.finish_launch(Lane.DECODE)
    run.plan()
    run.finish_launch(Lane.DECODE)
    assert run.finished["a"] is FinishReason.LENGTH
    run.finish_launch(Lane.PREFILL)
    [whole] = run.plan()
    assert (whole.lane, whole.handovers) == (Lane.WHOLE, ((prefill.slots[0], prefill.ticket),))
    run.finish()


# How long a prefill launch may be.

STEP_MS = {8: 10.0, 16: 70.0, 32: 150.0, 64: 300.0}


def pace(**changes):
    """Prefill on the split as in STEP_MS, everything else 1 ms a step."""
    table = dict.fromkeys(product((None, SPLIT), Program, (2, 4, 8, 16, 32, 64)), 1.0)
    table |= {(SPLIT, Program.PREFILL, size): ms for size, ms in STEP_MS.items()}
    return Pace(DurationTable(table), **changes)


@pytest.mark.parametrize(
    ("changes", "slos", "longest"),
    [
        ({}, (None, None), 32),  # 4 x 50 ms
        ({"tbt_slo_ms": 20.0}, (None, None), 16),
        ({}, (None, 20.0), 16),
        ({}, (90.0, 80.0), 64),
        ({}, (90.0, None), 32),
        ({"max_prefill_launch_ms": 75.0}, (None, None), 16),
        ({"max_prefill_launch_ms": 1.0}, (None, None), 8),  # at least one bucket
        ({}, (1.0, None), 8),
    ],
)
def test_prefill_beside_decode_is_cut_to_four_times_the_tightest_objective(changes, slos, longest):
    news = [request(i, 5, 100, tbt_slo_ms=slo) for i, slo in zip("ab", slos, strict=True)]
    run, (_, prefill) = episode(*news, pace=pace(**changes))
    assert prefill.counts == (min(longest, 60),)
    assert prefill.bucket == longest
    run.finish()


def test_without_durations_a_prefill_launch_is_as_long_as_the_budget():
    _, (_, prefill) = episode(request("a", 5, 50), long=100)
    assert prefill.counts == (BUDGET,)


def test_only_requests_that_decode_have_a_say_in_it():
    run = split_run(pace=pace()).add(request("a", 5, 50))
    run.turn()
    run.add(request("long", 60, tbt_slo_ms=1.0))
    _, prefill = run.plan()
    assert prefill.counts == (32,)
    run.finish()


def test_prefill_on_the_whole_device_is_not_cut():
    run = split_run(pace=pace(max_prefill_launch_ms=1.0)).add(request("a", 60))
    assert run.plan()[0].counts == (60,)
    run.finish()


def test_a_launch_says_how_long_all_its_steps_should_take():
    run, (decode, prefill) = episode(request("a", 5, 50), pace=pace())
    assert (decode.predicted_ms, prefill.predicted_ms) == (8.0, STEP_MS[32])
    run.finish()
    _, (decode, prefill) = episode(request("a", 5, 50))
    assert (decode.predicted_ms, prefill.predicted_ms) == (None, None)


# What went wrong elsewhere.


def test_a_wholly_cached_prompt_computes_its_last_token_on_the_prefill_lane():
    prompt = request("x", 16).prompt
    run = split_run().add(request("x", prompt=prompt, max_tokens=1)).finish()
    run.add(request("a", 5, 50))
    run.turn()
    run.add(request("y", prompt=prompt))
    _, prefill = run.plan()
    assert (prefill.lane, prefill.starts, prefill.counts) == (Lane.PREFILL, (12,), (4,))
    run.finish()
    assert run.cached["y"] == 12


def test_a_prompt_larger_than_one_prefill_launch_samples_only_at_its_end():
    run, (_, first) = episode(request("a", 5, 100), long=100)
    run.finish_launch(Lane.PREFILL)
    [second] = run.plan()
    assert (first.counts, first.samples) == ((64,), (False,))
    assert (second.starts, second.counts, second.samples) == ((64,), (36,), (True,))
    assert run.tokens["long"] == ()
    run.finish()


class SplitForPrompts:
    """Splits the device for prompts even when nothing decodes."""

    def decide(self, load):
        return Duet(SPLIT, 8, BUDGET) if load.prompt_tokens else Aggregate(BUDGET)


def test_an_empty_decode_batch_is_no_launch():
    run = Run(wide(), SplitForPrompts()).add(request("a", 60))
    [launch] = run.plan()
    assert (launch.lane, launch.slots) == (Lane.PREFILL, (0,))
    run.finish()


def test_the_last_decoding_row_may_end_while_prefill_is_still_in_flight():
    run, _ = episode(request("a", 5, 12))
    run.finish_launch(Lane.DECODE)
    run.plan()
    run.finish_launch(Lane.DECODE)
    assert run.finished["a"] is FinishReason.LENGTH
    assert run.plan() == ()
    run.finish()


def test_a_row_never_writes_beyond_the_pages_it_has():
    run = Run(wide(num_pages=6), StaticSplit(BUDGET, SPLIT, 8)).add(request("a", 3, 17))
    run.turn()
    run.add(request("b", 11, 3))
    decode, *_ = run.plan()
    assert run.stats.pages_free == 0
    assert (decode.k, decode.limits) == (5, ((0, 8),))  # position 3, 2 pages, and 8 steps wanted
    steps = [run.executor.result(decode.ticket, step) for step in range(decode.k)]
    at_limit = [bool(result.flags[0] & RowFlag.AT_LIMIT) for result in steps]
    assert at_limit == [False] * 4 + [True]


@pytest.mark.parametrize("prompt_len", [20, 17])
def test_a_request_that_can_never_fit_is_refused_on_a_split_device_too(prompt_len):
    run = split_run(num_pages=6)
    with pytest.raises(InvalidRequest, match="there are 5"):
        run.add(request("a", prompt_len, max_tokens=5))
    run.add(request("a", prompt_len, max_tokens=21 - prompt_len)).finish()


@dataclass(frozen=True)
class ManySteps:
    """Up to 8 steps at a time on the whole device."""

    def decide(self, load):
        return Aggregate(BUDGET, k=8)


@pytest.mark.parametrize("launches_per_lane", [1, 2])
def test_the_end_of_an_answer_and_of_its_pages_end_a_row_inside_a_launch(launches_per_lane):
    run = Run(wide(num_pages=11, launches_per_lane=launches_per_lane), ManySteps())
    run.add(request("a", 3, 13), request("b", 9, 20), request("c", 6, 2)).finish()
    assert max(launch.k for launch in run.launches) == 8
    assert sum(launch.k for launch in run.launches) == run.steps
