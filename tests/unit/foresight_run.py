"""Policies that look ahead, on a simulated device whose times are not quite what they foresee."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Self

import numpy as np

from duetjax.config import SamplingParams
from duetjax.policy.calibration import Calibration
from duetjax.policy.duet import AggregatedSlo, Disaggregated, DuetPolicy, Sizes
from duetjax.policy.durations import Step
from duetjax.policy.flights import Pace
from duetjax.policy.foresight import Foresight
from duetjax.policy.launch import Lane, Launch, Program, Split
from duetjax.policy.limits import SchedulerLimits
from duetjax.policy.policies import Aggregated, Policy, StaticSplit
from duetjax.policy.profiles import HardwareProfile, ModelProfile
from duetjax.policy.request import NewRequest
from duetjax.policy.roofline import Roofline
from duetjax.policy.scheduler import Scheduler
from duetjax.policy.stats import Stats
from duetjax.profile_files import Kind, read_hardware_profile, read_model_profile, shipped_file
from duetjax.sim.clock import VirtualClock
from duetjax.sim.executor import SimulatedExecutor

type Trace = list[tuple[float, NewRequest]]
"""(when, request), in order."""

DECODE_BUCKETS, PREFILL_BUCKETS = (2, 4, 8, 16, 32, 64), (128, 256, 512, 1024, 2048, 4096, 8192)
BUDGET = PREFILL_BUCKETS[-1]
SIZES = Sizes(BUDGET, DECODE_BUCKETS, PREFILL_BUCKETS)
SLO_MS = 40.0
"""Decoding steps of these sizes take some 5 ms, prompts of a few thousand tokens 100 to 200 ms."""


@cache
def profiles() -> tuple[ModelProfile, HardwareProfile]:
    """An 8B model on an H200, as shipped."""
    return (
        read_model_profile(shipped_file(Kind.MODEL, "llama-3.1-8b")),
        read_hardware_profile(shipped_file(Kind.HARDWARE, "h200-sxm")),
    )


def foresight() -> Foresight:
    """One that has measured nothing yet, so takes everything for 1.3 times the roofline."""
    return Foresight(*profiles())


def calibrated(factor: float) -> Foresight:
    """One that knows that everything takes `factor` times as long as the roofline says."""
    model, hardware = profiles()
    calibration = Calibration(model.model, hardware.name)
    for _ in range(64):
        for lane in Lane:
            for program in Program:
                calibration.observe(lane, program, 1.0, factor)
    return Foresight(model, hardware, calibration)


class Truth:
    """What launches really take: `factor(n)` times what the roofline says of launch number n.

    last_ms: of a step of the last launch.
    """

    median_error, is_trusted = 0.0, True

    def __init__(self, factor: Callable[[int], float]) -> None:
        self.last_ms = 0.0
        model, self._hardware = profiles()
        self._roofline = Roofline(model, self._hardware)
        self._factor = factor
        self._launches = 0

    def step_ms(self, step: Step) -> float:
        """Asked once for each launch, when it is submitted."""
        cores, lane = self._hardware.cores, None
        if step.split is not None:
            lane = step.lane
            cores = step.split.decode if lane is Lane.DECODE else step.split.prefill
        raw = self._roofline.step_ms(
            step.program, step.bucket, step.new, step.cached, [cores], lane
        )
        self.last_ms = float(raw[0]) * self._factor(self._launches)
        self._launches += 1
        return self.last_ms

    def observe(self, step: Step, measured_ms: float) -> None:
        """It knows."""


def steadily(factor: float) -> Callable[[int], float]:
    """The same factor for every launch."""
    return lambda launch: factor


AS_FORESEEN = steadily(1.3)
"""The factor that a calibration starts with."""


def noisily(factor: Callable[[int], float] = AS_FORESEEN, seed: int = 0) -> Callable[[int], float]:
    """Launch n takes about factor(n) times what the roofline says, with a deviation of 20 %."""
    draw = random.Random(seed)
    return lambda launch: factor(launch) * draw.lognormvariate(0.0, 0.2)


def policy(kind: str, foresees: Foresight) -> Policy:
    """A policy by its name, with `foresees` to look ahead by."""
    cores = foresees.hardware.cores
    return {
        "aggregated": lambda: Aggregated(BUDGET),
        "aggregated-slo": lambda: AggregatedSlo(foresees, SIZES),
        "static": lambda: StaticSplit(BUDGET, Split(48, cores - 48), 8),
        "duet": lambda: DuetPolicy(foresees, SIZES),
        "disaggregated": lambda: Disaggregated(BUDGET, cores, 4),
    }[kind]()


def request(
    name: str, prompt_len: int, max_tokens: int, *, tbt_slo_ms: float | None = None
) -> NewRequest:
    """One whose prompt begins like no other's."""
    first = int.from_bytes(name.encode()) % (2**31 - 1)
    prompt = (first, *range(1, prompt_len))
    return NewRequest(name, prompt, max_tokens, SamplingParams(seed=0), tbt_slo_ms=tbt_slo_ms)


