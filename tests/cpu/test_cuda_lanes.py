"""Recorded programs on both lanes of a GPU, on the double of libcuda: the order that one gives."""

import random
import shutil
import time
from collections import Counter
from dataclasses import replace

import fake_cuda
import jax
import numpy as np
import pytest
import toy_programs as toy
from fake_cuda import FakeCuda
from lane_plans import PATIENCE, Asked, Deliveries, Fickle, Plan

from duetjax.config import SamplingParams
from duetjax.policy.launch import Lane, Split
from duetjax.policy.policies import Duet
from duetjax.policy.request import NewRequest
from duetjax.runtime.rungs import open_lanes

_launcher = pytest.importorskip("duetjax._launcher", reason="no C compiler when installed")
if shutil.which("gcc") is None:
    pytest.skip("no C compiler", allow_module_level=True)

from fake_xla import Clashes, FakeExecutable, FakeMemory, view  # noqa: E402

SPLITS = (Split(32, 100), Split(64, 68))
MANUAL = 1


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return fake_cuda.build(tmp_path_factory.mktemp("fake"))


@pytest.fixture
def cuda(library):
    fake = FakeCuda(library)
    yield fake
    fake.close()


class Gpu:
    """The toy's programs, recorded on the double's GPU."""

    def __init__(self, cuda, splits=SPLITS, **memory):
        self.cuda, self.clashes = cuda, Clashes()
        self.memory = FakeMemory(cuda, **memory)
        self.executables = {key: self.executable(key) for key in toy.RUN}
        self.executables[toy.ALLOCATE] = self.allocate
        self.lanes, self.rung = open_lanes(
            toy.PROGRAMS,
            self.executables,
            [self.memory.put(np.zeros(1))],
            toy.TEMPORARIES,
            splits,
            libcuda=cuda.path,
            memory=self.memory,
        )
        self.deliveries = Deliveries()

    def executable(self, key):
        return FakeExecutable(
            self.memory,
            toy.RUN[key],
            (toy.STATE, toy.BLOCK),
            first_donated=toy.FIRST_DONATED,
            num_donated=toy.NUM_DONATED,
            temp_bytes=toy.TEMPORARIES[key],
            clashes=self.clashes,
        )

    def allocate(self):
        made = jax.tree.map(
            lambda leaf: self.memory.put(np.zeros(leaf.shape, leaf.dtype)), toy.STATE
        )
        self.pages = made.kv[0].view()
        return made

    def start(self):
        self.lanes.start(self.deliveries.put)
        return self

    def content(self, table, like):
        """Of an array that the lanes know the address of."""
        return view(self.cuda, table.address, like.shape, like.dtype)


class Anywhere(Fickle):
    """On any split, too."""

    def decide(self, load):
        decision = super().decide(load)
        if isinstance(decision, Duet):
            return replace(decision, split=self._dice.choice(SPLITS))
        return decision


class ToyPlan(Plan):
    """Requests whose answers only the serial toy knows."""

    def request(self, name):
        dice = self.dice
        prompt = tuple(dice.choices(range(toy.VOCAB), k=dice.randint(1, 50)))
        penalties = {"presence_penalty": 0.5} if dice.random() < 0.4 else {}
        new = NewRequest(
            name,
            prompt,
            dice.randint(1, 30),
            SamplingParams(
                seed=dice.getrandbits(62), logprobs=dice.choice((None, None, 2)), **penalties
            ),
            tuple(dice.sample(range(toy.VOCAB), k=dice.choice((0, 1, 3)))),
        )
        return Asked(new, None)


class Interleaved:
    """What the device delivers, in manual mode: operations run while the test waits, in an order
    drawn from a seed.
    """

    def __init__(self, gpu, seed):
        self._gpu, self._dice = gpu, random.Random(seed)
        self.steps = []

    def next(self):
        until = time.monotonic() + PATIENCE
        while self._gpu.deliveries.is_empty():
            if not self._gpu.cuda.library.fake_step(self._dice.getrandbits(60)):
                assert time.monotonic() < until, "nothing is delivered"
                time.sleep(0)
        finished = self._gpu.deliveries.next()
        self.steps.append(finished)
        return finished


def play(gpu, oracle, seed, num_requests=3):
    """A plan on the device, then the same launches one after another; what happened."""
    interleaved = Interleaved(gpu, seed)
    plan = ToyPlan(seed, gpu.lanes, interleaved)
    plan.scheduler = type(plan.scheduler)(plan.limits, Anywhere(plan.dice))
    plan.play(num_requests)
    wanted = {launch.ticket: oracle.run(launch) for launch in plan.launches}
    assert len(interleaved.steps) == sum(launch.k for launch in plan.launches)
    for finished in interleaved.steps:
        assert finished.result == wanted[finished.ticket][finished.step], (seed, finished)
    return plan.happened()


def check_state(gpu, oracle):
    """Everything that slots carry, and their pages, is as it would be."""
    held, slots = gpu.lanes._recordings, slice(toy.SLOTS)
    assert np.array_equal(gpu.pages[1:], oracle.kv[1:])
    assert np.array_equal(gpu.content(held.counts, oracle.counts)[slots], oracle.counts[slots])
    for name, table in oracle.tables.arrays().items():
        assert np.array_equal(gpu.content(held.tables[name], table), table), name
    lanes = [gpu.content(each, oracle.progress)[slots] for each in held.progress.values()]
    last_moved_by = [(rows == oracle.progress[slots]).all(1) for rows in lanes]
    assert np.logical_or(*last_moved_by).all()


@pytest.fixture
def gpu(cuda):
    gpu = Gpu(cuda).start()
    yield gpu
    cuda.library.fake_mode(0)
    gpu.lanes.close()


def test_a_thousand_interleavings_end_where_one_launch_after_another_ends(gpu):
    gpu.cuda.library.fake_mode(MANUAL)
    oracle, counts = toy.Serial(), Counter()
    for seed in range(1000):
        counts += play(gpu, oracle, seed)
        check_state(gpu, oracle)
    assert gpu.clashes.found == []
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
