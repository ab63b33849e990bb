"""Requests that lose their pages or are aborted, with and without launches in flight."""

import pytest
from fake_executor import expected
from scheduler_run import Run, limits, request

from duetjax.policy.launch import Lane, Program

AHEAD = pytest.mark.parametrize("launches_per_lane", [1, 2])


def crowded(*others, **changes):
    """Runs until b loses its pages: it and a need 4 each in the end, and there are 6."""
    run = Run(limits(**{"num_pages": 7, "prefix_caching": False, **changes}))
    run.add(request("a", 8, max_tokens=8), request("b", 8, max_tokens=8), *others)
    while run.stats.preemptions == 0:
        run.turn()
    return run


def test_the_youngest_is_preempted_when_pages_run_out():
    run = crowded()
    assert run.launches[-1].slots == (0,)
    stats = run.stats
    assert (stats.running, stats.waiting, stats.preemptions) == (1, 1, 1)


def test_the_least_urgent_is_preempted_though_it_came_first():
    run = Run(limits(num_pages=7)).add(request("b", 8, max_tokens=8, priority=1))
    run.add(request("a", 8, max_tokens=8)).finish()
    assert run.stats.preemptions == 1
    assert list(run.finished) == ["a", "b"]


def test_a_preempted_request_recomputes_its_output_and_repeats_none_of_it():
    run = crowded()
    said = run.tokens["b"]
    assert 0 < len(said) < 8
    before = len(run.launches)
    run.finish()
    again = [launch for launch in run.launches[before:] if launch.tokens]
    assert sum((launch.tokens for launch in again), ()) == (*run.added["b"].prompt, *said)
    assert [len(launch.admitted) for launch in again] == [1] + [0] * (len(again) - 1)
    assert run.tokens["b"][: len(said)] == said
    assert run.stats.preempted_tokens == 8 + len(said) - 1
    assert run.stats.prompt_tokens == 16


def test_a_preempted_request_finds_its_full_pages_in_the_cache_if_nobody_took_them():
    run = crowded(prefix_caching=True)
    run.finish()
    again = [launch for launch in run.launches if launch.admitted][-1]
    assert again.starts[-1] > 0
    assert run.cached == {"a": 0, "b": 0}  # nothing of it was there when it was new


@AHEAD
def test_what_launches_in_flight_sample_for_a_preempted_request_is_kept(launches_per_lane):
    run = Run(limits(num_pages=7, launches_per_lane=launches_per_lane))
    run.add(request("a", 8, max_tokens=8), request("b", 8, max_tokens=8))
    while run.stats.preemptions == 0:
        in_flight = run.scheduler.num_in_flight
        run.plan()
        said = run.tokens["b"]
        run.finish_launch()
    run.finish()
    admitted = [launch for launch in run.launches if launch.admitted]
    recomputed = [launch for launch in run.launches if launch.ticket >= admitted[-1].ticket]
    known = recomputed[0].starts[-1] + sum(len(launch.tokens) for launch in recomputed)
    assert known == 8 + len(said) + in_flight
    assert in_flight == launches_per_lane - 1


@AHEAD
def test_a_slot_goes_on_only_when_no_launch_in_flight_names_it(launches_per_lane):
    run = crowded(request("c", 8), launches_per_lane=launches_per_lane)
    while run.scheduler.has_work:
        busy = {slot for launch, _ in run.in_flight[Lane.WHOLE] for slot in launch.slots}
        for launch in run.plan():
            assert not busy & {new.slot for new in launch.admitted}
            busy |= {*launch.slots}
        run.finish_launch()
    run.finish()


def test_a_preempted_request_goes_before_those_that_waited_when_it_was_running():
    run = crowded(request("c", 8))
    said = run.tokens["b"]
    while run.tokens["b"] == said:
        assert run.tokens["c"] == ()
        run.turn()
    run.finish()


