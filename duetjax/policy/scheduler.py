"""Decides what every launch runs, and takes in what became of it.

Knows numbers only: token ids, slots, page numbers, and `now` as it is told. It does not know
what a token means, what a device does with a launch, or who waits for the output.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

import numpy as np

from duetjax.config import InvalidRequest
from duetjax.policy.columns import Batch, Chunk
from duetjax.policy.completed_launch import CompletedLaunch, completed
from duetjax.policy.durations import Step
from duetjax.policy.flights import Flights, Pace
from duetjax.policy.gathering import Gathering
from duetjax.policy.launch import FinishedStep, Lane, Launch, Program, Split
from duetjax.policy.launch_counts import NO_DECODES, NO_PROMPTS, LaunchCounter, LaunchCounts
from duetjax.policy.limits import SchedulerLimits
from duetjax.policy.policies import Aggregate, Aggregated, Decision, Details, Duet, Load, Policy
from duetjax.policy.queue import rank
from duetjax.policy.request import NewRequest, Permit, Request, Sampled, StepOutputs
from duetjax.policy.results import Results
from duetjax.policy.roster import Roster, slot_of
from duetjax.policy.stats import Stats

_NOBODY = Batch()
_AGGREGATED = Aggregate(0).why


@dataclass(frozen=True, slots=True, eq=False)
class Steady:
    """A launch that repeats itself `most` times or more. ids: of its rows."""

    launch: Launch
    ids: tuple[str, ...]
    most: int


class Scheduler:
    """Continuous batching: `add` and `abort` at any time, `plan`, run, `commit`, repeat.

    Launches are planned ahead of results: up to two per lane are in flight, decoding rows count
    with the steps that are in flight, and whoever ends meanwhile is skipped by the device. Whatever
    decodes comes first, then prompts in order of rank (`queue.rank`).

    While prefill launches run on one side of a split, an episode, the decode lane is planned,
    finished and planned again beside them; `whole` waits for both lanes to be empty.

    Deterministic, a prefill launch is one chunk of one prompt and has no decoding rows, and prefill
    and decode alternate: where a prompt is cut and what it is computed with depend on nobody else.

    The same calls give the same launches. watcher: told of each as it completes, but for those that
    are skipped; None while nobody looks.
    """

    def __init__(
        self, limits: SchedulerLimits, policy: Policy | None = None, pace: Pace | None = None
    ) -> None:
        self.limits = limits
        self._policy = policy or Aggregated(limits.max_num_batched_tokens)
        self.pace = pace or Pace()
        self.watcher: Callable[[CompletedLaunch], None] | None = None
        self._flights = Flights(limits, self.pace.durations)
        self._roster = Roster(limits, self._flights)
        self._gathering = Gathering(self._flights, self._roster, self._tightest_slo_ms)
        self._results = Results(self._roster)
        self._sequence = count()
        self._prefilled_last = False
        self._decisions: Counter[str] = Counter()
        self._counter = LaunchCounter()
        self._steps = 0
        self._busy_since = self._busy_seconds = 0.0

    @property
    def num_pages_held(self) -> int:
        """KV pages of running requests."""
        pool = self._roster.pool
        return pool.num_usable - pool.num_available - pool.num_quarantined

    @property
    def has_work(self) -> bool:
        """Whether any request is live."""
        return bool(self._roster.live)

    @property
    def num_in_flight(self) -> int:
        """Launches planned and not completed."""
        return len(self._flights)

    def add(self, new: NewRequest, now: float, permit: Permit | None = None) -> None:
        """Queues a request; raises `InvalidRequest` if it can never fit or its id is in use.

        permit: the first of one that is constrained.
        """
        self.limits.check(new)
        if new.id in self._roster.live:
            raise InvalidRequest(f"request id {new.id!r} is already in use; choose another")
        place = rank(new, now, next(self._sequence))
        known = np.array(new.prompt, np.int32)
        self._roster.add(Request(new, place, known, arrived=now, permit=permit))

    def permit(self, permit: Permit) -> None:
        """What a request may sample next; of no effect once it has ended."""
        self._roster.permit(permit)

    @property
    def awaits_permits(self) -> bool:
        """Whether anybody could be planned but for a permit."""
        return self._roster.awaits_permits

    def take_sampled(self) -> tuple[Sampled, ...]:
        """What constrained requests have sampled since this was last asked, in order."""
        sampled = tuple(self._roster.sampled)
        self._roster.sampled.clear()
        return sampled

    def abort(self, request_id: str, *, unless_begun: bool = False) -> bool:
        """Ends a request without output; False if it is not live (unknown or finished).

        Launches in flight run on, and what they sample for it is dropped. unless_begun: False, too,
        for one that has ever had a slot.
        """
        request = self._roster.live.get(request_id)
        if request is None or (unless_begun and request.num_cached is not None):
            return False
        self._roster.end(request)
        return True

    def stats(self) -> Stats:
        """Gauges now and counters since the start."""
        roster, results, durations = self._roster, self._results, self.pace.durations
        split = self._split
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
            decode_cores=0 if split is None else split.decode,
            prefill_cores=0 if split is None else split.prefill,
            decisions=tuple(self._decisions.items()),
            predicted_ttft_ms=self.predicted_ttft_ms(0),
            ms_per_prompt_token=self._flights.ms_per_token,
            prediction_error=None if durations is None else durations.median_error,
            predictions_trusted=durations is None or durations.is_trusted,
        )

    def launch_counts(self) -> LaunchCounts:
        """Launches completed since the start, but for those that were skipped; for any thread."""
        return self._counter.counts()

    @property
    def _split(self) -> Split | None:
        """Of the episode in progress."""
        flights = self._flights
        return flights.episode.split if flights.are_split and flights.episode else None

    def predicted_ttft_ms(self, num_tokens: int) -> float | None:
        """Milliseconds to the first token of a prompt of so many tokens that came now.

        All prompts before it at the pace of the last prefill launch foretold: too little where it
        would wait for a slot or for pages. None before the first such launch.
        """
        if self._flights.ms_per_token is None:
            return None
        before = self._roster.queue.num_tokens + self._roster.prompt_tokens
        before += sum(chunk.count for flight in self._flights for chunk in flight.chunks)
        return (before + num_tokens) * self._flights.ms_per_token

    def check_integrity(self) -> None:
        """Asserts that nothing is lost or owned twice; for tests."""
        self._roster.check_integrity()
        self._flights.check_integrity()

    # Planning.

    def plan(self, now: float) -> tuple[Launch, ...]:
        """All launches that lanes can take now, in the order in which to submit them."""
        self._flights.now = now
        if not self._flights:
            self._busy_since = now
        launches = []
        while (launch := self._next_launch()) is not None:
            launches.append(launch)
        self._gathering.planned()
        can_run = self._flights or not self.has_work or self.awaits_permits
        assert can_run, f"nothing can run: {self.stats()}"
        return tuple(launches)

    def _next_launch(self) -> Launch | None:
        flights, roster = self._flights, self._roster
        if not flights.has_room(Lane.WHOLE):
            return None
        if not (flights.has_room(Lane.DECODE) or flights.has_room(Lane.PREFILL)):
            return None
        if flights.has_room(Lane.DECODE):
            roster.reserve(1, may_preempt=True)
        roster.admit(self.limits.max_num_batched_tokens)
        rows = len(roster.decoding) - roster.starved
        rows = max(rows, int(flights.is_busy(Lane.DECODE)))  # their last steps are still running
        load = Load(rows, roster.prompt_tokens, self._details)
        if not (load.rows or load.prompt_tokens):
            return None
        if self._gathering.waits(Lane.WHOLE):
            return None
        decision = self._policy.decide(load)
        flights.why = decision.why
        were_split = flights.are_split
        launch = self._planned(decision, load)
        if launch is not None:
            self._decisions[decision.why] += 1
            if launch.split is not None and not were_split:
                self._counter.episode_began()
        return launch

    def _planned(self, decision: Decision, load: Load) -> Launch | None:
        """The launch that a decision comes to, if the lanes can take it now."""
        flights = self._flights
        if isinstance(decision, Duet):
            return self._plan_duet(decision, feeds=load.prompt_tokens > 0)
        if flights.is_busy(Lane.PREFILL):
            assert flights.episode is not None, "a prefill lane without an episode"
            return self._plan_duet(flights.episode, feeds=False)
        return None if flights.are_split else self._plan_whole(decision, load)

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
        flights = self._flights
        if flights.is_busy(Lane.WHOLE):
            return None
        if not flights.are_split or flights.episode is None:
            flights.episode = decision
        split = flights.episode.split
        if flights.has_room(Lane.DECODE) and not self._gathering.waits(Lane.DECODE):
            batch, k = self._decoding(decision.k)
            if batch:
                return self._launch(Lane.DECODE, split, batch, k=k)
        if feeds and flights.has_room(Lane.PREFILL):
            budget = min(decision.budget, self._longest_prefill(decision))
            chunks = self._chunks(budget, Lane.PREFILL)
            return self._launch(Lane.PREFILL, split, _NOBODY, chunks=chunks)
        return None

    def _details(self) -> Details:
        roster, flights = self._roster, self._flights
        slots = roster.decoding.batch().slots
        left = roster.columns.end[slots] - roster.columns.planned[slots]
        free = roster.pool.num_available * self.limits.page_size // max(1, len(slots))
        return Details(
            contexts=roster.columns.planned[slots],
            prompts=tuple(roster.unplanned(request) for request in roster.prefilling),
            tbt_slo_ms=self._tightest_slo_ms(),
            max_k=min(int(left.max(initial=1)), free + 1),
            split=self._split,
            handed_over_ms=flights.idle_ms(Lane.PREFILL) if roster.has_handed_over else 0.0,
        )

    def _tightest_slo_ms(self) -> float:
        """Of what decodes."""
        own, rows = self._roster.decoding.batch().slos, len(self._roster.decoding)
        return min(own) if rows and len(own) == rows else min((*own, self.pace.tbt_slo_ms))

    def _longest_prefill(self, duet: Duet) -> int:
        """Tokens that a prefill launch beside decode may take: a bucket of those short enough."""
        buckets, pace = self.limits.prefill_buckets, self.pace
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
        roster = self._roster
        self._gathering.begins(lane)
        return self._flights.begin(lane, split, (batch, chunks), k, roster.columns, roster.deltas)

    # Skipping, for simulations.

    def steady(self) -> Steady | None:
        """What would be launched again and again if only time passed.

        A one-step decode launch on the whole device; None where it is another, or where a row ends,
        or pages are short or about to be given back, before the next but one.
        """
        roster, flights = self._roster, self._flights
        batch = roster.decoding.batch()
        others = (roster.prefilling, roster.handing_over, roster.held, roster.ending)
        if not batch or any(others) or roster.starved or roster.pool.is_draining:
            return None
        launch = flights.repeated(batch)
        if launch is None or any(request.num_muted for request in batch.requests):
            return None
        most = roster.steps_to_spare()
        if most < 1:
            return None
        return Steady(launch, batch.ids, most)

    def skip(self, count: int, now: float) -> None:
        """`commit` and `plan` for `count` launches that are `steady`, the last ended by now.

        Launches in flight then are known by the tickets of those before. All tokens are 0, nothing
        is learned from how long it took, and the policy is not asked.
        """
        self._roster.skip(count)
        self._flights.skip(now)
        rows = len(self._roster.decoding)
        self._results.generation_tokens += count * rows
        self._steps += count
        self._decisions[_AGGREGATED] += count

    # Committing.

    def commit(self, finished: FinishedStep, now: float) -> StepOutputs:
        """Takes in a finished step of a launch, in the order in which the launch took them."""
        flight = self._flights.step(finished)
        outputs = self._results.take(flight.launch, flight.batch, flight.chunks, finished.result)
        self._steps += 1
        if self.watcher is not None:
            flight.generated += len(outputs.tokens)
            flight.step_ends += (now,)
        if flight.next_step == flight.launch.k:
            began = self._flights.complete(flight, now)
            self._gathering.ended(flight, began)
            self._roster.complete(finished.ticket)
            self._counter.completed(flight, now - began)
            if flight.launch.split is not None and not self._flights.are_split:
                self._counter.episode_ended(self._why_ended())
            if self.watcher is not None:
                self.watcher(completed(flight, began, now, self._roster))
        if not self._flights:
            self._busy_seconds += now - self._busy_since
        return outputs

    def _why_ended(self) -> str:
        """Of an episode whose last launch has just completed."""
        if not self._roster.prefilling:
            return NO_PROMPTS
        return self._flights.why if self._roster.decoding else NO_DECODES
