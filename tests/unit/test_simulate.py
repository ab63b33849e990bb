"""`duetjax simulate`'s cases: policies on shipped presets, what is refused, the highest rate."""

import json
import math
import random
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from duetjax import simulate
from duetjax.config import ConfigError, EngineConfig
from duetjax.policy.durations import Step
from duetjax.policy.foresight import Foresight
from duetjax.policy.launch import Lane, Program
from duetjax.profile_files import Kind, read_hardware_profile, read_model_profile, shipped_file
from duetjax.sim.ledger import Objectives
from duetjax.sim.workload import MOST_REQUESTS, Arrival, repeated
from duetjax.simulate import DISAGGREGATED, POLICIES, Case, Setup, highest_rate, last_that, run

ENGINE = EngineConfig(max_num_seqs=64, max_num_batched_tokens=2048, split=(32, 100), look_ahead=4)
OBJECTIVES = Objectives((50.0, 10.0), 1000.0)
PROMPT, OUTPUT, COUNT = 512, 64, 30


def write_trace(file, requests):
    """Of (at, prompt_tokens, output_tokens)."""
    names = "at", "prompt_tokens", "output_tokens"
    lines = [json.dumps(dict(zip(names, each, strict=True))) for each in requests]
    file.write_text("\n".join(lines))
    return str(file)


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """An 8B model on an H200; 30 requests of 512 prompt tokens and 64 of output, about 1 a second.

    Each is alone for all of its time.
    """
    trace = tmp_path_factory.mktemp("traces") / "load.jsonl"
    draw = random.Random(0)
    requests = [(number + draw.uniform(0.0, 0.5), PROMPT, OUTPUT) for number in range(COUNT)]
    return Setup("llama-3.1-8b", "h200-sxm", write_trace(trace, requests), ENGINE)


def case(policy, rate=None, **more):
    return Case(policy, OBJECTIVES, rate, **more)


# One simulation.


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_gives_every_request_its_tokens(setup, policy):
    for rate in (1.0, 60.0):
        found = run(setup, case(policy, rate))
        assert (found.requests, found.finished, found.refused) == (COUNT, COUNT, 0)
        assert found.policy == policy
        assert found.rate == pytest.approx(rate)
        assert found.is_whole
        assert found.output_per_s * found.seconds == pytest.approx(COUNT * OUTPUT)
        assert found.tokens_per_s * found.seconds == pytest.approx(COUNT * (PROMPT + OUTPUT))
        assert found.goodput * found.seconds == pytest.approx(found.attained[0] * COUNT)
        assert found.attained[0] >= found.attained[1]
        assert 0 < found.pages[0] <= found.pages[1]
        watts = found.joules / found.seconds / (700.0 * found.gpus)
        assert 0.3 < watts <= 1.0
        assert (found.budget, found.gpus) == (2048, 1 + (policy == DISAGGREGATED))


@pytest.mark.parametrize("policy", POLICIES)
def test_whoever_is_alone_waits_as_long_as_the_profiles_foretell(setup, policy):
    model = read_model_profile(shipped_file(Kind.MODEL, "llama-3.1-8b"))
    foresight = Foresight(model, read_hardware_profile(shipped_file(Kind.HARDWARE, "h200-sxm")))

    def step_ms(program, bucket, new, cached):
        return foresight.step_ms(Step(Lane.WHOLE, None, program, bucket, new, np.array([cached])))

    found = run(setup, case(policy))
    ttft_ms = step_ms(Program.PREFILL, 512, PROMPT, 0)
    if policy == DISAGGREGATED:
        ttft_ms += PROMPT * foresight.transfer_ms
    assert found.ttft_ms.p50 == pytest.approx(ttft_ms)
    assert found.ttft_ms.most == pytest.approx(ttft_ms)
    decode_ms = [step_ms(Program.DECODE, 2, 1, PROMPT + n) for n in range(OUTPUT - 1)]
    assert found.tbt_ms.most == pytest.approx(decode_ms[-1])
    assert found.tbt_ms.mean == pytest.approx(np.mean(decode_ms))
    assert found.tpot_ms.p99 == pytest.approx(np.mean(decode_ms))
    assert found.attained == (1.0, 1.0)


def test_lanes_beside_each_other_are_counted_where_there_are_any(setup):
    splits = {policy: run(setup, case(policy, 60.0)).splits for policy in POLICIES}
    assert splits[DISAGGREGATED] > splits["static-split"] > 0
    assert [splits[each] for each in ("aggregated", "prefill-first", "aggregated-slo")] == [0] * 3