def test_the_youngest_gives_way_to_itself_being_the_one_that_grows():
    run = Run(limits(num_pages=6, max_num_batched_tokens=20, prefill_buckets=(20,)))
    run.add(request("a", 10, max_tokens=6), request("b", 7, max_tokens=6))
    run.turn()
    assert run.turn()[0].slots == (0, 1)  # a is at position 10, b at 7, 5 of 5 pages in use
    assert run.turn()[0].slots == (0,)
    assert run.stats.preemptions == 1
    run.finish()


def test_an_unfinished_prompt_is_preempted_before_any_decoding_row():
    run = Run(limits(num_pages=8, max_num_batched_tokens=5, prefill_buckets=(5,)))
    run.add(request("a", 3, max_tokens=9))
    run.turn()
    run.add(request("b", 20, max_tokens=2))
    while run.stats.preemptions == 0:
        [launch] = run.turn()
    assert launch.slots[0] == 0
    assert run.tokens["b"] == ()
    run.finish()


def test_a_preempted_request_that_needs_all_pages_to_end_is_admitted_again():
    run = Run(limits(num_pages=4))
    run.add(request("a", 3, max_tokens=6), request("b", 7, max_tokens=6))  # b feeds 12 positions
    run.finish()
    assert run.stats.preemptions > 0


def test_penalties_take_the_history_along_and_nothing_else_does():
    run = Run(limits(num_pages=7))
    run.add(request("a", 8, max_tokens=8), request("b", 8, max_tokens=8, presence_penalty=0.5))
    run.finish()
    admitted = [new for launch in run.launches for new in launch.admitted]
    assert run.stats.preemptions == 1
    assert [bool(new.history) for new in admitted] == [False, True, True]
    assert admitted[2].history[8:] == run.tokens["b"][: len(admitted[2].history) - 8] != ()
    assert [new.num_prompt for new in admitted] == [8, 8, 8]


# Deterministic launches.


DETERMINISTIC = {"deterministic": True, "decode_buckets": (4,), "prefill_buckets": (8,)}


def shape_of(launches, prompt):
    """What a request's launches looked like to its own rows: chunks of its prompt, one bucket."""
    return [
        (launch.bucket, launch.starts, launch.counts, launch.tokens)
        for launch in launches
        if launch.tokens and launch.tokens[0] in prompt
    ]


@AHEAD
def test_deterministic_prompts_are_cut_the_same_whatever_runs_beside_them(launches_per_lane):
    bounds = limits(**DETERMINISTIC, launches_per_lane=launches_per_lane)
    new = request("m", 18)
    alone = Run(bounds).add(new).finish()
    crowd = Run(bounds).add(request("a", 3, max_tokens=9), request("b", 11), new, request("c", 5))
    crowd.finish()
    wanted = shape_of(alone.launches, new.prompt)
    assert [counts for _, _, counts, _ in wanted] == [(8,), (8,), (2,)]
    assert shape_of(crowd.launches, new.prompt) == wanted


def test_deterministic_cache_hits_end_where_a_chunk_ends():
    prompt = request("a", 18).prompt
    bounds = limits(**DETERMINISTIC, page_size=2, num_pages=33)
    run = Run(bounds).add(request("a", prompt=prompt[:15])).finish()
    run.add(request("b", prompt=prompt)).finish()
    assert run.cached["b"] == 8  # of 14 tokens in full pages


@AHEAD
def test_deterministic_prefill_and_decode_alternate(launches_per_lane):
    run = Run(limits(**DETERMINISTIC, launches_per_lane=launches_per_lane))
    run.add(request("a", 3, max_tokens=9), request("b", 20, max_tokens=2)).finish()
    programs = [launch.program for launch in run.launches[:6]]
    assert programs == [Program.PREFILL, Program.DECODE] * 3


@AHEAD
def test_a_deterministic_request_decodes_again_what_preemption_took_and_sends_it_once(
    launches_per_lane,
):
    run = Run(limits(num_pages=7, **DETERMINISTIC, launches_per_lane=launches_per_lane))
    run.add(request("a", 8, max_tokens=8), request("b", 8, max_tokens=8)).finish()
    assert run.stats.preemptions > 0
    prompts = {new.prompt for new in run.added.values()}
    chunks = {launch.tokens for launch in run.launches if launch.tokens and 0 in launch.starts}
    assert chunks == prompts


