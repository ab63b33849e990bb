"""The toy's programs on the double's GPU, launches for them, and what must come out."""

import threading
from dataclasses import replace

import jax
import numpy as np
import toy_programs as toy
from fake_xla import FakeExecutable, FakeMemory, view
from lane_plans import Asked, Deliveries, Fickle, Plan
from lane_programs import prompt_launch

from duetjax.config import SamplingParams
from duetjax.policy.launch import FinishedStep, Lane, Launch, Program, Split
from duetjax.policy.policies import Duet
from duetjax.policy.request import NewRequest
from duetjax.runtime.programs import Upkeep
from duetjax.runtime.rungs import open_lanes

SPLITS = (Split(32, 100), Split(64, 68))
THREADS, MANUAL = 0, 1  # how the double runs what it is given


class Gpu:
    """The toy's programs, recorded on the double's GPU. changes: to each `FakeExecutable`."""

    def __init__(self, cuda, splits=SPLITS, memory=None, **changes):
        self.cuda, self.clashes, self.built = cuda, [], []
        self.memory = memory or FakeMemory(cuda)
        self.executables = {key: self.executable(key, **changes) for key in toy.RUN}
        self.executables[Upkeep.ALLOCATE] = self.allocate
        self.lanes, self.rung = open_lanes(
            toy.PROGRAMS,
            self.executables,
            [self.memory.put(np.zeros(1))],
            toy.TEMPORARIES,
            splits,
            built=lambda *counts: self.built.append(counts),
            libcuda=cuda.path,
            memory=self.memory,
        )
        self.deliveries = Deliveries()

    def executable(self, key, **changes):
        given = {
            "donated": toy.DONATED,
            "temp_bytes": toy.TEMPORARIES[key],
            "clashes": self.clashes,
        }
        return FakeExecutable(self.memory, toy.RUN[key], toy.result(key), **given | changes)

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


def decode_launch(ticket, *slots, lane=Lane.DECODE, **changes):
    """On the first split, where it is not on the whole GPU."""
    bucket = min(each for each in toy.BUCKETS.decode if each >= len(slots))
    split = None if lane is Lane.WHOLE else SPLITS[0]
    return Launch(ticket, Program.DECODE, bucket, slots, **{"lane": lane, "split": split} | changes)


def prefill_launch(ticket, slot, *, lane=Lane.PREFILL, **changes):
    """A slot's whole prompt, which has penalties: it changes every table."""
    sampling = SamplingParams(seed=ticket, presence_penalty=0.5)
    prompt = tuple((7 * slot + i * i) % toy.VOCAB for i in range(20))
    split = None if lane is Lane.WHOLE else SPLITS[0]
    return prompt_launch(ticket, slot, prompt, sampling, **{"lane": lane, "split": split} | changes)


def everything():
    """A decode and a prefill launch on every lane and split, each after those before it."""
    yield from (prefill_launch(slot, slot, lane=Lane.WHOLE) for slot in range(toy.SLOTS))
    yield decode_launch(4, 0, 1, 2, lane=Lane.WHOLE, k=2, wants_top=True)
    for ticket, split in zip((5, 8), SPLITS, strict=True):
        yield decode_launch(ticket, 0, 1, split=split, k=3)
        yield prefill_launch(ticket + 1, 3, split=split)
        yield decode_launch(ticket + 2, 3, split=split, handovers=((3, ticket + 1),))


class Twin:
    """A started GPU, and the same launches one after another."""

    def __init__(self, gpu):
        self.gpu, self.serial, self._wanted = gpu.start(), toy.Serial(), {}

    def submit(self, launch):
        for step, result in enumerate(self.serial.run(launch)):
            self._wanted[launch.ticket, step] = result
        self.gpu.lanes.submit(launch)

    def next(self):
        """The next step that is delivered, which must be right."""
        step = self.gpu.deliveries.next()
        assert step.result == self._wanted.pop((step.ticket, step.step)), step
        return step

    def rest(self):
        """Takes every step in that is still to come; which ones, in order."""
        taken = [self.next() for _ in range(len(self._wanted))]
        return [(each.ticket, each.step) for each in taken]

    def run(self, *launches):
        """One after another, each when the one before it has been taken in."""
        for launch in launches:
            self.submit(launch)
            self.rest()


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


def play(twin, seed, deliveries, num_requests=3):
    """A plan on the device and beside it, where launches run one after another; what happened."""
    plan = ToyPlan(seed, twin, deliveries)
    buckets = toy.BUCKETS
    limits = replace(plan.limits, decode_buckets=buckets.decode, prefill_buckets=buckets.prefill)
    plan.scheduler = type(plan.scheduler)(limits, Anywhere(plan.dice))
    plan.play(num_requests)
    return plan.happened()


def check_state(twin):
    """Everything that slots carry, and their pages, is as it would be."""
    gpu, serial, slots = twin.gpu, twin.serial, slice(toy.SLOTS)
    held = gpu.lanes._recordings
    assert np.array_equal(gpu.pages[1:], serial.kv[1:])
    assert np.array_equal(gpu.content(held.counts, serial.counts)[slots], serial.counts[slots])
    for name, table in serial.tables.arrays().items():
        assert np.array_equal(gpu.content(held.tables[name], table), table), name
    lanes = [gpu.content(each, serial.progress)[slots] for each in held.progress.values()]
    last_moved_by = [(rows == serial.progress[slots]).all(1) for rows in lanes]
    assert np.logical_or(*last_moved_by).all()


def delivered(gpu):
    """What has been delivered and not taken."""
    while not gpu.deliveries.is_empty():
        one = gpu.deliveries.take()
        yield (one.ticket, one.step) if isinstance(one, FinishedStep) else type(one)


def closing(gpu):
    """Closes the lanes in a thread."""
    thread = threading.Thread(target=gpu.lanes.close, daemon=True)
    thread.start()
    return thread
