"""Launches counted as they complete: what dashboards show where each single launch is too much."""

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass
from math import isfinite

from duetjax.policy.flights import Flight
from duetjax.policy.launch import Lane, Program, Split

SECONDS = (
    *(0.0005, 0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2),
    *(0.3, 0.5, 1.0, 2.0, 5.0, 10.0),
)
ERRORS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0)
STEPS = (1, 2, 3, 4, 6, 8, 12, 16, 32)
TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)

KINDS = (
    (Lane.WHOLE, Program.PREFILL),
    (Lane.WHOLE, Program.DECODE),
    (Lane.PREFILL, Program.PREFILL),
    (Lane.DECODE, Program.DECODE),
)
"""Every lane with the programs that run on it."""

NO_PROMPTS, NO_DECODES = "no_prompts", "no_decodes"

type Tally = tuple[tuple[int, ...], float]
"""How many values each bucket has, the last one being for all that are larger, and their sum."""


@dataclass(frozen=True, slots=True)
class KindCounts:
    """The launches of one lane and program. predicted, measured: seconds of a whole launch.

    steps: its k. errors: |predicted - measured| / measured, where anybody foretold it.
    """

    lane: str
    program: str
    steps: Tally
    predicted: Tally
    measured: Tally
    errors: Tally


@dataclass(frozen=True, slots=True)
class LaunchCounts:
    """Since the start, in plain values. launches: (lane, program, its split or None, how many).

    tokens: of each step, a decoding row being one. begun: episodes. ended: those that did, by why:
    NO_PROMPTS or NO_DECODES, where one side had nothing left, else what the policy said last (see
    `Aggregate`).
    """

    launches: tuple[tuple[str, str, tuple[int, int] | None, int], ...]
    kinds: tuple[KindCounts, ...]
    tokens: Tally
    begun: int
    ended: tuple[tuple[str, int], ...]


class Histogram:
    """Values counted by bucket: `bounds` ascending, each the largest value of its bucket."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Counts a value, which must be finite."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def tally(self) -> Tally:
        """What there is so far."""
        return tuple(self.counts), self.total


class LaunchCounter:
    """Counts for one thread; `counts` is for any, and at most one launch behind itself."""

    def __init__(self) -> None:
        self._launches: Counter[tuple[Lane, Program, Split | None]] = Counter()
        self._kinds = {kind: _Kind() for kind in KINDS}
        self._tokens = Histogram(TOKENS)
        self._begun = 0
        self._ended: Counter[str] = Counter()

    def completed(self, flight: Flight, seconds: float) -> None:
        """A launch has taken so long."""
        launch = flight.launch
        self._launches[launch.lane, launch.program, launch.split] += 1
        kind = self._kinds[launch.lane, launch.program]
        kind.steps.observe(launch.k)
        kind.measured.observe(seconds)
        if launch.predicted_ms is not None and isfinite(launch.predicted_ms) and seconds > 0:
            predicted = launch.predicted_ms / 1e3
            kind.predicted.observe(predicted)
            kind.errors.observe(abs(predicted - seconds) / seconds)
        tokens = len(flight.batch) + sum([chunk.count for chunk in flight.chunks])
        self._tokens.observe(tokens, launch.k)

    def episode_began(self) -> None:
        """Lanes share the device."""
        self._begun += 1

    def episode_ended(self, why: str) -> None:
        """Lanes no longer share the device."""
        self._ended[why] += 1

    def counts(self) -> LaunchCounts:
        """All of them."""
        launches = tuple(self._launches.items())
        return LaunchCounts(
            tuple([(*_plain(*what), number) for what, number in launches]),
            tuple([kind.counts(*names) for names, kind in self._kinds.items()]),
            self._tokens.tally(),
            self._begun,
            tuple(self._ended.items()),
        )


def _plain(
    lane: Lane, program: Program, split: Split | None
) -> tuple[str, str, tuple[int, int] | None]:
    cores = None if split is None else (split.decode, split.prefill)
    return lane.value, program.value, cores


class _Kind:
    """A `KindCounts` in the making."""

    def __init__(self) -> None:
        self.steps = Histogram(STEPS)
        self.predicted = Histogram(SECONDS)
        self.measured = Histogram(SECONDS)
        self.errors = Histogram(ERRORS)

    def counts(self, lane: Lane, program: Program) -> KindCounts:
        tallies = (self.steps, self.predicted, self.measured, self.errors)
        return KindCounts(lane.value, program.value, *(each.tally() for each in tallies))
