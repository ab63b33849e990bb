"""What a simulation amounts to: percentiles, and requests that keep their objectives, by hand."""

import random

import numpy as np
import pytest

from duetjax.policy.request import FinishReason, StepOutputs
from duetjax.sim.ledger import Ledger, Objectives, Percentiles
from duetjax.sim.workload import Arrival

SLO, LATE = 1 / 32, 1 / 16
"""Seconds: sums of them are exact, so a gap of SLO is not late."""
SLO_MS = 1e3 * SLO


def ledger(*output_tokens, tbt_slo_ms=(SLO_MS,), ttft_slo_ms=None, at=0.0):
    workload = [Arrival(at, 10, tokens) for tokens in output_tokens]
    return Ledger(workload, Objectives(tbt_slo_ms, ttft_slo_ms))


def step(*numbers, finished=()):
    """Outputs of a step that gave each of these requests a token."""
    ids = tuple(map(str, numbers))
    return StepOutputs(
        ids, (0,) * len(ids), tuple((str(each), FinishReason.LENGTH) for each in finished)
    )


def give(to, number, *gaps, first=SLO):
    """A request's tokens: the first at `first`, each other so long after the one before."""
    for now in np.cumsum((first, *gaps)).tolist():
        to.take(step(number), now)


def all_of(book):
    """Everything that a ledger knows."""
    objectives = range(len(book.objectives.tbt_slo_ms))
    columns = (book.first, book.last, book.tokens, book.tpot_ms, book.ttft_ms)
    flags = (*(book.met(n) for n in objectives), book.missed(book.finished_at))
    counts = (book.finished, book.refused, book.finished_at)
    return [column.tobytes() for column in (*columns, *flags)], counts, book.tbt_ms


# Percentiles.


@pytest.mark.parametrize("seed", range(200))
def test_percentiles_are_those_of_all_values_as_often_as_they_count(seed):
    draw = np.random.default_rng(seed)
    size = int(draw.integers(1, 60))
    values = draw.choice((0.0, 1.5, 2.0, 7.25, 9.5), size) * draw.choice((1.0, -1.0), size)
    weights = draw.integers(1, 2 + seed % 30, size)
    found, every = Percentiles.of(values, weights), np.sort(np.repeat(values, weights))
    p50, p90, p99 = np.percentile(every, (50, 90, 99), method="inverted_cdf")
    assert (found.p50, found.p90, found.p99, found.most) == (p50, p90, p99, every[-1])
    assert found.mean == pytest.approx(every.mean(), abs=1e-12)
    for percent, value in ((50, found.p50), (90, found.p90), (99, found.p99)):
        assert 100 * np.count_nonzero(every <= value) >= percent * len(every)
        assert 100 * np.count_nonzero(every < value) < percent * len(every)


def test_percentiles_without_weights_count_every_value_once():
    values = np.random.default_rng(0).permutation(np.arange(1.0, 101.0))
    assert Percentiles.of(values) == Percentiles(50.0, 90.0, 99.0, 100.0, 50.5)
    assert Percentiles.of(values[values <= 10]) == Percentiles(5.0, 9.0, 10.0, 10.0, 5.5)


def test_percentiles_of_nothing_are_0():
    assert Percentiles.of(np.zeros(0)) == Percentiles(0.0, 0.0, 0.0, 0.0, 0.0)
    assert ledger(5).tbt_ms == Percentiles.of(np.zeros(0))


def test_what_was_given_stays_as_it_was():
    values, weights = np.array([3.0, 1.0, 2.0]), np.array([1, 5, 2])
    Percentiles.of(values, weights)
    assert (values.tolist(), weights.tolist()) == ([3.0, 1.0, 2.0], [1, 5, 2])


# The time between tokens.


@pytest.mark.parametrize(
    ("gaps", "late", "is_met"),
    [
        (100, 0, True),
        (100, 1, True),
        (100, 2, False),
        (99, 1, False),
        (199, 1, True),
        (199, 2, False),
        (200, 2, True),
        (700, 7, True),
        (700, 8, False),
        (1, 1, False),
        (1, 0, True),
        (0, 0, True),
    ],
)
def test_one_gap_in_a_hundred_may_be_late(gaps, late, is_met):
    book = ledger(gaps + 1)
    give(book, 0, *(LATE,) * late, *(SLO,) * (gaps - late))
    assert book.tokens.tolist() == [gaps + 1]
    assert book.met().tolist() == [is_met]
    assert book.missed(1e6).tolist() == [not is_met]


