"""Windows, rates, generated workloads against the traces that they stand for, and prompts."""

import os
import random
import statistics
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from duetjax.config import ConfigError
from duetjax.sim.workload import (
    BLOCK_TOKENS,
    Arrival,
    Spec,
    at_rate,
    generate,
    is_generated,
    mean_rate,
    prompt_of,
    repeated,
    scaled,
    within,
)

TRACES = ("azure-code", "azure-conversation", "mooncake-conversation")
FIXED = "fixed:1024x128"


def arrivals(*times):
    """Requests of different lengths at these times."""
    return [Arrival(at, 10 + i, 1 + i, (i,)) for i, at in enumerate(times)]


def times(workload):
    return [each.at for each in workload]


def gap_cv(workload):
    gaps = [after - before for before, after in pairwise(times(workload))]
    return statistics.pstdev(gaps) / statistics.fmean(gaps)


def mean_p50_p99(lengths):
    hundredths = statistics.quantiles(lengths, n=100)
    return statistics.fmean(lengths), hundredths[49], hundredths[98]


# Windows and rates.


def test_a_window_has_its_start_but_not_its_end_and_begins_at_0():
    cut = within(arrivals(0.0, 1.0, 1.5, 3.0), 2.0, start=1.0)
    assert cut == [Arrival(0.0, 11, 2, (1,)), Arrival(0.5, 12, 3, (2,))]


def test_a_window_without_requests_is_empty():
    assert within(arrivals(0.0, 5.0), 1.0, start=2.0) == []


def test_a_window_may_be_endless():
    assert times(within(arrivals(0.0, 1.0, 1e9), float("inf"), start=1.0)) == [0.0, 1e9 - 1]


@pytest.mark.parametrize(
    ("seconds", "start"), [(0, 0), (-1, 0), (float("nan"), 0), (1, -1), (1, float("inf"))]
)
def test_what_is_no_window_is_refused(seconds, start):
    with pytest.raises(ConfigError, match="a window"):
        within(arrivals(0.0), seconds, start)


def test_scaling_multiplies_times_and_leaves_the_rest():
    assert scaled([Arrival(3.0, 5, 6, (7,))], 0.5) == [Arrival(1.5, 5, 6, (7,))]


def test_the_mean_rate_is_the_number_over_the_time_from_the_first_to_the_last():
    assert mean_rate(arrivals(2.0, 2.5, 6.0)) == 0.75


@pytest.mark.parametrize("rate", [0.01, 1.0, 3.7, 1e4])
def test_a_workload_comes_at_the_rate_asked_for_in_its_order_and_as_bursty(rate):
    draw = random.Random(1)
    before = arrivals(*sorted(draw.uniform(2.0, 50.0) for _ in range(500)))
    after = at_rate(before, rate)
    assert mean_rate(after) == pytest.approx(rate, rel=1e-12)
    assert gap_cv(after) == pytest.approx(gap_cv(before), rel=1e-9)
    assert [each.blocks for each in after] == [each.blocks for each in before]


@pytest.mark.parametrize("at", [(), (1.0,), (2.0, 2.0, 2.0)])
def test_requests_at_one_time_have_no_rate(at):
    with pytest.raises(ConfigError, match=f"no two of {len(at)} requests"):
        at_rate(arrivals(*at), 1.0)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_a_rate_must_be_above_0(rate):
    with pytest.raises(ConfigError, match="rate must be a number above 0"):
        at_rate(arrivals(0.0, 1.0), rate)


# Generated workloads.

PUBLISHED = {  # mean, p50, p99 of prompt and output; rate, cv
    "azure-code": ((2048, 1469, 7436), (28, 13, 251), 2.57, 13.0),
    "azure-conversation": ((1155, 1020, 4142), (211, 129, 601), 5.53, 1.1),
    "mooncake-conversation": ((12035, 6909, 85400), (343, 350, 1119), 3.40, 1.0),
}
LONGEST = {
    "azure-code": (7437, 1899),
    "azure-conversation": (14050, 1000),
    "mooncake-conversation": (126195, 2000),
}


@pytest.mark.parametrize("kind", TRACES)
def test_lengths_have_the_mean_median_and_99th_percentile_of_the_trace(kind):
    sample = generate(Spec(kind, rate=100.0, seconds=800.0, seed=3))
    prompts, outputs, *_ = PUBLISHED[kind]
    prompt_tokens = [each.prompt_tokens for each in sample]
    output_tokens = [each.output_tokens for each in sample]
    assert mean_p50_p99(prompt_tokens) == pytest.approx(prompts, rel=0.05)
    assert mean_p50_p99(output_tokens) == pytest.approx(outputs, rel=0.05)
    longest_prompt, longest_output = LONGEST[kind]
    assert 1 <= min(prompt_tokens) <= max(prompt_tokens) <= longest_prompt
    assert 1 <= min(output_tokens) <= max(output_tokens) <= longest_output


@pytest.mark.parametrize("kind", TRACES)
def test_rate_and_burstiness_are_the_trace_s_unless_given(kind):
    *_, rate, cv = PUBLISHED[kind]
    sample = generate(Spec(kind, seconds=40_000.0))
    assert mean_rate(sample) == pytest.approx(rate, rel=0.01)
    assert gap_cv(sample) == pytest.approx(cv, rel=0.15)


