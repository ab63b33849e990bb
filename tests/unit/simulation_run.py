"""Small random simulations on a small device, and what two of them must have alike."""

import random
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
from small_profiles import small_hardware, small_model

from duetjax.config import EngineConfig, PolicyName
from duetjax.planning import make_policy
from duetjax.policy.duet import Disaggregated
from duetjax.policy.flights import Pace
from duetjax.policy.foresight import Foresight
from duetjax.policy.launch import Program
from duetjax.policy.limits import SchedulerLimits, decode_buckets
from duetjax.policy.profiles import Cost
from duetjax.policy.scheduler import Scheduler
from duetjax.sim.ledger import Objectives
from duetjax.sim.simulation import Result, simulate
from duetjax.sim.truth import Transfer, Truth
from duetjax.sim.workload import Arrival

DISAGGREGATED = "disaggregated"
POLICIES = (*PolicyName, DISAGGREGATED)
SEEDS = range(40)
DECODE, PREFILL = Program.DECODE, Program.PREFILL
_MODEL = small_model(
    costs={
        (DECODE, 2): Cost(4e6, 3e6),
        (DECODE, 8): Cost(9e6, 3.3e6),
        (PREFILL, 16): Cost(4e7, 5e6),
        (PREFILL, 64): Cost(1.5e8, 7e6),
    }
)
_TICK = 1 / 64
"""Seconds; sums of it are exact."""


class FixedSteps:
    """Stands for a `Foresight` by which every step takes as long."""

    def __init__(self, ms):
        self.ms = ms

    def step_ms(self, step):
        return self.ms

    def steps_ms(self, step, count):
        return np.full(count, self.ms)


@dataclass(frozen=True)
class Scenario:
    """A simulation to run; step_ms: of every step, None for what small profiles foretell."""

    limits: SchedulerLimits
    workload: tuple[Arrival, ...]
    policy: str = PolicyName.AGGREGATED
    objectives: Objectives = field(default_factory=lambda: Objectives((20.0,)))
    look_ahead: int = 1
    step_ms: float | None = None

    def run(self, **options):
        """The result; see `start`."""
        return self.start(**options)[0]

    def start(self, *, noise=0.0, seed=0, own=None, **options) -> tuple[Result, Scheduler]:
        """The result, and the scheduler as it is then; own: the foresight that it plans by."""
        steps = foresight() if self.step_ms is None else FixedSteps(self.step_ms)
        kind = Transfer if self.policy == DISAGGREGATED and self.step_ms is None else Truth
        truth = kind(steps, noise=noise, seed=seed)
        policy = self._policy(own or foresight())
        scheduler = Scheduler(self.limits, policy, self._pace(own or truth))
        result = simulate(scheduler, truth, self.workload, self.objectives, **options)
        return result, scheduler

    def with_limits(self, **changes):
        """The same with other limits."""
        return replace(self, limits=replace(self.limits, **changes))

    def _pace(self, durations):
        longest_ms = np.inf if self.policy == DISAGGREGATED else None
        return Pace(durations, self.objectives.tbt_slo_ms[0], longest_ms)

    def _policy(self, foresees):
        budget = self.limits.max_num_batched_tokens
        if self.policy == DISAGGREGATED:
            return Disaggregated(budget, 4, self.look_ahead)
        engine = EngineConfig(
            max_num_seqs=self.limits.num_slots,
            max_num_batched_tokens=budget,
            policy=self.policy,
            split=(2, 2),
            look_ahead=self.look_ahead,
        )
        return make_policy(engine, foresees, self.limits)


PLAIN = Scenario(
    SchedulerLimits(
        num_pages=11,
        page_size=4,
        num_slots=2,
        max_model_len=41,
        max_num_batched_tokens=8,
        decode_buckets=(2,),
        prefill_buckets=(8,),
        prefix_caching=False,
    ),
    (Arrival(0.0, 4, 24), Arrival(0.0, 4, 24)),
    step_ms=10.0,
)
"""Two requests, for both of which there are not pages enough to their end."""