def test_prefill_first_is_sooner_with_first_tokens_and_later_with_others(setup):
    first, mixed = (run(setup, case(each, 60.0)) for each in ("prefill-first", "aggregated"))
    assert first.ttft_ms.mean < mixed.ttft_ms.mean
    assert first.tbt_ms.p50 <= mixed.tbt_ms.p50


def test_contention_slows_lanes_beside_each_other_and_no_others(setup):
    slow = replace(setup, contention=(3.0, 3.0))
    split, aggregated = case("static-split", 60.0), case("aggregated", 60.0)
    assert run(slow, split).ttft_ms.p50 > 1.5 * run(setup, split).ttft_ms.p50
    assert run(slow, aggregated) == run(setup, aggregated)


def test_a_budget_of_its_own_is_the_cases(setup):
    found = run(setup, case("aggregated", 60.0, budget=256))
    assert (found.budget, found.finished) == (256, COUNT)
    assert found.tbt_ms.most < run(setup, case("aggregated", 60.0)).tbt_ms.most


@pytest.mark.parametrize(("policy", "gpus"), [("duet", 4), (DISAGGREGATED, 8)])
def test_four_gpus_that_share_the_model_are_faster_than_one(setup, policy, gpus):
    shared = run(replace(setup, tensor_parallel=4), case(policy))
    one = run(setup, case(policy))
    assert (shared.gpus, shared.finished) == (gpus, COUNT)
    assert one.tbt_ms.p50 / 4 < shared.tbt_ms.p50 < one.tbt_ms.p50
    assert one.ttft_ms.p50 / 4 < shared.ttft_ms.p50 < one.ttft_ms.p50


def test_requests_of_fixed_lengths_come_at_the_rate_of_the_case(setup):
    fixed = replace(setup, trace="fixed:512x64", seconds=2.0)
    found = run(fixed, case("duet", 10.0))
    assert (found.finished, found.rate) == (10, pytest.approx(10.0))  # 5/s where nobody says
    found = run(replace(fixed, generated_rate=10.0), case("duet", 10.0))
    assert (found.finished, found.rate) == (20, pytest.approx(10.0))


# Traces that are repeated.


def test_a_short_trace_is_repeated_until_it_lasts_long_enough_at_the_rate(setup, tmp_path):
    even = [(float(number), PROMPT, OUTPUT) for number in range(33)]
    setup = replace(setup, trace=write_trace(tmp_path / "even.jsonl", even))
    found = run(setup, case("aggregated", 66.0, least_seconds=0.5))
    assert found == run(setup, case("aggregated", 66.0))
    found = run(setup, case("aggregated", 66.0, least_seconds=2.75))
    assert (found.requests, found.finished) == (182, 182)  # the last time in part
    assert found.rate == pytest.approx(66.0)


def test_a_trace_that_is_repeated_shares_blocks_within_each_time_alone():
    once = [Arrival(0.0, 600, 1, (0, 7)), Arrival(2.5, 600, 1, (0,)), Arrival(4.0, 5, 2)]
    thrice = repeated(once, 3)
    assert [each.at for each in thrice] == [0.0, 2.5, 4.0, 6.0, 8.5, 10.0, 12.0, 14.5, 16.0]
    assert [len(each.blocks) for each in thrice] == [2, 1, 0] * 3
    for n in (0, 3, 6):
        assert thrice[n].blocks[0] == thrice[n + 1].blocks[0]
    assert len({block for each in thrice for block in each.blocks}) == 6
    assert [(each.prompt_tokens, each.output_tokens) for each in thrice[:3]] == [
        (each.prompt_tokens, each.output_tokens) for each in once
    ]


def test_a_trace_that_is_repeated_is_in_order():
    for seed in range(50):
        draw = random.Random(seed)
        once = [Arrival(at, 1, 1) for at in sorted(draw.uniform(0.0, 9.0) for _ in range(10))]
        times = [each.at for each in repeated(once, 7)]
        assert times == sorted(times), f"seed {seed}"


@pytest.mark.parametrize("seed", [0, 2, 4])
def test_a_generated_trace_can_be_repeated(setup, seed):
    short = replace(setup, trace="azure-conversation", seconds=10.0, seed=seed)
    assert run(short, case("aggregated", 20.0, least_seconds=60.0)).is_whole


# Repeatable.


def test_the_same_case_gives_the_same_figures_here_and_in_other_processes(setup):
    noisy = replace(setup, trace="azure-conversation", seconds=4.0, noise=0.2, seed=3)
    for each in (setup, noisy):
        cases = [case(policy, 30.0) for policy in ("duet", DISAGGREGATED)]
        here = [run(each, one) for one in cases]
        assert list(simulate.run_all(partial(run, each), cases, 1)) == here
        assert list(simulate.run_all(partial(run, each), cases, 2)) == here