def test_a_late_gap_counts_for_those_who_waited_alone():
    book = ledger(9, 9, 9)
    give(book, 0, LATE, SLO)
    give(book, 1, SLO, SLO, SLO)
    assert book.met().tolist() == [False, True, False]  # the last has no token yet
    assert book.missed(1.0).tolist() == [True, False, False]


def test_a_late_gap_may_be_made_up_for_by_tokens_that_are_to_come():
    book = ledger(101)
    give(book, 0, LATE)
    assert (book.met().tolist(), book.missed(1.0).tolist()) == ([False], [False])
    for number in range(98):
        book.take(step(0), book.last[0] + SLO)
        assert book.met().tolist() == [False], number
    book.take(step(0), book.last[0] + SLO)
    assert (book.met().tolist(), book.missed(9.0).tolist()) == ([True], [False])


def test_every_objective_is_kept_account_of_and_missed_goes_by_the_loosest():
    book = ledger(3, 3, 3, tbt_slo_ms=(2 * SLO_MS, 4 * SLO_MS, SLO_MS))
    give(book, 0, SLO, SLO)
    give(book, 1, SLO, 3 * SLO)
    give(book, 2, 5 * SLO, 2 * SLO)
    met = [book.met(n).tolist() for n in range(3)]
    assert met == [[True, False, False], [True, True, False], [True, False, False]]
    assert book.met().tolist() == met[0]
    assert book.missed(9.0).tolist() == [False, False, True]


def test_percentiles_of_gaps_are_over_all_requests():
    book = ledger(9, 9)
    give(book, 0, 0.25, 0.5)
    give(book, 1, 1.0, first=0.125)
    assert book.tbt_ms == Percentiles(500.0, 1000.0, 1000.0, 1000.0, pytest.approx(1750 / 3))
    assert book.tpot_ms.tolist() == [375.0, 1000.0]
    assert book.ttft_ms.tolist() == [SLO_MS, 125.0]


def test_a_request_with_one_token_has_no_time_per_token():
    book = ledger(1, 2)
    give(book, 0)
    give(book, 1, SLO)
    assert book.tpot_ms.tolist() == [SLO_MS]


# The first token.


def test_the_first_token_counts_from_the_arrival():
    book = ledger(1, 1, 1, ttft_slo_ms=500.0, at=2.0)
    give(book, 0, first=2.5)
    give(book, 1, first=2.5625)
    assert book.ttft_ms[:2].tolist() == [500.0, 562.5]
    assert np.isnan(book.ttft_ms[2])
    assert book.met().tolist() == [True, False, False]


def test_a_request_is_missed_when_it_has_waited_too_long_and_not_before():
    book = ledger(1, 1, ttft_slo_ms=500.0, at=2.0)
    give(book, 0, first=2.25)
    waited = [book.missed(now).tolist() for now in (0.0, 2.5, 2.5625)]
    assert waited == [[False, False], [False, False], [False, True]]


def test_a_request_that_was_refused_keeps_nothing():
    book = ledger(1, 1)
    book.refuse(1)
    give(book, 0)
    assert (book.refused, book.met().tolist()) == (1, [True, False])


def test_a_request_that_was_refused_is_missed_at_once():
    book = ledger(1)
    book.refuse(0)
    assert book.missed(1.0).tolist() == [True]


def test_whoever_has_got_everything_is_finished():
    book = ledger(2, 1)
    book.take(step(1, 0, finished=(1,)), 0.5)
    assert (book.finished, book.finished_at) == (1, 0.5)
    book.take(step(0, finished=(0,)), 0.75)
    assert (book.finished, book.finished_at) == (2, 0.75)
    assert (book.first.tolist(), book.last.tolist()) == ([0.5, 0.5], [0.75, 0.5])


# Skipping.


@pytest.mark.parametrize("seed", range(50))
def test_steps_told_at_once_are_the_same_as_one_by_one(seed):
    draw = random.Random(seed)
    count = draw.randint(1, 6)
    slos = tuple(draw.sample((5.0, 10.0, 20.0, 40.0), draw.randint(1, 3)))
    books = [ledger(*(300,) * count, tbt_slo_ms=slos, ttft_slo_ms=60.0) for _ in range(2)]
    now = 0.05
    for book in books:
        book.take(step(*range(count)), now)
    for _ in range(draw.randint(1, 12)):
        numbers = draw.sample(range(count), draw.randint(1, count))
        ends = now + np.cumsum([draw.expovariate(100) for _ in range(draw.choice((1, 2, 30)))])
        now = ends.item(-1)
        at_once, one_by_one = books
        at_once.skip(tuple(map(str, numbers)), ends)
        for end in ends.tolist():
            one_by_one.take(step(*numbers), end)
    assert all_of(at_once) == all_of(one_by_one)
