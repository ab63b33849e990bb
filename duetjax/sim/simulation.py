"""The server's scheduler under a virtual clock: a workload in, what became of it out.

Events are taken in order of time; at the same time an arrival comes before a step's end, and steps
go by ticket. The same arguments give the same result, bit for bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

import numpy as np

from duetjax.config import InvalidRequest, SamplingParams
from duetjax.policy.launch import Lane, Launch, Program
from duetjax.policy.request import NewRequest
from duetjax.policy.scheduler import Scheduler
from duetjax.policy.stats import Stats
from duetjax.sim.clock import VirtualClock
from duetjax.sim.executor import SimulatedExecutor
from duetjax.sim.ledger import Ledger, Objectives
from duetjax.sim.truth import Truth
from duetjax.sim.workload import Arrival, prompt_of

_GREEDY = SamplingParams(temperature=0.0, seed=0, ignore_eos=True)
_LOOK_EVERY = 100
"""Events between looks at whether there is any hope left."""


@dataclass(slots=True)
class Timeline:
    """Decode launches on a split, by column. at: seconds when planned. k: steps."""

    at: list[float] = field(default_factory=list)
    decode_cores: list[int] = field(default_factory=list)
    k: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Result:
    """A simulation that has ended. is_whole: or was given up, as too many requests had failed.

    seconds: from the beginning to the last token. events: arrivals and steps. most_pages: KV pages
    held at once.
    """

    ledger: Ledger
    stats: Stats
    timeline: Timeline
    seconds: float
    events: int
    most_pages: int
    is_whole: bool


def simulate(
    scheduler: Scheduler,
    truth: Truth,
    workload: Sequence[Arrival],
    objectives: Objectives,
    *,
    most_missed: int | None = None,
    skips: bool = True,
) -> Result:
    """Runs every request of a workload to its end.

    scheduler: a new one, whose own predictions need not be the truth. most_missed: give up when
    more requests than these cannot keep their objectives any more. skips: launches that would be
    the same again and again are taken at once where nothing is learned from them, which changes
    nothing but their tickets.
    """
    skips = skips and truth.is_foretold and scheduler.pace.durations in (None, truth)
    run = _Run(scheduler, truth, workload, objectives, skips=skips)
    is_whole = run.to_end(most_missed)
    return Result(
        ledger=run.ledger,
        stats=scheduler.stats(),
        timeline=run.timeline,
        seconds=run.clock.now(),
        events=run.events,
        most_pages=run.most_pages,
        is_whole=is_whole,
    )


class _Run:
    def __init__(
        self,
        scheduler: Scheduler,
        truth: Truth,
        workload: Sequence[Arrival],
        objectives: Objectives,
        *,
        skips: bool,
    ) -> None:
        self.scheduler = scheduler
        self.truth = truth
        self.workload = workload
        self.clock = VirtualClock()
        self.executor = SimulatedExecutor(truth, self.clock)
        self.ledger = Ledger(workload, objectives)
        self.timeline = Timeline()
        self.events = 0
        self.most_pages = 0
        self._skips = skips
        self._coming = 0  # number of the next arrival

    def to_end(self, most_missed: int | None) -> bool:
        """Whether everybody came to an end."""
        scheduler, executor, workload = self.scheduler, self.executor, self.workload
        while self._coming < len(workload) or scheduler.has_work or scheduler.num_in_flight:
            if self.events % _LOOK_EVERY == 0 and self._is_hopeless(most_missed):
                return False
            self.events += 1
            self.most_pages = max(self.most_pages, scheduler.num_pages_held)
            next_end = executor.next_end
            at = workload[self._coming].at if self._coming < len(workload) else inf
            if next_end is None or at <= next_end:
                self._arrive(at)
            else:
                self._finish()
                if self._skips:
                    self._skip()
        return True

    def _is_hopeless(self, most_missed: int | None) -> bool:
        if most_missed is None:
            return False
        return int(np.count_nonzero(self.ledger.missed(self.clock.now()))) > most_missed

    def _arrive(self, at: float) -> None:
        """All that come at the same time, then a plan."""
        self.clock.move_to(at)
        while self._coming < len(self.workload) and self.workload[self._coming].at == at:
            arrival, number = self.workload[self._coming], self._coming
            prompt = prompt_of(arrival, number)
            try:
                self.scheduler.add(
                    NewRequest(str(number), prompt, arrival.output_tokens, _GREEDY), at
                )
            except InvalidRequest:
                self.ledger.refuse(number)
            self._coming += 1
        self._plan()

    def _finish(self) -> None:
        for step in self.executor.advance():
            now = self.clock.now()
            self.ledger.take(self.scheduler.commit(step, now), now)
        self._plan()

    def _plan(self) -> None:
        for launch in self.scheduler.plan(self.clock.now()):
            self.executor.submit(launch)
            if launch.lane is Lane.DECODE:
                self._note(launch)

    def _note(self, launch: Launch) -> None:
        assert launch.split is not None, launch
        assert launch.program is Program.DECODE, launch
        line = self.timeline
        line.at.append(self.clock.now())
        line.decode_cores.append(launch.split.decode)
        line.k.append(launch.k)

    def _skip(self) -> None:
        """Takes launches that only repeat themselves at once, up to the next arrival."""
        steady = self.scheduler.steady()
        if steady is None:
            return
        is_last = self._coming == len(self.workload)
        until = inf if is_last else self.workload[self._coming].at
        ends = self.executor.skip(steady, until, self.truth.steps_ms)
        if len(ends):
            self.scheduler.skip(len(ends), ends.item(-1))
            self.ledger.skip(steady.ids, ends)
