"""A model's own programs, compiled for this processor, behind the lanes of the double's GPU."""

from collections import Counter
from functools import cache

import jax
import numpy as np
import pytest
from fake_xla import FakeExecutable, FakeMemory, a_gpu
from lane_plans import Deliveries, Plan
from lane_programs import SLOTS, compiled, programs, weights
from toy_gpu import SPLITS, Anywhere

from duetjax.runtime.programs import Upkeep
from duetjax.runtime.rungs import Rung, open_lanes
from pallas_kernels import xla

TEMPORARIES = 4096
PLANS = range(20)


@cache
def model():
    """Its programs, with their KV pages in XLA's memory as on a GPU, and the executables."""
    made = programs(xla, in_pool=False, decode=SLOTS)
    return made, compiled(made)


class ModelGpu:
    """The model's programs, recorded on the double's GPU."""

    def __init__(self, cuda):
        self.memory, self.clashes = FakeMemory(cuda, num_bytes=1 << 26), []
        made, executables = model()
        leaves = [self.memory.put(leaf) for leaf in weights()]
        fakes = {key: self.executable(key, len(leaves)) for key in made.buckets}
        fakes[Upkeep.ALLOCATE] = lambda: jax.tree.map(
            self.memory.put, executables[Upkeep.ALLOCATE]()
        )
        self.lanes, self.rung = open_lanes(
            made,
            fakes,
            leaves,
            dict.fromkeys(made.buckets, TEMPORARIES),
            SPLITS,
            libcuda=cuda.path,
            memory=self.memory,
        )
        self.deliveries = Deliveries()
        self.lanes.start(self.deliveries.put)

    def executable(self, key, num_weights):
        made, executables = model()
        executable = executables[key]

        def run(flat):
            arguments, _ = jax.tree.unflatten(executable.in_tree, flat)
            return [np.asarray(each) for each in jax.tree.leaves(executable(*arguments))]

        return FakeExecutable(
            self.memory,
            run,
            executable.out_info,
            donated=slice(num_weights, num_weights + made.layout.num_arrays + 1),
            temp_bytes=TEMPORARIES,
            clashes=self.clashes,
        )


@pytest.fixture
def gpu():
    with a_gpu() as cuda:
        gpu = ModelGpu(cuda)
        yield gpu
        gpu.lanes.close()


def test_requests_get_the_tokens_that_they_get_alone_whatever_runs_beside_them(gpu):
    assert gpu.rung is Rung.GRAPHS
    counts, same = Counter(), []
    for seed in PLANS:
        plan = Plan(seed, gpu.lanes, gpu.deliveries)
        plan.scheduler = type(plan.scheduler)(plan.limits, Anywhere(plan.dice))
        plan.play()
        counts += plan.happened()
        same += [asked.check() for asked in plan.asked.values()]
    assert gpu.clashes == []
    assert len(same) > 4 * len(PLANS)
    assert sum(same) > 0.95 * len(same)
    wanted = {"handovers": 20, "stops": 5, "aborts": 2, "prefix_hits": 20}
    assert {what: counts[what] for what, least in wanted.items() if counts[what] < least} == {}
