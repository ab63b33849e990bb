"""A grid of launches of a small model on a small device, timed by a truth that is known."""

from dataclasses import replace

import numpy as np
from small_profiles import small_hardware, small_model

from duetjax.policy.fit import Correction, Timed
from duetjax.policy.foresight import Foresight
from duetjax.policy.grid import Grid
from duetjax.policy.launch import Lane, Program
from duetjax.policy.limits import SchedulerLimits
from duetjax.policy.profiles import Cost, Reach

LIMITS = SchedulerLimits(
    num_pages=600,
    page_size=16,
    num_slots=16,
    max_model_len=1024,
    max_num_batched_tokens=512,
    decode_buckets=(2, 4, 8, 16),
    prefill_buckets=(64, 128, 256, 512),
)
MODEL = small_model(
    num_layers=4,
    costs={
        **{(Program.DECODE, n): Cost(1e6 * n, 4e6 + 1e4 * n) for n in LIMITS.decode_buckets},
        **{(Program.PREFILL, n): Cost(1e6 * n, 4e6 + 1e4 * n) for n in LIMITS.prefill_buckets},
    },
)
HARDWARE = small_hardware(
    cores=8,
    curve=(Reach(2, 1e10, 1.5e9), Reach(4, 2e10, 2.5e9), Reach(8, 4e10, 3e9)),
    launch_us=200.0,
)
KEYS = [(lane, program) for lane in Lane for program in Program]


def plain(factor=1.3, hardware=HARDWARE):
    return Correction(hardware, dict.fromkeys(KEYS, factor))


def a_grid(seed=0, splits=None, *, has_parts=True, limits=LIMITS):
    splits = HARDWARE.splits() if splits is None else splits
    return Grid(limits, splits, Foresight(MODEL, HARDWARE).step_ms, has_parts, seed)


def truth(factors=(1.1, 1.2, 1.15, 1.3), **hardware):
    """What launches really take; factors: whole decode, whole prefill, and of both lanes."""
    whole_decode, whole_prefill, decode, prefill = factors
    by = dict.fromkeys(KEYS, 1.0) | {
        (Lane.WHOLE, Program.DECODE): whole_decode,
        (Lane.WHOLE, Program.PREFILL): whole_prefill,
        (Lane.DECODE, Program.DECODE): decode,
        (Lane.PREFILL, Program.PREFILL): prefill,
    }
    return Correction(replace(HARDWARE, **hardware), by)


def timed(cases, correction, noise=0.0, seed=0):
    """Every step of the cases, and whether it is held out."""
    steps = [
        (Timed(shape.step(lane, case.split), len(case.shapes) == 2, 1.0), case.is_held_out)
        for case in cases
        for shape, lane in zip(case.shapes, case.lanes, strict=True)
    ]
    ms = correction.foretold(MODEL, [each for each, _ in steps])
    ms = ms * np.exp(np.random.default_rng(seed).normal(0.0, noise, len(ms)))
    pairs = zip(steps, ms.tolist(), strict=True)
    return [(replace(each, ms=of), held_out) for (each, held_out), of in pairs]