def foresight():
    """A new one of the small model on the small device, whose steps take some 10 ms."""
    return Foresight(_MODEL, small_hardware())


@cache
def ran(policy, seed):
    """What comes of a random scenario: the result, and the scheduler afterwards."""
    return scenario(seed, policy).start()


def scenario(seed, policy):
    """Few slots, often few pages, prompts that begin alike, arrivals that often come together.

    In some, steps are equally long and end when requests come.
    """
    draw = random.Random(f"{policy} {seed}")
    slots, page_size = draw.choice((1, 2, 3, 5, 8)), draw.choice((1, 2, 4, 16))
    max_model_len = draw.choice((24, 60, 150, 300))
    longest = -(-(max_model_len - 1) // page_size)
    budget = slots + draw.choice((1, 4, 12, 40, 100))
    limits = SchedulerLimits(
        num_pages=1 + longest + draw.choice((0, 1, 3, longest // 2, slots * longest)),
        page_size=page_size,
        num_slots=slots,
        max_model_len=max_model_len,
        max_num_batched_tokens=budget,
        decode_buckets=decode_buckets(slots),
        prefill_buckets=tuple(sorted({max(1, budget // 4), max(1, budget // 2), budget})),
        prefix_caching=draw.random() < 0.5,
        launches_per_lane=draw.choice((2, 2, 3)),
    )
    slo_ms = draw.choice((5.0, 8.0, 20.0, 100.0))
    is_ticking = draw.random() < 0.3
    return Scenario(
        limits,
        tuple(_arrivals(draw, max_model_len, is_ticking)),
        policy,
        Objectives((slo_ms, slo_ms / 2, slo_ms * 3), draw.choice((None, 100.0))),
        draw.choice((1, 3, 8)),
        1e3 * _TICK if is_ticking else None,
    )


def crowded(seed):
    """A static split with launches of 8 steps, for which rows often have not pages enough."""
    draw = random.Random(seed)
    limits = SchedulerLimits(
        num_pages=draw.randint(7, 9),
        page_size=16,
        num_slots=3,
        max_model_len=97,
        max_num_batched_tokens=8,
        decode_buckets=(4,),
        prefill_buckets=(8,),
    )
    workload, at = [], 0.0
    for _ in range(12):
        at += draw.choice((0.0, draw.uniform(0.1, 0.3)))
        workload.append(Arrival(at, draw.randint(1, 30), draw.randint(4, 60)))
    return Scenario(limits, tuple(workload), PolicyName.STATIC_SPLIT, look_ahead=8)


def _arrivals(draw, max_model_len, is_ticking):
    """Some with prompts that are too long by a token."""
    rate, at = draw.choice((0.5, 5, 20, 60, 200, 1000)), 0.0
    for _ in range(draw.randint(1, 16)):
        if draw.random() < 0.8:
            gap = draw.expovariate(rate)
            at += _TICK * round(gap / _TICK) if is_ticking else gap
        prompt = draw.randint(1, min(max_model_len, draw.choice((5, 40, 200))))
        blocks = draw.choice(((), (), (1,), (2,)))
        yield Arrival(at, prompt, draw.randint(1, draw.choice((2, 40, 200))), blocks)


def outcome(result):
    """All that came of a simulation but how many events it took."""
    ledger, line = result.ledger, result.timeline
    columns = [ledger.first, ledger.last, ledger.tokens, ledger.tpot_ms]
    columns += [ledger.met(n) for n in range(len(ledger.objectives.tbt_slo_ms))]
    return (
        [column.tobytes() for column in columns],
        (ledger.finished, ledger.refused, ledger.finished_at, result.seconds, result.is_whole),
        ledger.tbt_ms,
        (result.stats, result.most_pages),
        (line.at, line.decode_cores, line.k),
    )
