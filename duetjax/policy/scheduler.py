"""Decides what every launch runs, and takes in what became of it.

Knows numbers only: token ids, slots, page numbers, and `now` as it is told. It does not know
what a token means, what a device does with a launch, or who waits for the output.
"""

from collections import Counter
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from duetjax.config import InvalidRequest
from duetjax.policy.columns import Batch, Chunk, Columns
from duetjax.policy.durations import Durations, Step
from duetjax.policy.launch import FinishedStep, Lane, Launch, Program, Split, Ticket
from duetjax.policy.limits import SchedulerLimits
from duetjax.policy.policies import Aggregate, Aggregated, Details, Duet, Load, Policy
from duetjax.policy.queue import rank
from duetjax.policy.request import NewRequest, Request, StepOutputs
from duetjax.policy.results import Results
from duetjax.policy.roster import Roster, slot_of

_NOBODY = Batch()


@dataclass(frozen=True, slots=True)
class Pace:
    """How long launches may take. durations: who foretells steps; None where nobody does.

    tbt_slo_ms: objective for the time between tokens of requests that bring none.
    max_prefill_launch_ms: beside decode; None is 4 x the tightest objective of what decodes.
    """

    durations: Durations | None = None
    tbt_slo_ms: float = 50.0
    max_prefill_launch_ms: float | None = None


@dataclass(frozen=True, slots=True)
class Stats:
    """The scheduler at one moment: gauges, then counters since the start.

    running: requests with a slot. pages_total: usable pages, the dummy left out; those not named
    are held. preempted_tokens: computed KV that preemption threw away. prompt_tokens: of prompts
    computed to their end, each counted once. prefix_queries, prefix_hits: tokens of admitted
    requests, and those found in the prefix cache. steps: finished. busy_seconds: with a launch
    in flight. decisions: of the policy, (why, how often). predicted_ttft_ms: of a short prompt that
    came now, if it finds a slot; None before the first launch foretold. prediction_error: `Durations`', None
    where nobody foretells; predictions_trusted goes with it.
    """

    running: int
    waiting: int
    pages_total: int
    pages_free: int
    pages_cached: int
    pages_quarantined: int
    preemptions: int
    preempted_tokens: int
    prompt_tokens: int
    generation_tokens: int
    prefix_queries: int
    prefix_hits: int
    steps: int
    busy_seconds: float
    decisions: tuple[tuple[str, int], ...]
    predicted_ttft_ms: float | None
    prediction_error: float | None
    predictions_trusted: bool

    @property
    def pages_held(self) -> int:
        """Pages of running requests, shared ones counted once."""
        return self.pages_total - self.pages_free - self.pages_cached - self.pages_quarantined


@dataclass(slots=True, eq=False)
class _Flight:
    """A launch that has not completed: its rows are those of `batch`, then one per chunk.

    step: what it was foretold by. began: when it was planned.
    """

    launch: Launch
    batch: Batch
    chunks: tuple[Chunk, ...]
    step: Step | None
    began: float
    next_step: int = 0


@dataclass(slots=True)
class _Lanes:
    """Launches in flight per lane, when each last ended one, and the episode if there is one."""

    depth: dict[Lane, int] = field(default_factory=lambda: dict.fromkeys(Lane, 0))
    ended: dict[Lane, float] = field(default_factory=lambda: dict.fromkeys(Lane, 0.0))
    episode: Duet | None = None

    @property
    def are_split(self) -> bool:
        return bool(self.depth[Lane.PREFILL] or self.depth[Lane.DECODE])