@pytest.mark.parametrize("cv", [0.5, 1.0, 2.0, 4.0])
def test_gaps_vary_as_much_as_asked_for(cv):
    sample = generate(Spec(FIXED, rate=10.0, seconds=5000.0, cv=cv))
    assert gap_cv(sample) == pytest.approx(cv, rel=0.04)


def test_gaps_of_a_poisson_process_are_exponential():
    sample = generate(Spec(FIXED, rate=2.0, seconds=20_000.0))
    gaps = [after - before for before, after in pairwise(times(sample))]
    longer = [sum(gap > seconds for gap in gaps) / len(gaps) for seconds in (0.5, 1.0, 2.0)]
    assert longer == pytest.approx([0.3679, 0.1353, 0.0183], rel=0.1)


@pytest.mark.parametrize("kind", [*TRACES, FIXED])
@pytest.mark.parametrize("cv", [0.0, 0.3, 1.0, 13.0, 100.0])
def test_the_number_of_requests_is_exact_they_are_in_order_and_the_first_is_at_0(kind, cv):
    sample = generate(Spec(kind, rate=3.0, seconds=50.0, cv=cv))
    assert len(sample) == 150
    assert times(sample) == sorted(times(sample))
    assert sample[0].at == 0.0
    assert sample[-1].at <= 50.0


def test_without_variation_requests_are_evenly_spaced():
    sample = generate(Spec("fixed:7x2", rate=4.0, seconds=1.0, cv=0.0))
    assert sample == [Arrival(at, 7, 2) for at in (0.0, 0.25, 0.5, 0.75)]


def test_there_is_one_request_at_least():
    assert generate(Spec("fixed:1x1", rate=0.01, seconds=1.0)) == [Arrival(0.0, 1, 1)]


@pytest.mark.parametrize(("prompt", "output"), [(1, 1), (1000, 3), (9_999_999, 9_999_999)])
def test_fixed_lengths_are_exact(prompt, output):
    sample = generate(Spec(f"fixed:{prompt}x{output}", rate=1.0, seconds=20.0))
    assert {(each.prompt_tokens, each.output_tokens) for each in sample} == {(prompt, output)}


@pytest.mark.parametrize("kind", [*TRACES, FIXED])
def test_a_seed_gives_the_same_workload_and_another_seed_another(kind):
    spec = {"kind": kind, "rate": 5.0, "seconds": 60.0}
    assert generate(Spec(**spec, seed=7)) == generate(Spec(**spec, seed=7))
    assert generate(Spec(**spec, seed=7)) != generate(Spec(**spec, seed=8))


def test_other_processes_generate_the_same():
    ask = (
        "from duetjax.sim.workload import *;"
        "print(generate(Spec('mooncake-conversation', seconds=30.0, seed=5)))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", ask],
            cwd=Path(__file__).resolve().parents[2],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert outputs == {f"{generate(Spec('mooncake-conversation', seconds=30.0, seed=5))}\n"}


@pytest.mark.parametrize("kind", TRACES)
def test_lengths_and_blocks_stay_when_rate_or_burstiness_change(kind):
    def requests(**changes):
        sample = generate(Spec(kind, seconds=100.0, **changes))
        return [(each.prompt_tokens, each.output_tokens, each.blocks) for each in sample[:150]]

    assert requests(rate=2.0) == requests(rate=3.0) == requests(rate=2.0, cv=0.5)


@pytest.mark.parametrize(
    "spec",
    [
        {"kind": "azure"},
        {"kind": ""},
        {"kind": "fixed:"},
        {"kind": "fixed:1024"},
        {"kind": "fixed:0x1"},
        {"kind": "fixed:1x-1"},
        {"kind": "fixed:10000000x1"},
        {"rate": None},
        {"rate": 0.0},
        {"rate": float("nan")},
        {"rate": 1e6},
        {"rate": 1e300, "seconds": 1e300},
        {"seconds": 0.0},
        {"seconds": float("inf")},
        {"seed": -1},
        {"cv": -1.0},
        {"cv": 1e-3},
        {"cv": 101.0},
        {"cv": float("nan")},
    ],
    ids=str,
)
def test_what_cannot_be_generated_is_refused_in_one_line(spec):
    with pytest.raises(ConfigError) as caught:
        Spec(**{"kind": FIXED, "rate": 1.0, **spec})
    assert "\n" not in str(caught.value)


def test_an_unknown_kind_is_answered_with_all_that_are_known():
    with pytest.raises(ConfigError, match=", ".join((*TRACES, "fixed:PROMPTxOUTPUT"))):
        Spec("azure")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("azure-code", True), ("fixed:oops", True), ("./azure-code", False), ("a.csv", False)],
)
def test_names_of_kinds_are_told_from_files(name, expected):
    assert is_generated(name) is expected


# Conversations.

CONVERSATIONS = generate(Spec("mooncake-conversation", rate=10.0, seconds=1200.0))