def test_a_deterministic_request_may_be_preempted_while_it_decodes_again():
    run = Run(limits(num_pages=9, page_size=2, **DETERMINISTIC, launches_per_lane=2))
    run.add(*(request(i, 3, max_tokens=13) for i in "abcd")).finish()
    assert run.stats.preemptions > 4


@AHEAD
def test_a_request_that_computes_anew_what_is_cached_needs_no_more_pages_for_it(launches_per_lane):
    bounds = limits(num_pages=4, **DETERMINISTIC, launches_per_lane=launches_per_lane)
    prompt = request("a", 6).prompt  # its one full page is no whole chunk, so it is not used
    run = Run(bounds).add(request("a", prompt=prompt, max_tokens=1)).finish()
    run.add(request("b", prompt=prompt, max_tokens=7)).finish()  # needs all three pages
    assert run.stats.preemptions == 0


# Aborts at every stage.


def test_an_abort_while_waiting_leaves_no_trace_in_the_launches():
    run = Run(limits()).add(request("a"), request("b"), request("c"))
    assert run.abort("b")
    run.finish()
    assert [len(launch.admitted) for launch in run.launches] == [2, 0, 0, 0]
    assert run.tokens["b"] == ()


def test_an_abort_in_the_middle_of_a_prompt_gives_its_pages_back_at_once():
    run = Run(limits()).add(request("a", 20))
    run.turn()
    assert run.stats.pages_free == 10
    assert run.abort("a")
    assert (run.stats.pages_free, run.stats.pages_cached) == (14, 2)
    assert not run.scheduler.has_work


@AHEAD
def test_an_abort_with_launches_in_flight_quarantines_pages_until_the_last_has_completed(
    launches_per_lane,
):
    run = Run(limits(launches_per_lane=launches_per_lane)).add(request("a", 20))
    run.plan()
    assert run.abort("a")
    for _ in range(launches_per_lane):
        assert (run.stats.pages_free, run.stats.pages_quarantined) == (10, 6)
        assert run.finish_launch() == []
    assert (run.stats.pages_free, run.stats.pages_quarantined) == (16, 0)


def test_a_slot_in_flight_goes_to_the_next_owner_after_its_last_launch():
    run = Run(limits(num_slots=1, launches_per_lane=2)).add(request("a", 6, max_tokens=20))
    run.plan()
    run.abort("a")
    run.add(request("b"))
    assert run.plan() == ()
    run.finish_launch()
    assert run.plan() == ()
    run.finish_launch()
    launch, _ = run.plan()
    assert [new.slot for new in launch.admitted] == [0]
    run.finish()


def test_an_abort_while_decoding_leaves_the_neighbours_alone():
    run = Run(limits(launches_per_lane=2)).add(request("a"), request("b"), request("c", 2))
    run.plan()
    run.finish_launch()
    assert run.abort("a")
    run.finish()
    assert len(run.tokens["a"]) == 1
    assert set(run.finished) == {"b", "c"}


def test_a_preempted_request_can_be_aborted_even_while_a_launch_still_names_it():
    run = crowded(launches_per_lane=2)
    assert run.abort("b")
    run.finish()
    assert set(run.finished) == {"a"}


def test_a_request_can_be_aborted_and_its_id_used_again_while_it_is_in_flight():
    run = Run(limits(launches_per_lane=2)).add(request("a", 6, max_tokens=9))
    run.plan()
    assert run.abort("a")
    run.aborted.clear()
    run.add(request("a", 6, max_tokens=3)).finish()
    assert run.tokens["a"] == expected(request("a", 6).prompt, 3)


def test_an_abort_of_an_unknown_or_finished_request_says_so():
    run = Run(limits()).add(request("a", 3, 1)).finish()
    assert not run.abort("a")
    assert not run.abort("never")
