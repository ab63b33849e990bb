"""What scheduling costs per step with every slot taken and a thousand requests waiting.

Runs the scheduler on the simulated device in virtual time: 256 requests run, 1,000 wait, prompts
have about 1,000 tokens, half of them share their first half with others. Whoever ends is replaced
by a new arrival. Two loads: `steady`, with outputs so long that hardly anybody comes or goes, and
`turnover`, with outputs of about 200 tokens, where in most steps somebody ends and somebody is
admitted. Times what the engine thread does for a finished step: commit, then plan. Durations are
invented so that prefill keeps up with decode and the slots stay full. Loads no jax. Last line: one
JSON document.

    python benchmarks/policy.py [--steps 1000] [--warmup 600] [--repeats 1]

On a machine that others use, --repeats runs the same steps several times, each counting with its
shortest time: the scheduler is deterministic, so what differs is the others' doing.
"""

import argparse
import gc
import json
import os
import platform
import random
import time
from dataclasses import dataclass, field
from itertools import product

import numpy as np
from checkout import commit

from duetjax.config import SamplingParams
from duetjax.policy.durations import DurationTable
from duetjax.policy.flights import Pace
from duetjax.policy.launch import Launch, Program, Split
from duetjax.policy.limits import SchedulerLimits
from duetjax.policy.policies import Aggregated, Policy, StaticSplit
from duetjax.policy.request import NewRequest, StepOutputs
from duetjax.policy.scheduler import Scheduler
from duetjax.sim.clock import VirtualClock
from duetjax.sim.executor import SimulatedExecutor

RUNNING, WAITING = 256, 1000
BUDGET, PAGE_SIZE, NUM_PAGES = 2048, 64, 32_768
DECODE = (2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256)
PREFILL = (128, 256, 512, 1024, 2048, 4096, 8192)
SPLIT = Split(decode=48, prefill=84)
GOAL_MEDIAN_US, GOAL_P99_US = 300, 1000

LIMITS = SchedulerLimits(
    num_pages=NUM_PAGES,
    page_size=PAGE_SIZE,
    num_slots=RUNNING,
    max_model_len=8192,
    max_num_batched_tokens=BUDGET,
    decode_buckets=DECODE,
    prefill_buckets=PREFILL,
)
DURATIONS = DurationTable(
    {(split, Program.DECODE, rows): 20.0 for split, rows in product((None, SPLIT), DECODE)}
    | {(split, Program.PREFILL, n): 5 + n / 100 for split, n in product((None, SPLIT), PREFILL)}
)
LOADS = {"steady": (4000, 6000), "turnover": (100, 300)}  # tokens of an output
POLICIES: dict[str, Policy] = {
    "aggregated": Aggregated(BUDGET),
    "static-split": StaticSplit(BUDGET, SPLIT, k=8),
}


@dataclass
class Measured:
    """Seconds per step, and what else happened in how many of them."""

    plan: list[float] = field(default_factory=list)
    commit: list[float] = field(default_factory=list)
    running: list[int] = field(default_factory=list)
    prompts: int = 0
    admitting: int = 0
    finishing: int = 0
    eventful: int = 0

    def add(
        self, times: tuple[float, float], launches: tuple[Launch, ...], outputs: StepOutputs
    ) -> None:
        """Takes in a step: seconds of its commit and plan, what was planned, what came out."""
        self.commit.append(times[0])
        self.plan.append(times[1])
        admits, finishes = any(launch.admitted for launch in launches), bool(outputs.finished)
        self.prompts += any(launch.program is Program.PREFILL for launch in launches)
        self.admitting += admits
        self.finishing += finishes
        self.eventful += admits or finishes

    def take_shorter(self, again: "Measured") -> None:
        """Keeps the shorter time of each step, the same steps having been measured again."""
        self.plan = list(map(min, self.plan, again.plan))
        self.commit = list(map(min, self.commit, again.commit))

    def facts(self) -> dict[str, object]:
        """What there is to say, times in microseconds."""
        both = [sum(pair) for pair in zip(self.plan, self.commit, strict=True)]
        columns = {"plan": self.plan, "commit": self.commit, "both": both}
        return {
            f"{name}_us": {
                "median": round(1e6 * float(np.median(seconds))),
                "p99": round(1e6 * float(np.percentile(seconds, 99))),
            }
            for name, seconds in columns.items()
        } | {
            "steps": len(both),
            "planned_prompts": self.prompts,
            "admitted": self.admitting,
            "finished": self.finishing,
            "admitted_or_finished": self.eventful,
            "median_running": int(np.median(self.running)),
        }


