"""Recorded programs on both lanes of a GPU, on the double of libcuda: the order that one gives."""

import random
import time
from collections import Counter

import pytest
from fake_xla import a_gpu
from lane_plans import PATIENCE
from toy_gpu import MANUAL, THREADS, Gpu, Twin, check_state, play

from duetjax.policy.launch import Lane


class Interleaved:
    """What a twin delivers, in manual mode: operations run while the test waits, in an order drawn
    from a seed.
    """

    def __init__(self, twin, seed):
        self._twin, self._dice = twin, random.Random(seed)

    def next(self):
        until, gpu = time.monotonic() + PATIENCE, self._twin.gpu
        while gpu.deliveries.is_empty():
            if not gpu.cuda.library.fake_step(self._dice.getrandbits(60)):
                assert time.monotonic() < until, "nothing is delivered"
                time.sleep(0)
        return self._twin.next()


@pytest.fixture
def twin():
    with a_gpu() as cuda:
        twin = Twin(Gpu(cuda))
        yield twin
        cuda.library.fake_mode(THREADS)
        twin.gpu.lanes.close()


def test_a_thousand_interleavings_end_where_one_launch_after_another_ends(twin):
    twin.gpu.cuda.library.fake_mode(MANUAL)
    counts = Counter()
    for seed in range(1000):
        counts += play(twin, seed, Interleaved(twin, seed))
        check_state(twin)
    assert twin.gpu.clashes == []
    wanted = {
        **{f"k={k}": 5 for k in range(1, 17)},
        "handovers": 300,
        "preemptions": 50,
        "stops": 300,
        "aborts": 100,
        f"{Lane.WHOLE} to {Lane.PREFILL}": 50,
        f"{Lane.PREFILL} to {Lane.WHOLE}": 5,
    }
    assert {what: counts[what] for what, least in wanted.items() if counts[what] < least} == {}
