"""Invented answers: what they are made of, how long they are, and that nothing else moves them."""

import math
from collections import Counter

import pytest

from duetjax.config import SamplingParams
from duetjax.policy.flights import Pace
from duetjax.policy.launch import SlotParams, Split
from duetjax.policy.limits import SchedulerLimits
from duetjax.policy.policies import Aggregated, PrefillFirst, StaticSplit
from duetjax.policy.request import NewRequest
from duetjax.policy.scheduler import Scheduler
from duetjax.sim.clock import VirtualClock
from duetjax.sim.executor import SimulatedExecutor
from duetjax.sim.sampler import MEAN_TOKENS, InventedTokens
from duetjax.sim.script import Script

EOS, OTHER_EOS = 7, 8
TOKENS = (10, 11, 12, 13)
SAMPLER = InventedTokens(TOKENS, (EOS, OTHER_EOS))


def of(seed, *, stop_ids=(EOS,), num_prompt=5, **sampling):
    params = SamplingParams(seed=seed, max_tokens=None, **sampling)
    return SlotParams(0, params, stop_ids=stop_ids, num_prompt=num_prompt)


def answer(params, most=10**4):
    """Its tokens up to an end-of-sequence id, that included."""
    tokens = []
    while len(tokens) < most and (not tokens or tokens[-1] in TOKENS):
        tokens.append(SAMPLER(params, params.num_prompt + len(tokens)))
    return tokens


def test_an_answer_is_told_by_its_seed_whatever_the_prompt():
    assert answer(of(3)) == answer(of(3, num_prompt=900, temperature=0.0))
    assert len({tuple(answer(of(seed))) for seed in range(200)}) == 200


def test_seeds_may_be_negative_or_large():
    for seed in (-(2**63), 2**63 - 1):
        assert set(answer(of(seed))) <= {*TOKENS, EOS}


def test_every_token_is_as_likely_as_any_other():
    seen = Counter(token for seed in range(200) for token in answer(of(seed))[:-1])
    expected = sum(seen.values()) / len(TOKENS)
    assert set(seen) == set(TOKENS)
    for count in seen.values():
        assert abs(count - expected) < 5 * math.sqrt(expected)


def test_lengths_are_geometric_and_no_answer_is_empty():
    lengths = sorted(len(answer(of(seed))) - 1 for seed in range(4000))
    assert lengths[0] == 1
    error = MEAN_TOKENS / math.sqrt(len(lengths))
    assert abs(sum(lengths) / len(lengths) - MEAN_TOKENS) < 3 * error
    for quantile in (0.25, 0.5, 0.9):
        expected = math.log(1 - quantile) / math.log(1 - 1 / MEAN_TOKENS)
        assert lengths[int(quantile * len(lengths))] == pytest.approx(expected, rel=0.15)


def test_an_answer_ends_by_the_first_id_that_the_request_stops_at():
    assert answer(of(0))[-1] == EOS
    assert answer(of(0, stop_ids=(OTHER_EOS, 11)))[-1] == OTHER_EOS


def test_a_request_that_ignores_the_end_goes_on_with_ordinary_tokens():
    tokens = answer(of(0, stop_ids=()), most=2000)
    assert len(tokens) == 2000
    assert set(tokens) == set(TOKENS)


@pytest.mark.parametrize("seed", range(20))
def test_no_answer_ends_among_its_first_min_tokens(seed):
    end = len(answer(of(seed))) - 1
    assert answer(of(seed, min_tokens=end))[end] == EOS
    later = answer(of(seed, min_tokens=end + 1))
    assert len(later) > end + 1
    assert later[:end] == answer(of(seed))[:end]


# Under schedulers.


def run(policy, num_pages, arrivals):
    """Tokens by request, and how often one was put back."""
    limits = SchedulerLimits(
        num_pages=num_pages,
        page_size=4,
        num_slots=4,
        max_model_len=200,
        max_num_batched_tokens=16,
        decode_buckets=(2, 4),
        prefill_buckets=(8, 16),
    )
    clock = VirtualClock()
    script = Script(10.0, 40.0, noise=0.5)
    executor = SimulatedExecutor(script, clock, SAMPLER)
    scheduler = Scheduler(limits, policy, Pace(script))
    tokens = {}
    coming = list(arrivals)
    while coming or scheduler.has_work or scheduler.num_in_flight:
        if coming:
            scheduler.add(coming.pop(0), clock.now())
        for launch in scheduler.plan(clock.now()):
            executor.submit(launch)
        for step in executor.advance():
            for output in scheduler.commit(step, clock.now()):
                tokens.setdefault(output.id, []).extend(output.token_ids)
    return tokens, scheduler.stats().preemptions


def test_nothing_but_the_request_decides_over_its_answer():
    requests = [
        NewRequest(
            str(seed),
            tuple(range(100 * seed, 100 * seed + 9)),
            150,
            SamplingParams(seed=seed, max_tokens=None),
            stop_ids=(EOS,),
        )
        for seed in range(16)
    ]
    alone = {}
    for new in requests:
        tokens, _ = run(Aggregated(16), 250, [new])
        alone |= tokens
    assert alone == {new.id: answer(of(int(new.id)))[:150] for new in requests}
    assert any(tokens[-1] == EOS for tokens in alone.values())
    for policy in (Aggregated(16), PrefillFirst(16), StaticSplit(16, Split(1, 1), k=8)):
        together, preemptions = run(policy, 60, requests)
        assert together == alone
        assert preemptions