@pytest.mark.parametrize("policy", POLICIES)
def test_seeds_matter_to_noise_and_to_what_is_generated(setup, policy):
    for each in (replace(setup, noise=0.2), replace(setup, trace="azure-code", seconds=4.0)):
        first, second = (run(replace(each, seed=seed), case(policy, 20.0)) for seed in (0, 1))
        assert first.ttft_ms != second.ttft_ms
        assert run(replace(each, seed=1), case(policy, 20.0)) == second


# What is refused.


@pytest.mark.parametrize(
    ("changes", "policy", "message"),
    [
        ({}, "fastest", "--policy fastest: choose aggregated,"),
        ({"gpu": "rtx-4091"}, "duet", "--gpu rtx-4091: .*rtx-4090"),
        ({"gpu": "rtx-4090", "model": "qwen3-14b"}, "duet", "no memory is left .* 29.54 GB"),
        (
            {"gpu": "rtx-4090", "engine": replace(ENGINE, max_model_len=131_072)},
            "duet",
            "lower --max-model-len",
        ),
        ({"tensor_parallel": 3}, "duet", "--tensor-parallel 3: 32 heads on 8 KV heads"),
        ({"tensor_parallel": 64}, DISAGGREGATED, "--tensor-parallel 64"),
        ({"engine": replace(ENGINE, split=(100, 100))}, "static-split", "--split 100/100"),
        ({"engine": replace(ENGINE, split=(200, 1))}, "static-split", "--split 200/1"),
        ({"trace": "nowhere.jsonl"}, "duet", "nowhere.jsonl is no file"),
        ({"trace": "azure-code", "seconds": -1.0}, "duet", "seconds must be"),
    ],
)
def test_what_cannot_be_simulated_is_refused_in_one_line(setup, changes, policy, message):
    with pytest.raises(ConfigError, match=message) as error:
        run(replace(setup, **changes), case(policy))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "rate",
    [0.0, -1.0, math.inf, math.nan],
)
def test_what_is_no_rate_is_refused(setup, rate):
    with pytest.raises(ConfigError, match="rate"):
        run(setup, case("duet", rate))


def test_a_budget_that_has_no_room_for_prompts_is_refused(setup):
    with pytest.raises(ConfigError, match="--max-num-batched-tokens 64"):
        run(setup, case("duet", budget=64))


def test_a_request_that_can_never_run_is_counted_and_does_not_stop_the_others(setup, tmp_path):
    trace = write_trace(tmp_path / "long.jsonl", [(0.0, 200_000, 5), (1.0, 100, 5)])
    found = run(replace(setup, trace=trace), case("duet"))
    assert (found.requests, found.finished, found.refused) == (2, 1, 1)
    assert found.attained == (0.5, 0.5)


# Giving up.


def late_ones(tmp_path, late, count=100):
    """Requests a second apart, the first ones with prompts that take longer than 300 ms."""
    requests = [(float(n), 20_000 if n < late else 64, 40) for n in range(count)]
    return write_trace(tmp_path / f"{late}.jsonl", requests)


@pytest.mark.parametrize(
    ("late", "target", "is_whole"),
    [
        (9, 0.9, True),
        (10, 0.9, True),
        (11, 0.9, False),
        (1, 0.99, True),
        (2, 0.99, False),
    ],
)
def test_a_run_is_given_up_where_the_target_is_out_of_reach(
    setup, tmp_path, late, target, is_whole
):
    slow = replace(setup, trace=late_ones(tmp_path, late), engine=replace(ENGINE, look_ahead=1))
    one = Case(DISAGGREGATED, Objectives((50.0,), 300.0))
    whole = run(slow, one)
    assert whole.attained == (1 - late / 100,)
    assert run(slow, one, target=target).is_whole == is_whole
    if is_whole:
        assert run(slow, one, target=target) == whole


# The highest rate.


class Attaining:
    """Takes the place of `run`: rates up to `most` attain 95 %, others 40 %. rates: asked for."""

    def __init__(self, base, most, *, gives_up=False):
        self.rates = []
        self._base = base
        self._most = most
        self._gives_up = gives_up

    def __call__(self, setup, one, *, target):
        assert len(self.rates) < 200, "no end of it"
        self.rates.append(one.rate)
        is_met = one.rate <= self._most
        attained = (0.4, 0.95) if is_met else (0.0, 0.4)
        is_whole = is_met or not self._gives_up
        return replace(self._base, rate=one.rate, attained=attained, is_whole=is_whole)


