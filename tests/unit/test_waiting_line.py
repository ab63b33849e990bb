"""Who goes next: rank by priority and age, twins that wait for each other's pages, cache hits."""

import random

from fake_executor import expected
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_run import Run, limits, request

from duetjax.policy.queue import AGEING_SECONDS
from duetjax.policy.request import FinishReason


def test_a_small_request_does_not_overtake_a_large_one_that_waits_for_pages():
    run = Run(limits(num_pages=7))
    run.add(request("a", 12, max_tokens=3), request("b", 20, max_tokens=1), request("c", 1))
    run.finish()
    assert run.first_tokens == ["a", "b", "c"]
    assert run.stats.preemptions == 0


def test_the_lower_priority_number_goes_first():
    run = Run(limits(num_slots=1))
    run.add(request("a", priority=2), request("b", priority=1), request("c"))
    run.finish()
    assert run.first_tokens == ["c", "b", "a"]


def test_priority_decides_whose_prompt_is_continued_too():
    run = Run(limits()).add(request("a", 20, priority=1))
    run.turn()
    run.add(request("b", 20))
    run.finish()
    assert run.first_tokens == ["b", "a"]


def test_waiting_long_enough_outweighs_priority():
    run = Run(limits(num_slots=1)).add(request("old", priority=1))
    run.now = AGEING_SECONDS - 1
    run.add(request("soon"))
    run.now = AGEING_SECONDS + 1
    run.add(request("late"))
    run.finish()
    assert run.first_tokens == ["soon", "old", "late"]


def test_a_stream_of_urgent_requests_starves_nobody():
    run = Run(limits(num_slots=1)).add(request("patient", priority=1))
    for number in range(100):
        run.add(request(f"urgent {number}", 1, max_tokens=1))
        run.turn()
        if "patient" in run.first_tokens:
            break
    assert "patient" in run.first_tokens
    assert run.now <= AGEING_SECONDS + 2
    run.finish()


arrivals = st.lists(
    st.tuples(st.integers(0, 3), st.floats(0, 8), st.integers(1, 12), st.integers(0, 3)),
    min_size=2,
    max_size=14,
)


@given(arrivals, st.integers(1, 3), st.sampled_from([1, 2]))
@settings(max_examples=60, deadline=None, database=None)
def test_nothing_is_overtaken_by_what_came_too_late_for_its_priority(
    news, num_slots, launches_per_lane
):
    run, arrived = Run(limits(num_slots=num_slots, launches_per_lane=launches_per_lane)), {}
    for number, (priority, pause, prompt_len, turns) in enumerate(news):
        run.now += pause
        prompt = (5000 + number, *range(1, prompt_len))
        run.add(request(str(number), prompt=prompt, priority=priority))
        arrived[str(number)] = run.now
        for _ in range(turns):
            run.turn()
    run.finish()
    for place, late in enumerate(run.first_tokens):
        for early in run.first_tokens[place + 1 :]:
            allowed = run.added[early].priority * AGEING_SECONDS
            assert arrived[late] <= arrived[early] or arrived[late] - arrived[early] < allowed


# Prompts that begin alike.


def test_a_prompt_that_is_wholly_cached_still_computes_its_last_token():
    prompt = request("a", 8).prompt
    run = Run(limits()).add(request("a", prompt=prompt)).finish()
    run.add(request("b", prompt=prompt))
    [launch] = run.turn()
    assert (launch.starts, launch.counts, launch.samples) == ((4,), (4,), (True,))
    assert launch.tokens == prompt[4:]
    run.finish()
    assert run.cached == {"a": 0, "b": 4}
    assert run.stats.prefix_hits == 4


def test_a_cached_prompt_of_whole_pages_and_one_token_computes_only_that_token():
    prompt = request("a", 9).prompt
    run = Run(limits()).add(request("a", prompt=prompt)).finish()
    run.add(request("b", prompt=prompt)).finish()
    assert run.cached["b"] == 8
    assert [launch.tokens for launch in run.launches if launch.tokens][-1] == prompt[8:]


def test_what_an_answer_added_is_found_by_the_next_turn_of_a_conversation():
    first = request("a", 6, max_tokens=7)
    run = Run(limits()).add(first).finish()
    run.add(request("b", prompt=(*first.prompt, *run.tokens["a"], 5, 6))).finish()
    assert run.cached["b"] == 12  # 6 + 7 tokens, the last one never fed


def test_requests_with_another_salt_share_nothing():
    prompt = request("a", 9).prompt
    run = Run(limits()).add(request("a", prompt=prompt, cache_salt="x")).finish()
    run.add(request("b", prompt=prompt)).finish()
    assert run.cached["b"] == 0


def test_twins_wait_for_the_pages_that_the_first_of_them_computes():
    prompt = tuple(range(300, 321))
    run = Run(limits(num_pages=33, max_num_batched_tokens=32, prefill_buckets=(32,)))
    run.add(*(request(i, prompt=prompt, seed=n) for n, i in enumerate("abc")))
    [first] = run.turn()
    assert (first.slots, first.counts) == ((0,), (21,))
    [second] = run.turn()
    assert (second.slots, second.counts) == ((0, 1, 2), (0, 1, 1))
    run.finish()
    assert run.cached == {"a": 0, "b": 20, "c": 20}


def test_a_stranger_overtakes_twins_that_wait_for_a_page_and_not_for_their_turn():
    prompt = tuple(range(300, 321))
    run = Run(limits(num_pages=33, max_num_batched_tokens=32, prefill_buckets=(32,)))
    run.add(request("a", prompt=prompt), request("b", prompt=prompt), request("c", 3))
    [first] = run.turn()
    assert (first.slots, first.counts) == ((0, 1), (21, 3))
    run.finish()


def test_twins_of_an_aborted_request_compute_the_page_themselves():
    prompt = tuple(range(300, 321))
    for launches_per_lane in (1, 2):
        run = Run(limits(launches_per_lane=launches_per_lane))
        run.add(request("a", prompt=prompt), request("b", prompt=prompt))
        run.plan()
        assert run.abort("a")
        run.finish()
        assert run.finished == {"b": FinishReason.LENGTH}


def test_n_answers_of_one_prompt_compute_it_once_where_it_fits():
    draw = random.Random(3)
    prompt = tuple(draw.choices(range(5000), k=25))
    run = Run(limits(num_pages=40, launches_per_lane=2))
    run.add(*(request(f"r-{n}", prompt=prompt, seed=n, max_tokens=3) for n in range(4))).finish()
    computed = sum(len(launch.tokens) for launch in run.launches)
    assert computed == 25 + 3 * 1
    assert run.tokens["r-2"] == expected(prompt, 3, seed=2)