def arrivals(count: int = 40, *, rate: float = 5.0, seed: int = 0) -> Trace:
    """Poisson; prompts of 500 to 8,000 tokens and outputs of 60 to 200, drawn evenly."""
    draw, when, made = random.Random(seed), 0.0, []
    for number in range(count):
        when += draw.expovariate(rate)
        sizes = draw.randint(500, 8000), draw.randint(60, 200)
        made.append((when, request(f"r{number}", *sizes)))
    return made


@dataclass(frozen=True)
class Gap:
    """Between two tokens of a request. ended_by: ticket of the launch that brought the second.

    is_first: after the prompt's own token.
    """

    id: str
    ms: float
    ended_by: int
    is_first: bool


class Run:
    """A scheduler and a simulated device in virtual time; `run` a trace, then look.

    took_ms, trusted: of each launch, by ticket; the latter whether predictions were when it was
    planned. ttft_ms: by request. num_splits: most splits among launches in flight at once.
    """

    def __init__(self, policy: Policy, truth: Truth, pace: Pace, **limits: int) -> None:
        bounds = {
            "num_pages": 8192,
            "page_size": 64,
            "num_slots": 64,
            "max_model_len": 16384,
            "max_num_batched_tokens": BUDGET,
            "decode_buckets": DECODE_BUCKETS,
            "prefill_buckets": PREFILL_BUCKETS,
        }
        self.scheduler = Scheduler(SchedulerLimits(**bounds | limits), policy, pace)
        self.clock = VirtualClock()
        self.executor = SimulatedExecutor(truth, self.clock)
        self.launches: list[Launch] = []
        self.took_ms: list[float] = []
        self.trusted: list[bool] = []
        self.gaps: list[Gap] = []
        self.ttft_ms: dict[str, float] = {}
        self.num_splits = 0
        self._truth = truth
        self._pace = pace
        self._in_flight: dict[int, Launch] = {}
        self._added: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self._decodes: set[str] = set()

    @property
    def stats(self) -> Stats:
        """The scheduler's."""
        return self.scheduler.stats()

    @property
    def decisions(self) -> dict[str, int]:
        """How often the policy decided what."""
        return {str(why): count for why, count in self.stats.decisions}

    @property
    def lanes(self) -> set[Lane]:
        """Those that launches ran on."""
        return {launch.lane for launch in self.launches}

    def share_over(self, slo_ms: float, launches: range = range(10**9)) -> float:
        """Of the gaps that these launches ended, how many were longer."""
        return float(np.mean([gap.ms > slo_ms for gap in self.gaps if gap.ended_by in launches]))

    def run(self, trace: Trace, watch: Callable[[Self], None] = lambda run: None) -> Self:
        """Every request to its end; whenever something was planned for, `watch` may look."""
        coming = list(reversed(trace))
        while coming or self.scheduler.has_work or self.scheduler.num_in_flight:
            next_end = self.executor.next_end
            if coming and (next_end is None or coming[-1][0] <= next_end):
                when, new = coming.pop()
                self.clock.move_to(when)
                self._added[new.id] = when
                self.scheduler.add(new, when)
            else:
                self._finish()
            self._plan()
            watch(self)
        assert self.ttft_ms.keys() == self._added.keys(), "somebody got nothing"
        self.scheduler.check_integrity()
        return self

    def _plan(self) -> None:
        for launch in self.scheduler.plan(self.clock.now()):
            self.executor.submit(launch)
            self.launches.append(launch)
            self.took_ms.append(launch.k * self._truth.last_ms)
            durations = self._pace.durations
            self.trusted.append(durations is None or durations.is_trusted)
            self._in_flight[launch.ticket] = launch
        splits = {launch.split for launch in self._in_flight.values()}
        self.num_splits = max(self.num_splits, len(splits))

    def _finish(self) -> None:
        for step in self.executor.advance():
            now = self.clock.now()
            for name in self.scheduler.commit(step, now).ids:
                self._take(name, step.ticket, now)
            if step.step == self._in_flight[step.ticket].k - 1:
                del self._in_flight[step.ticket]

    def _take(self, name: str, ticket: int, now: float) -> None:
        if name in self._last:
            ms, is_first = 1e3 * (now - self._last[name]), name not in self._decodes
            self._decodes.add(name)
            self.gaps.append(Gap(name, ms, ticket, is_first))
        else:
            self.ttft_ms[name] = 1e3 * (now - self._added[name])
        self._last[name] = now


def simulate(
    kind: str,
    factor: Callable[[int], float],
    *,
    slo_ms: float = SLO_MS,
    foresees: Foresight | None = None,
    trace: Trace | None = None,
) -> Run:
    """A policy under a trace, launch number n being `factor(n)` times as slow as the roofline."""
    foresees = foresees or foresight()
    run = Run(policy(kind, foresees), Truth(factor), Pace(foresees, tbt_slo_ms=slo_ms))
    return run.run(arrivals() if trace is None else trace)