@pytest.fixture
def attaining(setup, monkeypatch):
    """Makes one for a highest rate."""
    base = run(setup, case("duet"))

    def make(most, **options):
        fake = Attaining(base, most, **options)
        simulate._cached.cache_clear()
        monkeypatch.setattr(simulate, "run", fake)
        return fake

    yield make
    simulate._cached.cache_clear()


def products_allow():
    """Requests/s of the trace's tokens by the FLOP/s of the GPU."""
    model = read_model_profile(shipped_file(Kind.MODEL, "llama-3.1-8b"))
    hardware = read_hardware_profile(shipped_file(Kind.HARDWARE, "h200-sxm"))
    bucket = max(size for kind, size in model.costs if kind is Program.PREFILL)
    flops = model.costs[Program.PREFILL, bucket].flops / bucket * (PROMPT + OUTPUT)
    return hardware.curve[-1].flops_per_s / flops


@pytest.mark.parametrize("precision", [0.02, 0.1])
@pytest.mark.parametrize("share", [0.016, 0.03, 0.499, 0.5, 0.999, 1.0, 1.001, 3.7])
def test_the_highest_rate_is_found_to_the_precision(attaining, setup, share, precision):
    most = share * products_allow()
    fake = attaining(most)
    found = highest_rate(setup, case("duet"), 0.9, precision=precision, objective=1)
    assert most / (1 + precision) < found.rate <= most
    assert found.attained[1] == 0.95
    assert len(fake.rates) == len(set(fake.rates)) < 25
    assert fake.rates[0] == pytest.approx(products_allow())


def test_the_objective_that_is_asked_for_decides(attaining, setup):
    attaining(10.0)
    assert highest_rate(setup, case("duet"), 0.9) is None
    assert highest_rate(setup, case("duet"), 0.4).rate == pytest.approx(10.0, rel=0.02)


def test_a_run_that_was_given_up_attains_nothing(attaining, setup):
    attaining(10.0, gives_up=True)
    found = highest_rate(setup, case("duet"), 0.3, objective=1)
    assert found.rate == pytest.approx(10.0, rel=0.02)


def test_where_nothing_attains_the_search_ends_with_nothing(attaining, setup):
    fake = attaining(0.0)
    assert highest_rate(setup, case("duet"), 0.9, objective=1) is None
    assert len(fake.rates) < 15
    assert min(fake.rates) == pytest.approx(products_allow() / 64)


def test_where_everything_attains_the_search_ends(attaining, setup):
    fake = attaining(math.inf)
    found = highest_rate(setup, case("duet"), 0.9, objective=1)
    assert found.rate == pytest.approx(2**3 * products_allow())
    assert len(fake.rates) == 4


def test_no_rate_is_tried_whose_crowd_is_too_large_to_simulate(attaining, setup):
    fake = attaining(math.inf)
    highest_rate(setup, case("duet"), 0.9, objective=1)
    assert 60 * max(fake.rates) <= MOST_REQUESTS


def test_all_policies_are_asked_for_rates_of_one_grid(attaining, setup):
    for most, policy in zip((7.0, 31.0, 55.5), ("duet", "aggregated", DISAGGREGATED), strict=True):
        fake = attaining(most)
        highest_rate(setup, case(policy), 0.9, objective=1)
        places = 36 * np.log2(np.array(fake.rates) / products_allow())
        assert np.abs(places - np.rint(places)).max() < 1e-6


def test_the_highest_rate_of_a_real_case_attains_and_a_higher_one_does_not(setup):
    engine = replace(ENGINE, max_num_seqs=16)
    small = replace(setup, engine=engine, trace="azure-conversation", seconds=30.0)
    one = Case("aggregated", Objectives((50.0,), 1000.0))
    found = highest_rate(small, one, 0.8)
    assert found.attained[0] >= 0.8
    more = replace(one, rate=found.rate * 1.02, least_seconds=60.0)
    more = run(small, more, target=0.8)
    assert more.attained[0] < 0.8


@pytest.mark.parametrize("steps", [1, 2, 7, 36])
def test_the_last_that_does_is_found_wherever_it_is(steps):
    for last in range(-6 * steps, 3 * steps + 1):
        asked = []

        def attains(place, last=last, asked=asked):
            asked.append(place)
            return place <= last

        assert last_that(attains, steps) == last
        assert len(asked) < 23 + math.log2(steps)
    assert last_that(lambda place: place < -6 * steps, steps) is None


def test_the_last_that_does_is_no_more_than_3_times_steps():
    assert last_that(lambda place: True, 36) == 3 * 36
