"""Models on several devices, worked out by hand; decode steps foretold at once and one by one."""

from dataclasses import replace

import numpy as np
import pytest
from small_profiles import small_hardware, small_model

from duetjax.policy.durations import Step
from duetjax.policy.foresight import Foresight
from duetjax.policy.launch import Lane, Program
from duetjax.policy.profiles import Cost, Reach
from duetjax.policy.roofline import HOP_US, Attention, Roofline
from duetjax.profile_files import Kind, read_hardware_profile, read_model_profile, shipped_file

DECODE, PREFILL = Program.DECODE, Program.PREFILL
MODEL, HARDWARE = small_model(), small_hardware()
REAL_MODEL = read_model_profile(shipped_file(Kind.MODEL, "llama-3.1-8b"))
REAL_HARDWARE = read_hardware_profile(shipped_file(Kind.HARDWARE, "h200-sxm"))


def ms(model, hardware, program, bucket, new, cached, cores=None, lane=None):
    """Of one step on all cores, or on some."""
    cores = [hardware.cores if cores is None else cores]
    return Roofline(model, hardware).step_ms(program, bucket, new, cached, cores, lane).item()


def all_reduce_ms(model, hardware, *step, **more):
    """What a step takes longer because its model's devices must talk to each other."""
    alone = replace(model, shards=1)
    return ms(model, hardware, *step, **more) - ms(alone, hardware, *step, **more)


# A device's part.


def test_each_device_has_its_share_of_products_and_heads_and_all_else_is_whole():
    model = small_model(costs={(DECODE, 2): Cost(4e6, 3e6), (PREFILL, 16): Cost(4e7, 5e6)})
    part = model.sharded(2)
    assert part.costs == {(DECODE, 2): Cost(2e6, 1.5e6), (PREFILL, 16): Cost(2e7, 2.5e6)}
    assert (part.num_heads, part.num_kv_heads, part.shards) == (2, 1, 2)
    whole = {"num_heads": 4, "num_kv_heads": 2, "shards": 1, "costs": model.costs}
    assert replace(part, **whole) == model
    assert model == small_model(costs=model.costs)


def test_one_device_has_everything():
    assert MODEL.sharded(1) == MODEL


@pytest.mark.parametrize(
    ("shards", "heads", "kv_heads"), [(2, 16, 4), (4, 8, 2), (8, 4, 1), (16, 2, 1), (32, 1, 1)]
)
def test_devices_that_outnumber_the_kv_heads_have_one_each(shards, heads, kv_heads):
    part = REAL_MODEL.sharded(shards)
    assert (part.num_heads, part.num_kv_heads) == (heads, kv_heads)


@pytest.mark.parametrize(("heads", "kv_heads", "shards"), [(32, 8, 3), (32, 8, 64), (12, 6, 4)])
def test_heads_that_cannot_be_divided_are_refused_with_their_numbers(heads, kv_heads, shards):
    model = small_model(num_heads=heads, num_kv_heads=kv_heads)
    with pytest.raises(ValueError, match=rf"{heads} heads on {kv_heads} KV heads .*{shards}"):
        model.sharded(shards)


def test_sharding_twice_is_sharding_once():
    assert REAL_MODEL.sharded(2).sharded(4) == REAL_MODEL.sharded(8)


def test_each_device_sends_the_keys_and_values_of_its_own_heads():
    # 3 layers, keys and values of 8 numbers of 2 bytes, at 1 GB/s.
    assert Roofline(MODEL, HARDWARE).transfer_ms == pytest.approx(3 * 2 * 2 * 8 * 2 / 1e6)
    assert Roofline(MODEL.sharded(2), HARDWARE).transfer_ms == pytest.approx(3 * 2 * 8 * 2 / 1e6)


# What the devices tell each other.


@pytest.mark.parametrize(
    ("shards", "step", "expected_us"),
    [
        # 6 all-reduces, 2 in each layer, of 32 numbers of 2 bytes for each token, at 1 GB/s.
        (2, (DECODE, 2, 1, [5]), 6 * 2 * 1 * (2 + 0.064 / 2)),
        (2, (DECODE, 2, 1, [5, 9]), 6 * 2 * 1 * (2 + 0.128 / 2)),
        (4, (DECODE, 2, 1, [5, 9]), 6 * 2 * 3 * (2 + 0.128 / 4)),
        (2, (PREFILL, 16, [10, 1], [0, 7]), 6 * 2 * 1 * (2 + 11 * 0.064 / 2)),
        (4, (PREFILL, 16, [16], [0]), 6 * 2 * 3 * (2 + 16 * 0.064 / 4)),
    ],
)
def test_an_all_reduce_is_a_ring_worked_out_by_hand(shards, step, expected_us):
    found = all_reduce_ms(MODEL.sharded(shards), HARDWARE, *step)
    assert HOP_US == 2.0
    assert 1e3 * found == pytest.approx(expected_us, rel=1e-9)