class Arrivals:
    """Requests without end, the same ones for every policy."""

    def __init__(self, output: tuple[int, int]) -> None:
        self._output = output
        self._draw = random.Random(0)
        self._tokens = np.random.default_rng(0)
        self._shared = [self._ids(500) for _ in range(8)]
        self._count = 0

    def _ids(self, count: int) -> tuple[int, ...]:
        return tuple(self._tokens.integers(0, 128_000, count).tolist())

    def next(self) -> NewRequest:
        """The next one."""
        self._count += 1
        begin = self._draw.choice(self._shared) if self._draw.random() < 0.5 else self._ids(500)
        prompt = begin + self._ids(self._draw.randint(250, 750))
        sampling = SamplingParams(temperature=0.0, seed=0)
        return NewRequest(f"r{self._count}", prompt, self._draw.randint(*self._output), sampling)


def measure(policy: Policy, load: str, warmup: int, steps: int) -> Measured:
    """Times `steps` steps after `warmup` of them."""
    arrivals, measured = Arrivals(LOADS[load]), Measured()
    scheduler = Scheduler(LIMITS, policy, Pace(DURATIONS))
    clock = VirtualClock()
    executor = SimulatedExecutor(DURATIONS, clock)
    for _ in range(RUNNING + WAITING):
        scheduler.add(arrivals.next(), clock.now())
    for launch in scheduler.plan(clock.now()):
        executor.submit(launch)
    gc.collect()
    gc.freeze()  # as the server does when it has loaded everything
    taken = 0
    while taken < warmup + steps:
        for finished in executor.advance():
            now = clock.now()
            began = time.perf_counter()
            outputs = scheduler.commit(finished, now)
            committed = time.perf_counter()
            launches = scheduler.plan(now)
            planned = time.perf_counter()
            taken += 1
            if taken > warmup:
                times = (committed - began, planned - committed)
                measured.add(times, launches, outputs)
                measured.running.append(scheduler.stats().running)
            for launch in launches:
                executor.submit(launch)
            for _ in outputs.finished:
                scheduler.add(arrivals.next(), now)
    return measured


def main() -> None:
    """Prints a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--warmup", type=int, default=600)
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    load_average = os.getloadavg()[0]
    found = {}
    for (name, policy), load in product(POLICIES.items(), LOADS):
        measured = measure(policy, load, args.warmup, args.steps)
        for _ in range(args.repeats - 1):
            measured.take_shorter(measure(policy, load, args.warmup, args.steps))
        found[f"{name}, {load}"] = measured.facts()
    print(f"microseconds per step, {RUNNING} slots, {WAITING} waiting, pages of {PAGE_SIZE} tokens")
    print(f"{'':14}" + "".join(f"{name:>24}" for name in found))
    for name in ("plan_us", "commit_us", "both_us"):
        cells = (facts[name] for facts in found.values())
        row = "".join(f"{cell['median']:15} p99{cell['p99']:6}" for cell in cells)
        print(f"{name:14}{row}")
    for name in list(next(iter(found.values())))[3:]:
        print(f"{name:21}" + "".join(f"{facts[name]:8}{'':16}" for facts in found.values()))
    both = [facts["both_us"] for name, facts in found.items() if name.endswith("steady")]
    result = {
        "benchmark": "policy",
        "loads": found,
        "goal_us": {"median": GOAL_MEDIAN_US, "p99": GOAL_P99_US},
        "reached_when_steady": all(
            b["median"] <= GOAL_MEDIAN_US and b["p99"] <= GOAL_P99_US for b in both
        ),
        "repeats": args.repeats,
        "running": RUNNING,
        "waiting": WAITING,
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load_average": round(load_average, 2),
        "python": platform.python_version(),
        "commit": commit(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