def shared_blocks(workload):
    """How many blocks each prompt begins with that one prompt before it began with."""
    known, shared = set(), []
    for each in workload:
        prefixes = [each.blocks[: i + 1] for i in range(len(each.blocks))]
        shared.append(sum(prefix in known for prefix in prefixes))
        known.update(prefixes)
    return shared


def test_conversations_share_as_much_as_those_of_the_trace():
    shared = shared_blocks(CONVERSATIONS[:4000])
    num_blocks = sum(len(each.blocks) for each in CONVERSATIONS[:4000])
    assert sum(num > 1 for num in shared) / len(shared) == pytest.approx(0.39, abs=0.03)
    assert sum(shared) / num_blocks == pytest.approx(0.37, abs=0.04)


def test_all_conversations_begin_alike_and_blocks_cover_the_prompt_but_for_its_end():
    assert {each.blocks[0] for each in CONVERSATIONS} == {0}
    assert all(len(each.blocks) == each.prompt_tokens // BLOCK_TOKENS for each in CONVERSATIONS)


def test_a_conversation_goes_on_from_its_end():
    before, after = {}, {}
    for each in CONVERSATIONS:
        for first, second in pairwise(each.blocks):
            assert before.setdefault(second, first) == first
            assert first == 0 or after.setdefault(first, second) == second


@pytest.mark.parametrize("kind", ["azure-code", "azure-conversation", FIXED])
def test_other_kinds_share_nothing(kind):
    assert {each.blocks for each in generate(Spec(kind, rate=5.0))} == {()}


# Prompts.

PAGE = 16


def common(first, second):
    """How many pages two prompts share from their beginning on."""
    pages = min(len(first), len(second)) // PAGE
    return next(
        (i for i in range(pages) if first[: (i + 1) * PAGE] != second[: (i + 1) * PAGE]), pages
    )


def test_a_prompt_has_its_length_and_ids_of_31_bits():
    draw = random.Random(0)
    for number in range(200):
        blocks = tuple(draw.randrange(2**53) for _ in range(draw.randrange(4)))
        prompt = prompt_of(Arrival(0.0, draw.randint(1, 3000), 1, blocks), number)
        assert all(type(token) is int and 0 <= token < 2**31 for token in prompt)


@pytest.mark.parametrize("num_tokens", [1, 2, 511, 512, 513, 1023, 1024, 1025, 5000])
@pytest.mark.parametrize("blocks", [(), (3,), (3, 4)])
def test_a_prompt_has_its_length_wherever_its_blocks_end(num_tokens, blocks):
    assert len(prompt_of(Arrival(0.0, num_tokens, 1, blocks), 0)) == num_tokens


def test_prompts_share_the_blocks_that_they_share_and_no_page_more():
    draw = random.Random(2)
    ids = (0, 1, 2**30 - 2, 2**30 - 1, 2**30, 2**53 - 1)
    for _ in range(300):
        first, second = (
            Arrival(
                0.0, draw.randint(1200, 2500), 1, tuple(draw.choices(ids, k=draw.randint(0, 2)))
            )
            for _ in range(2)
        )
        pairs = zip(first.blocks, second.blocks, strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if same is None:
            same = min(len(first.blocks), len(second.blocks))
        pages = common(prompt_of(first, 11), prompt_of(second, 12))
        assert pages == same * BLOCK_TOKENS // PAGE


def test_requests_without_blocks_differ_from_their_first_token_on():
    firsts = {prompt_of(Arrival(0.0, 100, 1), number)[0] for number in range(500)}
    firsts |= {prompt_of(Arrival(0.0, 1000, 1, (block,)), 0)[0] for block in range(500)}
    assert len(firsts) == 1000


def test_a_last_block_that_goes_beyond_the_prompt_ends_with_it():
    whole = prompt_of(Arrival(0.0, 1024, 1, (5, 6)), 0)
    assert prompt_of(Arrival(0.0, 700, 1, (5, 6)), 1) == whole[:700]


def test_the_same_request_has_the_same_prompt():
    arrival = Arrival(0.0, 2000, 1, (5, 6))
    assert prompt_of(arrival, 9) == prompt_of(arrival, 9)


@pytest.mark.parametrize("number", [-1, 2**30])
def test_a_number_outside_its_range_is_our_mistake(number):
    with pytest.raises(AssertionError, match="request number"):
        prompt_of(Arrival(0.0, 1, 1), number)


def test_a_workload_that_is_repeated_keeps_its_rate_and_shares_no_blocks_with_itself():
    once = generate(Spec("mooncake-conversation", seconds=60.0, seed=3))
    thrice = repeated(once, 3)
    assert len(thrice) == 3 * len(once)
    assert mean_rate(thrice) == pytest.approx(mean_rate(once), rel=0.02)
    assert [each.at for each in thrice] == sorted(each.at for each in thrice)
    parts = [thrice[n * len(once) : (n + 1) * len(once)] for n in range(3)]
    ids = [{block for each in part for block in each.blocks} for part in parts]
    assert not (ids[0] & ids[1] | ids[1] & ids[2])
    assert [len(each.blocks) for each in parts[2]] == [len(each.blocks) for each in once]