def test_the_interconnect_and_not_the_memory_decides():
    curve = (Reach(4, 2e9, 8e9),)
    step = PREFILL, 16, [16], [0]
    slow = small_hardware(curve=curve, interconnect_bytes_per_s=5e8)
    expected_us = 6 * 2 * (2 + 16 * 64 / 5e8 * 1e6 / 2)
    assert 1e3 * all_reduce_ms(MODEL.sharded(2), slow, *step) == pytest.approx(expected_us)


@pytest.mark.parametrize("shards", [2, 4, 8])
def test_a_real_models_all_reduces_follow_the_formula(shards):
    tokens, model = 4096, REAL_MODEL.sharded(shards)
    num_bytes = tokens * model.hidden_size * 2
    per_s = REAL_HARDWARE.interconnect_bytes_per_s
    ring_s = 2 * (shards - 1) * (HOP_US / 1e6 + num_bytes / (shards * per_s))
    found = all_reduce_ms(model, REAL_HARDWARE, PREFILL, 4096, [tokens], [0])
    assert found == pytest.approx(1e3 * 2 * 32 * ring_s, rel=1e-6)


def test_a_part_of_the_device_that_moves_less_waits_longer():
    model, step = REAL_MODEL.sharded(2), (PREFILL, 4096, [4096], [0])
    hops_ms = 2 * 32 * 2 * HOP_US / 1e3
    whole = all_reduce_ms(model, REAL_HARDWARE, *step) - hops_ms
    beside = all_reduce_ms(model, REAL_HARDWARE, *step, lane=Lane.PREFILL) - hops_ms
    few = all_reduce_ms(model, REAL_HARDWARE, *step, cores=8) - hops_ms
    assert beside == pytest.approx(whole * REAL_HARDWARE.contention_prefill)
    assert few > 1.5 * whole


@pytest.mark.parametrize("attention", Attention)
@pytest.mark.parametrize("shards", [1, 2, 8])
def test_more_tokens_never_take_less(shards, attention):
    roofline = Roofline(REAL_MODEL.sharded(shards), REAL_HARDWARE, attention=attention)
    times = [
        roofline.step_ms(PREFILL, 8192, [new], [cached], [132]).item()
        for cached in (0, 5000)
        for new in (1, 2, 3, 64, 1000, 4096, 8192)
    ]
    assert times[:7] == sorted(times[:7])
    assert times[7:] == sorted(times[7:])
    rows = [roofline.step_ms(DECODE, 64, 1, [700] * n, [132]).item() for n in range(1, 65)]
    assert rows == sorted(rows)


def test_a_step_of_nobody_exchanges_nothing_but_pays_for_the_hops():
    found = all_reduce_ms(MODEL.sharded(2), HARDWARE, DECODE, 2, 1, [])
    assert found == pytest.approx(6 * 2 * HOP_US / 1e3)


def test_two_devices_need_less_than_one_and_more_than_half_of_its_time():
    step = PREFILL, 4096, [4096], [2000]
    one, two = (ms(REAL_MODEL.sharded(n), REAL_HARDWARE, *step) for n in (1, 2))
    assert one / 2 < two < one


# Decode steps at once and one by one.

KINDS = {
    "usual": {},
    "per-request": {"attention": Attention.PER_REQUEST},
    "quarter": {"token_shares": (1.0,) * 16 + (0.25,) * 16},
}


@pytest.mark.parametrize("lane", [None, Lane.DECODE])
@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_decode_steps_at_once_are_bit_for_bit_those_one_by_one(kind, shards, lane):
    roofline = Roofline(REAL_MODEL.sharded(shards), REAL_HARDWARE, **KINDS[kind])
    draw = np.random.default_rng(5)
    for rows, most, cores in ((1, 10, 132), (3, 500, 44), (64, 9000, 132), (200, 130_000, 8)):
        contexts = draw.integers(1, most, rows)
        before = contexts.tolist()
        bucket = 1 << max(1, (rows - 1).bit_length())
        at_once = roofline.decode_steps_ms(bucket, contexts, 25, roofline.per_unit(cores, lane))
        one_by_one = [
            roofline.step_ms(DECODE, bucket, 1, contexts + step, [cores], lane).item()
            for step in range(25)
        ]
        assert at_once.tolist() == one_by_one
        assert contexts.tolist() == before


@pytest.mark.parametrize("attention", Attention)
@pytest.mark.parametrize("shards", [1, 2])
def test_what_launches_have_taught_holds_for_steps_at_once_too(shards, attention):
    foresight = Foresight(REAL_MODEL.sharded(shards), REAL_HARDWARE, attention=attention)

    def step(contexts):
        return Step(Lane.WHOLE, None, DECODE, 8, 1, contexts)

    contexts = np.array([3, 900, 20_000])
    first = foresight.step_ms(step(contexts))
    for _ in range(40):
        foresight.observe(step(contexts), 0.77 * first)
    at_once = foresight.steps_ms(step(contexts), 12)
    one_by_one = [foresight.step_ms(step(contexts + count)) for count in range(12)]
    assert at_once.tolist() == one_by_one
    assert at_once[0] == pytest.approx(0.77 * first)
    assert foresight.steps_ms(step(contexts), 0).tolist() == []
