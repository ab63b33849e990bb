"""Requests through the real scheduler onto lanes; and the same launches as a row of calls.

Promise (a) of docs/design.md: the same programs give the same bits, whatever lanes, splits, rungs
and look-ahead they are run by.
"""

import queue
import random
import time
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from duetjax.config import SamplingParams
from duetjax.policy.launch import (
    FinishedStep,
    Lane,
    Launch,
    Program,
    RowFlag,
    Split,
    StepResult,
)
from duetjax.policy.limits import SchedulerLimits
from duetjax.policy.policies import Aggregate, Decision, Duet, Load
from duetjax.policy.request import NewRequest
from duetjax.policy.scheduler import Scheduler
from gpu.bench import PATIENCE_S, Bench
from gpu.lane_rig import Executor, Rig, Serial

KS = (1, 2, 4, 8, 16)
MOST_OUTPUT = 60
MIXED = 2
KINDS = (
    {"temperature": 0.0},
    {"temperature": 0.9, "top_p": 0.95},
    {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.4, "logprobs": 2},
    {"temperature": 0.8, "presence_penalty": 0.7, "top_k": 40},
)


class Deliveries:
    """What an executor delivers, in order, with the moments at which it did."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[float, FinishedStep | BaseException]] = (
            queue.SimpleQueue()
        )

    def put(self, finished: FinishedStep | BaseException) -> None:
        """Takes a step, on whatever thread."""
        self._queue.put((time.perf_counter(), finished))

    def next(self) -> tuple[float, FinishedStep]:
        """The next one; raises what has failed."""
        try:
            moment, finished = self._queue.get(timeout=PATIENCE_S)
        except queue.Empty:
            raise TimeoutError(f"nothing was delivered in {PATIENCE_S:.0f} s") from None
        if isinstance(finished, BaseException):
            raise finished
        return moment, finished


class EveryK:
    """A policy: one split whenever both sides have work, and the look-ahead used least so far.

    Before that, some launches of both kinds of rows on the whole device. taken: how often each
    look-ahead has been launched on a lane. mixed: launches of prompts and decoding rows so far.
    """

    def __init__(self, split: Split, sizes: tuple[int, ...], dice: random.Random) -> None:
        self._split, self._sizes, self._dice = split, sizes, dice
        self.taken: Counter[tuple[Lane, int]] = Counter()
        self.mixed = 0

    def decide(self, load: Load) -> Decision:
        """See `policies.Policy`."""
        dice, budget = self._dice, self._dice.choice(self._sizes)
        if load.rows and load.prompt_tokens and self.mixed >= MIXED and dice.random() < 0.9:
            return Duet(self._split, self._rarest(Lane.DECODE), budget)
        decodes = not load.prompt_tokens or self.mixed < MIXED or dice.random() < 0.8
        budget = min(budget + load.rows, self._sizes[-1])
        return Aggregate(budget, decodes=decodes, k=self._rarest(Lane.WHOLE))

    def _rarest(self, lane: Lane) -> int:
        return min(KS, key=lambda k: self.taken[lane, k])


@dataclass
class Played:
    """Launches and their steps. covered: what there was to see, by split, and how often."""

    launches: list[Launch] = field(default_factory=list)
    steps: list[FinishedStep] = field(default_factory=list)
    covered: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Play:
    """Requests of one split, drawn from a seed. requests: how many."""

    rig: Rig
    executor: Executor
    deliveries: Deliveries
    requests: int

    def on(self, split: Split, seed: int, first: int) -> Played:
        """Plays until all have ended, tickets being counted from `first`."""
        dice, played, now = random.Random(seed), Played(), 0.0
        policy = EveryK(split, self._sizes(), dice)
        scheduler = Scheduler(self._limits(), policy)
        coming = [self._request(f"{seed}.{i}", dice) for i in range(self.requests)]
        while coming or scheduler.has_work or scheduler.num_in_flight:
            while coming and dice.random() < 0.7:
                scheduler.add(coming.pop(), now)
            for launch in scheduler.plan(now):
                policy.taken[launch.lane, launch.k] += int(launch.program is Program.DECODE)
                policy.mixed += int(0 in launch.counts and any(launch.counts))
                _count(played.covered, launch)
                own = _renumbered(launch, first)
                played.launches.append(own)
                self.executor.submit(own)
            if scheduler.num_in_flight:
                _, finished = self.deliveries.next()
                played.steps.append(finished)
                told = FinishedStep(finished.ticket - first, finished.step, finished.result)
                now += 1.0
                scheduler.commit(told, now)
        return played

    def _sizes(self) -> tuple[int, ...]:
        """Budgets of prefill launches: half the smallest program, so that prompts take several."""
        small, large = self.rig.programs.buckets.prefill[0], self.rig.programs.buckets.prefill[-1]
        return (max(2, small // 2), small, large)

    def _limits(self) -> SchedulerLimits:
        rig, buckets = self.rig, self.rig.programs.buckets
        return SchedulerLimits(
            num_pages=rig.num_pages,
            page_size=rig.page_size,
            num_slots=rig.programs.slots.num_slots,
            max_model_len=rig.longest,
            max_num_batched_tokens=buckets.prefill[-1],
            decode_buckets=buckets.decode,
            prefill_buckets=buckets.prefill,
        )

    def _request(self, name: str, dice: random.Random) -> NewRequest:
        vocab, room = self.rig.programs.slots.vocab_size, self.rig.longest
        longest_prompt = max(2, min(room - MOST_OUTPUT, 300))
        prompt = tuple(dice.choices(range(vocab), k=dice.randint(1, longest_prompt)))
        sampling = SamplingParams(seed=dice.getrandbits(62), **dice.choice(KINDS))  # type: ignore[arg-type]
        stop_ids = tuple(dice.sample(range(vocab), k=min(vocab, 16))) if dice.random() < 0.3 else ()
        return NewRequest(name, prompt, dice.randint(4, MOST_OUTPUT), sampling, stop_ids)


def _renumbered(launch: Launch, first: int) -> Launch:
    """With tickets that nobody before has had."""
    fields = {name: getattr(launch, name) for name in Launch.__slots__}
    fields["ticket"] += first
    fields["handovers"] = tuple((slot, ticket + first) for slot, ticket in launch.handovers)
    return Launch(**fields)


def _count(covered: Counter[str], launch: Launch) -> None:
    if launch.program is Program.DECODE:
        covered[f"{launch.lane} k={launch.k}"] += 1
    elif launch.lane is Lane.PREFILL:
        covered["prefill lane"] += 1
    elif 0 in launch.counts and any(launch.counts):
        covered["mixed"] += 1
    else:
        covered["whole prefill"] += 1
    covered["handovers"] += len(launch.handovers)


def compare(bench: Bench, what: str, played: Played, serial: Serial) -> Counter[str]:
    """Runs the launches one after another, and expects the same bits; what was looked at."""
    launches = {launch.ticket: launch for launch in played.launches}
    wanted = {ticket: serial.run(launch) for ticket, launch in launches.items()}
    wrong: Counter[str] = Counter()
    seen: Counter[str] = Counter(steps=len(played.steps))
    examples: list[str] = []
    ids: set[int] = set()
    for finished in played.steps:
        launch, right = launches[finished.ticket], wanted[finished.ticket][finished.step]
        sampled = right.tokens[right.flags & RowFlag.SAMPLED != 0].tolist()
        ids.update(sampled)
        seen["tokens"] += len(sampled)
        seen["not_finite"] += int((right.flags & RowFlag.NON_FINITE != 0).sum())
        parts = _differences(finished.result, right)
        if parts:
            wrong.update(f"{launch.lane} {launch.program} k={launch.k}: {part}" for part in parts)
            if len(examples) < 3:
                examples.append(_told(launch, finished, right))
    missing = sum(launch.k for launch in played.launches) - len(played.steps)
    bench.expect(missing == 0, f"{what}: {missing} steps were not delivered")
    told = f"{what}: differs from plain calls: {dict(wrong)}; e.g. {' | '.join(examples)}"
    bench.expect(not wrong, told)
    bench.expect(seen["not_finite"] == 0, f"{what}: {seen['not_finite']} rows were not finite")
    seen["distinct_tokens"] = len(ids)
    return seen


def _differences(one: StepResult, other: StepResult) -> list[str]:
    parts = {
        "tokens": np.array_equal(one.tokens, other.tokens),
        "flags": np.array_equal(one.flags, other.flags),
        "logprobs": np.array_equal(one.logprobs, other.logprobs, equal_nan=True),
        "top": one.top == other.top,
    }
    return [name for name, same in parts.items() if not same]


def _told(launch: Launch, finished: FinishedStep, right: StepResult) -> str:
    got = finished.result
    rows = np.flatnonzero(
        (got.tokens != right.tokens) | (got.flags != right.flags) | (got.logprobs != right.logprobs)
    )
    row = int(rows[0]) if rows.size else 0
    return (
        f"ticket {finished.ticket} step {finished.step} of {launch.k} on {launch.lane}"
        f" {launch.split} bucket {launch.bucket}: {rows.size} of {len(got.tokens)} rows, row {row}"
        f" (slot {launch.slots[row]}) has token {got.tokens[row]} flags {got.flags[row]} logprob"
        f" {got.logprobs[row]!r}, not {right.tokens[row]} {right.flags[row]}"
        f" {right.logprobs[row]!r}"
    )


def uncovered(seen: Counter[str]) -> list[str]:
    """What plays of a split should have had and had not."""
    wanted = [f"{Lane.DECODE} k={k}" for k in KS] + ["prefill lane", "handovers", "mixed"]
    return [name for name in wanted if not seen[name]]