class Scheduler:
    """Continuous batching: `add` and `abort` at any time, `plan`, run, `commit`, repeat.

    Launches are planned ahead of results: up to two per lane are in flight, decoding rows count
    with the steps that are in flight, and whoever ends meanwhile is skipped by the device. Whatever
    decodes comes first, then prompts in order of rank (`queue.rank`).

    While prefill launches run on one side of a split, an episode, the decode lane is planned,
    finished and planned again beside them; `whole` waits for both lanes to be empty.

    Deterministic, a prefill launch is one chunk of one prompt and has no decoding rows, and prefill
    and decode alternate: where a prompt is cut and what it is computed with depend on nobody else.

    The same calls give the same launches.
    """

    def __init__(
        self, limits: SchedulerLimits, policy: Policy | None = None, pace: Pace | None = None
    ) -> None:
        self.limits = limits
        self._policy = policy or Aggregated(limits.max_num_batched_tokens)
        self._pace = pace or Pace()
        self._flights: dict[Ticket, _Flight] = {}
        self._lanes = _Lanes()
        self._roster = Roster(limits, self._flights)
        self._results = Results(self._roster)
        self._tickets, self._sequence = count(), count()
        self._prefilled_last = False
        self._ms_per_token: float | None = None
        self._decisions: Counter[str] = Counter()
        self._steps = 0
        self._now = self._busy_since = self._busy_seconds = 0.0

    @property
    def has_work(self) -> bool:
        """Whether any request is live."""
        return bool(self._roster.live)

    @property
    def num_in_flight(self) -> int:
        """Launches planned and not completed."""
        return len(self._flights)

    def add(self, new: NewRequest, now: float) -> None:
        """Queues a request; raises `InvalidRequest` if it can never fit or its id is in use."""
        self.limits.check(new)
        if new.id in self._roster.live:
            raise InvalidRequest(f"request id {new.id!r} is already in use; choose another")
        place = rank(new, now, next(self._sequence))
        self._roster.add(Request(new, place, known=np.array(new.prompt, np.int32)))

    def abort(self, request_id: str) -> bool:
        """Ends a request without output; False if it is not live (unknown or finished).

        Launches in flight run on, and what they sample for it is dropped.
        """
        request = self._roster.live.get(request_id)
        if request is None:
            return False
        self._roster.end(request)
        return True

    def stats(self) -> Stats:
        """Gauges now and counters since the start."""
        roster, results, durations = self._roster, self._results, self._pace.durations
        return Stats(
            running=roster.num_running,
            waiting=len(roster.queue),
            pages_total=roster.pool.num_usable,
            pages_free=roster.pool.num_free,
            pages_cached=roster.pool.cache.num_idle,
            pages_quarantined=roster.pool.num_quarantined,
            preemptions=roster.preemptions,
            preempted_tokens=roster.preempted_tokens,
            prompt_tokens=results.prompt_tokens,
            generation_tokens=results.generation_tokens,
            prefix_queries=roster.prefix_queries,
            prefix_hits=roster.prefix_hits,
            steps=self._steps,
            busy_seconds=self._busy_seconds,
            decisions=tuple(self._decisions.items()),
            predicted_ttft_ms=self.predicted_ttft_ms(0),
            prediction_error=None if durations is None else durations.median_error,
            predictions_trusted=durations is None or durations.is_trusted,
        )

    def predicted_ttft_ms(self, num_tokens: int) -> float | None:
        """Milliseconds to the first token of a prompt of so many tokens that came now.

        All prompts before it at the pace of the last prefill launch foretold: too little where it
        would wait for a slot or for pages. None before the first such launch.
        """
        if self._ms_per_token is None:
            return None
        before = self._roster.queue.num_tokens + self._roster.prompt_tokens
        for flight in self._flights.values():
            before += sum(chunk.count for chunk in flight.chunks)
        return (before + num_tokens) * self._ms_per_token

    def check_integrity(self) -> None:
        """Asserts that nothing is lost or owned twice; for tests."""
        self._roster.check_integrity()
        depth = dict.fromkeys(Lane, 0)
        for flight in self._flights.values():
            depth[flight.launch.lane] += 1
        assert depth == self._lanes.depth
        assert max(depth.values()) <= self.limits.launches_per_lane, depth
        assert not (depth[Lane.WHOLE] and self._lanes.are_split), depth

    # Planning.

    def plan(self, now: float) -> tuple[Launch, ...]:
        """All launches that lanes can take now, in the order in which to submit them."""
        self._now = now
        if not self._flights:
            self._busy_since = now
        launches = []
        while (launch := self._next_launch()) is not None:
            launches.append(launch)
        assert self._flights or not self.has_work, f"nothing can run: {self.stats()}"
        return tuple(launches)

    def _next_launch(self) -> Launch | None:
        lanes, roster = self._lanes, self._roster
        if not self._has_room(Lane.WHOLE):
            return None
        starved = roster.reserve(1, may_preempt=True) if self._has_room(Lane.DECODE) else 0
        roster.admit(self.limits.max_num_batched_tokens)
        rows = len(roster.decoding) - starved
        rows = max(rows, int(lanes.depth[Lane.DECODE] > 0))  # their last steps are still running
        load = Load(rows, roster.prompt_tokens, self._details)
        if not (load.rows or load.prompt_tokens):
            return None
        decision = self._policy.decide(load)
        self._decisions[decision.why] += 1
        if isinstance(decision, Duet):
            return self._plan_duet(decision, feeds=load.prompt_tokens > 0)
        if lanes.depth[Lane.PREFILL]:
            assert lanes.episode is not None, lanes
            return self._plan_duet(lanes.episode, feeds=False)
        return None if lanes.are_split else self._plan_whole(decision, load)

    def _has_room(self, lane: Lane) -> bool:
        return self._lanes.depth[lane] < self.limits.launches_per_lane

    def _plan_whole(self, decision: Aggregate, load: Load) -> Launch | None:
        prefills = load.prompt_tokens > 0
        if decision.decodes and decision.budget <= load.rows:
            prefills = False
        if self.limits.deterministic:
            prefills = prefills and not (self._prefilled_last and load.rows)
            self._prefilled_last = prefills
            decision = Aggregate(self.limits.max_num_batched_tokens, decodes=not prefills)
        batch, k = _NOBODY, 1
        if decision.decodes and load.rows:
            batch, k = self._decoding(1 if prefills else decision.k)
        chunks = self._chunks(decision.budget - len(batch), Lane.WHOLE) if prefills else ()
        if chunks:
            return self._launch(Lane.WHOLE, None, batch, chunks=chunks)
        return self._launch(Lane.WHOLE, None, batch, k=k) if batch else None

    def _plan_duet(self, decision: Duet, *, feeds: bool) -> Launch | None:
        """The decode lane first, which must not wait; `feeds`: also more prompt chunks."""
        lanes = self._lanes
        if lanes.depth[Lane.WHOLE]:
            return None
        if not lanes.are_split:
            lanes.episode = decision
        assert lanes.episode is not None, lanes
        split = lanes.episode.split
        if self._has_room(Lane.DECODE):
            batch, k = self._decoding(decision.k)
            if batch:
                return self._launch(Lane.DECODE, split, batch, k=k)
        if feeds and self._has_room(Lane.PREFILL):
            budget = min(decision.budget, self._longest_prefill(decision))
            chunks = self._chunks(budget, Lane.PREFILL)
            return self._launch(Lane.PREFILL, split, _NOBODY, chunks=chunks)
        return None

    def _details(self) -> Details:
        roster, lanes = self._roster, self._lanes
        slots = roster.decoding.batch().slots
        left = roster.columns.end[slots] - roster.columns.planned[slots]
        free = roster.pool.num_available * self.limits.page_size // max(1, len(slots))
        episode = lanes.episode if lanes.are_split else None
        return Details(
            contexts=roster.columns.planned[slots],
            prompts=tuple(roster.unplanned(request) for request in roster.prefilling),
            tbt_slo_ms=self._tightest_slo_ms(),
            max_k=min(int(left.max(initial=1)), free + 1),
            split=None if episode is None else episode.split,
        )

    def _tightest_slo_ms(self) -> float:
        """Of what decodes."""
        own, rows = self._roster.decoding.batch().slos, len(self._roster.decoding)
        return min(own) if rows and len(own) == rows else min((*own, self._pace.tbt_slo_ms))

    def _longest_prefill(self, duet: Duet) -> int:
        """Tokens that a prefill launch beside decode may take: a bucket of those short enough."""
        buckets, pace = self.limits.prefill_buckets, self._pace
        if pace.durations is None:
            return buckets[-1]
        longest_ms = pace.max_prefill_launch_ms
        if longest_ms is None:
            longest_ms = 4 * self._tightest_slo_ms()
        start = np.array([self._roster.unplanned(next(iter(self._roster.prefilling)))[0]])
        fitting = buckets[0]
        for size in buckets[1:]:
            step = Step(Lane.PREFILL, duet.split, Program.PREFILL, size, size, start)
            if pace.durations.step_ms(step) > longest_ms:
                break
            fitting = size
        return fitting

    def _decoding(self, k: int) -> tuple[Batch, int]:
        if k > 1:
            self._roster.reserve(k, may_preempt=False)
        return self._roster.ready(k)

    def _chunks(self, budget: int, lane: Lane) -> tuple[Chunk, ...]:
        """Takes the next tokens of the first prompts in line, `budget` in all."""
        roster = self._roster
        chunks: list[Chunk] = []
        for request in list(roster.prefilling):
            if budget <= 0 or (chunks and self.limits.deterministic):
                break
            left = roster.num_unplanned(request)
            size = min(left, budget)
            budget -= size
            start = int(roster.columns.planned[slot_of(request)])
            roster.columns.planned[slot_of(request)] += size
            chunks.append(Chunk(request, start, size, ends=size == left))
            if size == left:
                roster.prompt_planned(request, decodes_next=lane is Lane.WHOLE)
        return tuple(chunks)

    def _launch(
        self,
        lane: Lane,
        split: Split | None,
        batch: Batch,
        *,
        chunks: tuple[Chunk, ...] = (),
        k: int = 1,
    ) -> Launch:
        """Puts a launch in flight; with chunks it is one of the prefill program."""
        ticket = next(self._tickets)
        columns, fed = self._roster.columns, [slot_of(chunk.request) for chunk in chunks]
        slots = batch.slot_tuple + tuple(fed)
        num_tokens = len(batch) + sum(chunk.count for chunk in chunks)
        program = Program.PREFILL if chunks else Program.DECODE
        buckets = self.limits.prefill_buckets if chunks else self.limits.decode_buckets
        bucket = next(size for size in buckets if size >= num_tokens)
        columns.ticket[batch.slots] = ticket
        if chunks:
            columns.ticket[fed] = ticket
        wants_top = batch.wants_top or any(c.ends and c.request.wants_top for c in chunks)
        durations = self._pace.durations
        step = None
        if durations is not None:
            step = Step(lane, split, program, bucket, *self._tokens(batch, chunks, k))
        predicted_ms = None
        if durations is not None and step is not None:
            predicted_ms = k * durations.step_ms(step)
            if chunks:
                self._ms_per_token = predicted_ms / num_tokens
        launch = Launch(
            ticket=ticket,
            program=program,
            bucket=bucket,
            slots=slots,
            lane=lane,
            split=split,
            k=k,
            wants_top=wants_top,
            predicted_ms=predicted_ms,
            **_prefill_columns(batch, chunks, columns),
            **self._roster.deltas.take(lambda slot: bool(columns.ticket[slot] == ticket)),
        )
        self._flights[ticket] = _Flight(launch, batch, chunks, step, self._now)
        self._lanes.depth[lane] += 1
        return launch

    def _tokens(
        self, batch: Batch, chunks: tuple[Chunk, ...], k: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Tokens that each row of a launch computes in a step, and has in KV before the first."""
        contexts = self._roster.columns.planned[batch.slots] - k
        new = [1] * len(batch) + [chunk.count for chunk in chunks]
        starts = np.array([chunk.start for chunk in chunks], np.int64)
        cached = np.maximum(np.concatenate((contexts, starts)), 0)
        return np.array(new, np.int64), cached

    # Committing.

    def commit(self, finished: FinishedStep, now: float) -> StepOutputs:
        """Takes in a finished step of a launch, in the order in which the launch took them."""
        ticket, step = finished.ticket, finished.step
        flight = self._flights.get(ticket)
        assert flight is not None, f"commit of launch {ticket}, which is not in flight"
        assert step == flight.next_step, f"step {step} of {flight.launch}, not {flight.next_step}"
        outputs = self._results.take(flight.launch, flight.batch, flight.chunks, finished.result)
        flight.next_step += 1
        self._steps += 1
        if flight.next_step == flight.launch.k:
            del self._flights[ticket]
            self._lanes.depth[flight.launch.lane] -= 1
            self._roster.complete(ticket)
            self._learn(flight, now)
        if not self._flights:
            self._busy_seconds += now - self._busy_since
        return outputs

    def _learn(self, flight: _Flight, now: float) -> None:
        """Tells who foretold a launch how long it took, once the lane was free for it."""
        lane = flight.launch.lane
        began = max(flight.began, self._lanes.ended[lane])
        self._lanes.ended[lane] = now
        if flight.step is not None and self._pace.durations is not None:
            measured_ms = 1e3 * (now - began) / flight.launch.k
            self._pace.durations.observe(flight.step, measured_ms)


def _prefill_columns(batch: Batch, chunks: tuple[Chunk, ...], columns: Columns) -> dict[str, Any]:
    """What a launch of the prefill program has beside its slots: decoding rows, then chunks."""
    if not chunks:
        return {}
    rows, packed = len(batch), []
    for chunk in chunks:
        known = columns.tokens[slot_of(chunk.request)]
        packed.append(known[chunk.start : chunk.start + chunk.count].tobytes())
    return {
        "starts": (0,) * rows + tuple([chunk.start for chunk in chunks]),
        "counts": (0,) * rows + tuple([chunk.count for chunk in chunks]),
        "packed": b"".join(packed),
        "samples": (True,) * rows + tuple([chunk.ends for chunk in chunks]),
    }
