"""The optimiser against a search over everything, numbers done by hand, and broken predictions."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from duetjax.policy.launch import Split
from duetjax.policy.partition import Bounds, Candidates, Choice, Outcome, choose

TIED = 1 - 1e-9
BROKEN = (math.nan, math.inf, -math.inf, 0.0, -3.0)
HALF, SMALL, LARGE = Split(66, 66), Split(32, 100), Split(100, 32)


def candidates(rows, decode_ms, prefill, *, whole=5.0, splits=None):
    """prefill: {tokens: time on each split}."""
    splits = splits or (SMALL, HALF, LARGE)[: len(decode_ms)]
    prefill_ms = np.array(list(prefill.values()), float).T.reshape(len(splits), len(prefill))
    return listed(rows, splits, np.array(decode_ms, float), tuple(prefill), prefill_ms, whole)


def listed(rows, splits, decode_ms, sizes, prefill_ms, whole):
    """Candidates from arrays, [S] and [S, J]."""
    beside = prefill_ms.tolist()
    return Candidates(rows, splits, decode_ms.tolist(), sizes, beside.__getitem__, whole)


def summary(choice):
    return choice.outcome, choice.split, choice.k, choice.prefill_tokens


# The same decisions, one cell at a time.


def times(some):
    return [some.prefill_ms(s) for s, _ in enumerate(some.splits)]


def usable(ms, limit=math.inf):
    return math.isfinite(ms) and 0 < ms <= limit


def search(some, bounds, previous):
    """What `choose` should come to (see `summary`), found by trying everything."""
    decode_ms, prefill_ms = some.decode_ms, times(some)
    cells = [
        (s, j)
        for s, _ in enumerate(some.splits)
        for j, _ in enumerate(some.prefill_tokens)
        if usable(decode_ms[s])
        and usable(prefill_ms[s][j], bounds.max_prefill_ms if j else math.inf)
    ]
    if not cells:
        return Outcome.UNPREDICTED, None, 0, 0
    feasible = [(s, j) for s, j in cells if decode_ms[s] <= bounds.tbt_slo_ms]
    if feasible:
        return Outcome.SPLIT, *fastest(some, bounds, feasible, previous)
    if usable(some.whole_decode_ms, bounds.tbt_slo_ms):
        s, j = min(cells, key=lambda cell: (some.splits[cell[0]].decode, cell[1]))
        k = fewest_steps(some.whole_decode_ms, prefill_ms[s][j], bounds)
        return Outcome.DECODE_ALONE, None, k, some.prefill_tokens[j]
    share = max(some.splits[s].decode for s, _ in cells)
    last = min((s, j) for s, j in cells if some.splits[s].decode == share)
    return Outcome.LARGEST_DECODE_SHARE, *fastest(some, bounds, [last], None)


def fastest(some, bounds, cells, previous):
    decode_ms, prefill_ms = some.decode_ms, times(some)
    tried = []
    for s, j in cells:
        d, p, tokens = decode_ms[s], prefill_ms[s][j], some.prefill_tokens[j]
        for k in range(1, bounds.max_k + 1):
            rate = (k * some.rows + tokens) / max(k * d, p)
            tried.append((rate, some.splits[s].decode, tokens, k, some.splits[s]))
    best = max(tried)[0]
    kept = [one for one in tried if one[4] == previous]
    if kept and best * TIED <= max(kept)[0] * (1 + bounds.hysteresis):
        tried, best = kept, max(kept)[0]
    _, _, tokens, k, split = max(
        (one for one in tried if one[0] >= best * TIED), key=lambda one: one[1:4]
    )
    return split, k, tokens


def fewest_steps(step_ms, after_ms, bounds):
    for k in range(1, bounds.max_k):
        if k * step_ms + after_ms <= k * bounds.tbt_slo_ms:
            return k
    return bounds.max_k


def random_case(rng):
    """Small numbers of cells; half of the cases on whole numbers, so that there are ties.

    Prefill never takes less on a later split, but for times that are broken.
    """
    S, J = int(rng.integers(1, 6)), int(rng.integers(1, 5))
    if rng.random() < 0.5:
        decode_ms, prefill_ms = rng.integers(1, 9, S) * 1.0, rng.integers(1, 25, (S, J)) * 1.0
        whole, slo = float(rng.integers(1, 9)), float(rng.integers(1, 9))
    else:
        decode_ms, prefill_ms = rng.lognormal(1.5, 0.7, S), rng.lognormal(2.5, 1.0, (S, J))
        whole, slo = float(rng.lognormal(1.0, 0.7)), float(rng.lognormal(1.3, 0.7))
    prefill_ms.sort(0)
    for ms in (decode_ms, prefill_ms):
        broken = rng.random(ms.shape) < (0.0, 0.0, 0.0, 0.0, 0.2, 0.8)[rng.integers(6)]
        ms[broken] = np.array(BROKEN)[rng.integers(len(BROKEN), size=broken.sum())]
    shares = np.sort(rng.permutation(5)[:S]) * 8 + 8
    splits = tuple(Split(int(cores), 48 - int(cores)) for cores in shares)
    sizes = tuple(sorted(rng.integers(1, 9, J).tolist()))
    some = listed(
        int(rng.integers(1, 9)),
        splits,
        decode_ms,
        sizes,
        prefill_ms,
        math.nan if rng.random() < 0.1 else whole,
    )
    bounds = Bounds(
        slo,
        int(rng.integers(1, 13)),
        (1.0, 10.0, 20.0, math.inf)[rng.integers(4)],
        (0.0, 0.05, 0.5)[rng.integers(3)],
    )
    return some, bounds, splits[rng.integers(S)] if rng.random() < 0.6 else None


def test_searching_everything_finds_nothing_else_in_ten_thousand_cases():
    rng, seen = np.random.default_rng(5), Counter()
    for _ in range(10_000):
        some, bounds, previous = random_case(rng)
        found = summary(choose(some, bounds, previous))
        assert found == search(some, bounds, previous), (some, bounds, previous)
        seen[found[0]] += 1
    assert min(seen[outcome] for outcome in Outcome) >= 300, seen


# By hand.


def test_throughput_is_what_both_sides_compute_in_the_time_of_the_slower_one():
    choice = choose(candidates(10, [4.0], {100: [10.0]}), Bounds(5.0, 8), None)
    # k = 2: 120 tokens in 10 ms = 12 a ms; k = 3: 130 in 12 ms = 10.8 a ms.
    assert summary(choice) == (Outcome.SPLIT, SMALL, 2, 100)
    assert (choice.decode_ms, choice.prefill_ms) == (4.0, 10.0)
    assert choice.throughput == pytest.approx(12_000)


def test_one_step_more_than_fits_beside_prefill_wins_where_decode_makes_most_of_the_tokens():
    choice = choose(candidates(100, [4.0], {10: [11.0]}), Bounds(5.0, 8), None)
    # k = 2: 210 tokens in 11 ms = 19.1 a ms; k = 3: 310 in 12 ms = 25.8 a ms.
    assert choice.k == 3
    assert choice.throughput == pytest.approx(1000 * 310 / 12)


def test_k_is_at_most_max_k():
    assert choose(candidates(100, [4.0], {10: [400.0]}), Bounds(5.0, 7), None).k == 7


def test_k_is_one_where_prefill_is_shorter_than_a_step():
    assert choose(candidates(1, [4.0], {10: [1.0]}), Bounds(5.0, 7), None).k == 1


def test_the_faster_of_two_splits_is_chosen():
    some = candidates(10, [4.0, 2.0], {100: [10.0, 12.0]})
    # 32 cores: 12 tokens a ms; 66 cores: (6 x 10 + 100) / 12 = 13.3 a ms.
    assert summary(choose(some, Bounds(5.0, 8), None)) == (Outcome.SPLIT, HALF, 6, 100)


def test_a_faster_split_that_breaks_the_objective_is_not_chosen():
    some = candidates(10, [6.0, 2.0], {1000: [10.0, 100.0]})
    assert choose(some, Bounds(6.0, 8), None).split == SMALL
    assert choose(some, Bounds(5.9, 8), None).split == HALF


def test_a_prefill_launch_longer_than_allowed_is_not_chosen():
    some = candidates(10, [4.0], {100: [10.0], 1000: [40.0]})
    assert choose(some, Bounds(5.0, 8, max_prefill_ms=40.0), None).prefill_tokens == 1000
    assert choose(some, Bounds(5.0, 8, max_prefill_ms=39.0), None).prefill_tokens == 100


def test_the_smallest_prefill_may_run_however_long_it_takes():
    some = candidates(10, [4.0], {100: [10.0], 1000: [40.0]})
    assert choose(some, Bounds(5.0, 8, max_prefill_ms=1.0), None).prefill_tokens == 100


@pytest.mark.parametrize("previous", [SMALL, HALF, LARGE])
def test_of_equally_good_splits_the_previous_one_is_kept(previous):
    some = candidates(10, [4.0, 4.0, 4.0], {100: [10.0, 10.0, 10.0]})
    assert choose(some, Bounds(5.0, 8, hysteresis=0.0), previous).split == previous


def test_of_equally_good_splits_the_one_with_most_decode_cores_is_chosen():
    some = candidates(10, [4.0, 4.0], {100: [10.0, 10.0]}, splits=(SMALL, LARGE))
    assert choose(some, Bounds(5.0, 8), None).split == LARGE
    assert choose(some, Bounds(5.0, 8), Split(8, 124)).split == LARGE


def test_of_equally_good_prefills_the_larger_one_is_chosen():
    some = candidates(10, [5.0], {100: [10.0], 220: [20.0]})  # 12 and 13, with k = 2 and 4
    assert choose(some, Bounds(5.0, 8), None).prefill_tokens == 220
    some = candidates(10, [5.0], {100: [10.0], 200: [20.0]})  # 12 both
    assert choose(some, Bounds(5.0, 8), None).prefill_tokens == 200


def test_of_two_equally_good_k_the_larger_one_is_chosen():
    some = candidates(2, [2.0], {2: [3.0]})  # k = 1: 4 tokens in 3 ms; k = 2: 6 in 4 ms
    assert choose(some, Bounds(5.0, 8), None).k == 2
    some = candidates(1, [2.0], {1: [3.0]})  # 2 in 3 ms, 3 in 4 ms
    assert choose(some, Bounds(5.0, 8), None).k == 2
    some = candidates(1, [2.0], {2: [3.0]})  # 3 in 3 ms and 4 in 4 ms
    assert choose(some, Bounds(5.0, 8), None).k == 2


# Changing the split.

NEAR = candidates(10, [5.0, 5.0], {100: [10.0 / 1.04, 10.0]}, splits=(SMALL, HALF))
"""11 tokens a ms on HALF, and 4 % more on SMALL."""


def test_a_split_is_changed_only_for_a_gain_above_the_hysteresis():
    bounds = Bounds(5.0, 1, hysteresis=0.05)
    kept = choose(NEAR, bounds, HALF)
    assert kept.split == HALF
    assert kept.best_throughput == pytest.approx(1.04 * kept.throughput)
    assert choose(NEAR, Bounds(5.0, 1, hysteresis=0.03), HALF).split == SMALL
    assert choose(NEAR, bounds, None).split == SMALL
    assert choose(NEAR, bounds, LARGE).split == SMALL


def test_a_previous_split_that_breaks_the_objective_is_left_whatever_the_hysteresis():
    some = candidates(10, [6.0, 4.0], {100: [10.0, 10.0]})
    assert choose(some, Bounds(5.0, 1, hysteresis=9.0), SMALL).split == HALF


def test_a_kept_split_still_gets_its_own_best_prefill_and_k():
    some = candidates(10, [5.0, 5.0], {100: [10.0, 9.9], 300: [20.0, 19.9]})
    assert summary(choose(some, Bounds(5.0, 8), SMALL)) == (Outcome.SPLIT, SMALL, 4, 300)


# Nothing feasible.


def test_decode_is_alone_where_only_the_whole_device_meets_the_objective():
    some = candidates(10, [9.0, 8.0], {100: [10.0, 12.0], 200: [15.0, 20.0]}, whole=3.0)
    choice = choose(some, Bounds(5.0, 8), SMALL)
    # Each step leaves 2 ms of its 5; five of them pay for a launch of 10 ms.
    assert summary(choice) == (Outcome.DECODE_ALONE, None, 5, 100)
    assert (choice.decode_ms, choice.prefill_ms) == (3.0, 10.0)
    assert choice.throughput == pytest.approx(1000 * (5 * 10 + 100) / (5 * 3 + 10))
    assert choose(some, Bounds(5.0, 4), SMALL).k == 4


def test_decode_alone_takes_all_steps_allowed_where_they_leave_no_slack():
    some = candidates(10, [9.0], {100: [10.0]}, whole=5.0)
    assert summary(choose(some, Bounds(5.0, 8), None)) == (Outcome.DECODE_ALONE, None, 8, 100)


@pytest.mark.parametrize("whole", [5.1, *BROKEN])
def test_the_largest_share_decodes_beside_the_smallest_prefill_where_nothing_helps(whole):
    prefill = {100: [10.0, 12.0, 20.0], 200: [15.0, 20.0, 30.0]}
    some = candidates(10, [9.0, 8.0, 7.0], prefill, whole=whole)
    choice = choose(some, Bounds(5.0, 8), SMALL)
    # k = 2: 120 tokens in 20 ms; k = 3: 130 in 21 ms.
    assert summary(choice) == (Outcome.LARGEST_DECODE_SHARE, LARGE, 3, 100)


def test_the_largest_share_is_one_whose_times_are_known():
    prefill = {100: [10.0, math.nan, math.nan], 200: [15.0, 20.0, math.nan]}
    some = candidates(10, [9.0, 8.0, 7.0], prefill, whole=6.0)
    choice = choose(some, Bounds(5.0, 8), None)
    assert summary(choice)[:2] == (Outcome.LARGEST_DECODE_SHARE, HALF)
    assert choice.prefill_tokens == 200


@pytest.mark.parametrize("bad", BROKEN)
def test_without_a_usable_time_for_both_sides_nothing_is_chosen(bad):
    for some in (
        candidates(10, [bad, bad], {100: [10.0, 10.0]}),
        candidates(10, [4.0, 4.0], {100: [bad, bad]}),
        candidates(10, [bad, 4.0], {100: [10.0, bad]}),
        candidates(10, [], {100: []}, splits=()),
        candidates(10, [4.0, 4.0], {}),
    ):
        choice = choose(some, Bounds(5.0, 8), SMALL)
        assert summary(choice) == (Outcome.UNPREDICTED, None, 0, 0)
        assert choice.throughput == 0.0


# Broken predictions.


@pytest.mark.parametrize("bad", BROKEN)
def test_a_split_with_a_broken_time_is_passed_over(bad):
    good = candidates(10, [4.0, 4.5], {100: [9.0, 10.0], 200: [18.0, 19.0]})
    broken = candidates(10, [bad, 4.5], {100: [9.0, 10.0], 200: [18.0, 19.0]})
    assert choose(good, Bounds(5.0, 8), None).split == SMALL
    assert choose(broken, Bounds(5.0, 8), SMALL).split == HALF


@pytest.mark.parametrize("bad", BROKEN)
def test_a_prefill_with_a_broken_time_is_passed_over(bad):
    some = candidates(10, [4.0], {100: [10.0], 200: [bad], 300: [39.0]})
    assert choose(some, Bounds(5.0, 16), None).prefill_tokens == 100


def test_an_objective_that_is_not_a_number_is_met_by_nothing():
    some = candidates(10, [4.0], {100: [10.0]})
    assert choose(some, Bounds(math.nan, 8), None).outcome is Outcome.LARGEST_DECODE_SHARE


def test_without_an_objective_every_split_is_feasible():
    some = candidates(10, [4e9], {100: [10.0]})
    assert choose(some, Bounds(math.inf, 8), None).outcome is Outcome.SPLIT


# What its caller must not ask.


def test_bounds_that_allow_no_step_are_refused():
    with pytest.raises(AssertionError, match="max_k=0"):
        choose(candidates(10, [4.0], {100: [10.0]}), Bounds(5.0, 0), None)


@pytest.mark.parametrize("hysteresis", [-0.1, math.nan])
def test_a_hysteresis_that_is_no_gain_is_refused(hysteresis):
    with pytest.raises(AssertionError, match="hysteresis="):
        choose(candidates(10, [4.0], {100: [10.0]}), Bounds(5.0, 1, hysteresis=hysteresis), None)


def test_candidates_without_a_decoding_row_are_refused():
    with pytest.raises(AssertionError, match="nothing decodes: 0 rows"):
        choose(candidates(0, [4.0], {100: [10.0]}), Bounds(5.0, 8), None)


# Reasons.


def test_a_reason_names_the_objective_the_split_and_both_times():
    reason = choose(candidates(10, [4.0], {100: [10.0]}), Bounds(5.0, 8), None).reason
    assert reason == (
        "decode meets 5 ms: 2 steps of 4 ms on 32 beside 100 prompt tokens in 10 ms on 100,"
        " 1.2e+04 tokens/s"
    )


def test_the_reason_for_a_kept_split_names_what_another_would_give():
    choice = choose(NEAR, Bounds(5.0, 1), HALF)
    assert "kept" in choice.reason
    assert f"{choice.best_throughput:.4g} tokens/s" in choice.reason
    assert "kept" not in choose(NEAR, Bounds(5.0, 1), None).reason


def test_the_reason_without_a_feasible_split_names_the_whole_device():
    some = candidates(10, [9.0], {100: [10.0]}, whole=6.5)
    assert "nowhere (6.5 ms on the whole device)" in choose(some, Bounds(5.0, 8), None).reason
    assert "on the whole device only" in choose(some, Bounds(7.0, 8), None).reason
    nothing = candidates(10, [math.nan], {100: [10.0]})
    assert "no split has a usable" in choose(nothing, Bounds(7.0, 8), None).reason


# Properties.

SIZES = st.lists(st.integers(1, 8192), max_size=7).map(lambda sizes: tuple(sorted(sizes)))
ANY_TIME = st.one_of(st.floats(), st.floats(0.01, 1e4))
SANE_TIME = st.floats(0.01, 1e4)


@st.composite
def cases(draw, times):
    sizes = draw(SIZES)
    cores = draw(st.lists(st.integers(1, 131), unique=True, max_size=16))
    S, J = len(cores), len(sizes)
    decode_ms = draw(st.lists(times, min_size=S, max_size=S))
    prefill_ms = draw(st.lists(times, min_size=S * J, max_size=S * J))
    return listed(
        draw(st.integers(1, 512)),
        tuple(Split(n, 132 - n) for n in cores),
        np.array(decode_ms, float),
        sizes,
        np.sort(np.array(prefill_ms, float).reshape(S, J), axis=0),
        draw(times),
    )


@st.composite
def bounds_of(draw, times):
    hysteresis = draw(st.floats(0.0, 1.0))
    return Bounds(draw(times), draw(st.integers(1, 64)), draw(times), hysteresis)


def previous_of(some, index):
    return some.splits[index % len(some.splits)] if some.splits else None


@given(cases(ANY_TIME), bounds_of(ANY_TIME), st.integers(0, 15))
def test_a_choice_respects_its_bounds_whatever_is_predicted(some, bounds, index):
    choice = choose(some, bounds, previous_of(some, index))
    numbers = (choice.decode_ms, choice.prefill_ms, choice.throughput, choice.best_throughput)
    assert not any(math.isnan(number) or number < 0 for number in numbers)
    assert choice.reason
    if choice.outcome is Outcome.UNPREDICTED:
        return
    assert 1 <= choice.k <= bounds.max_k
    assert type(choice.k) is int
    assert 0 < choice.decode_ms < math.inf
    assert 0 < choice.prefill_ms < math.inf
    smallest = choice.prefill_tokens == some.prefill_tokens[0]
    assert choice.prefill_tokens in some.prefill_tokens
    if choice.outcome is Outcome.SPLIT:
        assert choice.decode_ms <= bounds.tbt_slo_ms
        assert smallest or choice.prefill_ms <= bounds.max_prefill_ms
    if choice.outcome is Outcome.DECODE_ALONE:
        assert choice.decode_ms <= bounds.tbt_slo_ms
    assert (choice.split is None) == (choice.outcome is Outcome.DECODE_ALONE)


@given(cases(SANE_TIME), bounds_of(SANE_TIME), SANE_TIME)
def test_a_looser_objective_never_gives_less_throughput(some, bounds, other):
    def at(slo):
        return choose(some, Bounds(slo, bounds.max_k, bounds.max_prefill_ms), None)

    tight, loose = at(min(bounds.tbt_slo_ms, other)), at(max(bounds.tbt_slo_ms, other))
    assume(tight.outcome is Outcome.SPLIT)
    assert loose.outcome is Outcome.SPLIT
    assert loose.throughput >= tight.throughput * TIED


@given(cases(SANE_TIME), bounds_of(SANE_TIME), st.integers(0, 15))
def test_keeping_a_split_costs_at_most_the_hysteresis(some, bounds, index):
    free, held = choose(some, bounds, None), choose(some, bounds, previous_of(some, index))
    assert held.outcome is free.outcome
    assert held.throughput * (1 + bounds.hysteresis) >= free.throughput * TIED**2


@given(cases(ANY_TIME), bounds_of(SANE_TIME), st.integers(0, 15))
def test_the_same_numbers_give_the_same_choice(some, bounds, index):
    previous = previous_of(some, index)
    first, second = (choose(some, bounds, previous) for _ in range(2))
    assert isinstance(first, Choice)
    assert repr(first) == repr(second)
