"""What became of every request of a simulation, token by token, and what that amounts to."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from duetjax.policy.request import FinishReason, StepOutputs
from duetjax.sim.workload import Arrival

type Floats = NDArray[np.float64]
type Index = NDArray[np.int64]
type Flags = NDArray[np.bool_]

LATE_SHARE = 0.01
"""Of a request's gaps between tokens, so many may exceed the objective: its 99th percentile."""


@dataclass(frozen=True, slots=True)
class Objectives:
    """What a request must keep to count, in milliseconds. tbt_slo_ms: of this and any other judge.

    ttft_slo_ms: until its first token; None: as long as it takes.
    """

    tbt_slo_ms: tuple[float, ...]
    ttft_slo_ms: float | None = None


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of some values, in their unit; all 0 where there are none."""

    p50: float
    p90: float
    p99: float
    most: float
    mean: float

    @classmethod
    def of(cls, values: Floats, weights: Index | None = None) -> "Percentiles":
        """The least value that so large a share does not exceed; a value counts `weights` times."""
        if not len(values):
            return cls(0.0, 0.0, 0.0, 0.0, 0.0)
        counts = np.ones(len(values), np.int64) if weights is None else weights
        order = np.argsort(values, kind="stable")
        values, counts = values[order], counts[order]
        sums = np.cumsum(counts)
        places = [np.ceil(share * sums[-1]) for share in (0.5, 0.9, 0.99)]
        p50, p90, p99 = values[np.searchsorted(sums, places)].tolist()
        mean = float((values * counts).sum() / sums[-1])
        return cls(p50, p90, p99, values.item(-1), mean)


class Ledger:
    """Takes in what steps give out. Requests are known by their number, ids being its digits.

    arrived, first, last [N]: seconds; NaN where it has not happened. tokens [N]: given out.
    finished, refused: how many requests have got everything, and how many can never run.
    finished_at: when the last one had.
    """

    def __init__(self, workload: Sequence[Arrival], objectives: Objectives) -> None:
        size = len(workload)
        self.objectives = objectives
        self.workload = workload
        self._due = np.array([arrival.output_tokens for arrival in workload], np.int64)
        self.arrived = np.array([arrival.at for arrival in workload], np.float64)
        self.first, self.last = np.full(size, np.nan), np.full(size, np.nan)
        self.tokens = np.zeros(size, np.int64)
        self.finished = self.refused = 0
        self.finished_at = 0.0
        self._is_refused = np.zeros(size, np.bool_)
        self._late = np.zeros((len(objectives.tbt_slo_ms), size), np.int64)
        self._slos = [slo / 1e3 for slo in objectives.tbt_slo_ms]
        self._tightest = min(self._slos)
        self._gaps: list[Floats] = []
        self._counts: list[Index] = []
        self._ids: tuple[str, ...] = ()
        self._numbers = np.zeros(0, np.int64)

    def refuse(self, number: int) -> None:
        """A request can never run."""
        self.refused += 1
        self._is_refused[number] = True

    def take(self, outputs: StepOutputs, now: float) -> None:
        """A step's tokens, at the time at which it ended."""
        if outputs.ids:
            self._take(self._numbered(outputs.ids), now)
        for request_id, why in outputs.finished:
            assert why is FinishReason.LENGTH, f"request {request_id}: {why}"
            self.finished += 1
            self.finished_at = now

    def skip(self, ids: tuple[str, ...], ends: Floats) -> None:
        """Steps that ended then gave each of these requests a token; none was its first."""
        numbers = self._numbered(ids)
        self._take(numbers, ends.item(0))
        if len(ends) > 1:
            gaps = np.diff(ends)
            self._gaps.append(gaps)
            self._counts.append(np.full(len(gaps), len(ids)))
            self.tokens[numbers] += len(gaps)
            self.last[numbers] = ends.item(-1)
            if gaps.max() > self._tightest:
                for late, slo in zip(self._late, self._slos, strict=True):
                    late[numbers] += np.count_nonzero(gaps > slo)

    def _numbered(self, ids: tuple[str, ...]) -> Index:
        if ids != self._ids:
            self._ids, self._numbers = ids, np.array([int(each) for each in ids])
        return self._numbers

    def _take(self, numbers: Index, now: float) -> None:
        gaps = now - self.last[numbers]
        self.last[numbers] = now
        self.tokens[numbers] += 1
        is_first = np.isnan(gaps)
        if is_first.any():
            self.first[numbers[is_first]] = now
            numbers, gaps = numbers[~is_first], gaps[~is_first]
        if len(gaps):
            self._gaps.append(gaps)
            self._counts.append(np.ones(len(gaps), np.int64))
            if gaps.max() > self._tightest:
                for late, slo in zip(self._late, self._slos, strict=True):
                    late[numbers] += gaps > slo

    def met(self, objective: int = 0) -> Flags:
        """Which requests have kept both objectives so far [N]; objective: index of the TBT one."""
        gaps = np.maximum(self.tokens - 1, 0)
        in_pace: Flags = self._late[objective] <= np.floor(LATE_SHARE * gaps)
        return in_pace & (self.ttft_ms <= self._most_ttft_ms)

    def missed(self, now: float) -> Flags:
        """Which requests cannot keep their objectives any more, the loosest TBT being meant [N].

        Late by more gaps than all their tokens allow, or without a first token for too long.
        """
        loosest = int(np.argmax(self._slos))
        late: Flags = self._late[loosest] > np.floor(LATE_SHARE * (self._due - 1))
        waited = np.where(np.isnan(self.first), now, self.first) - self.arrived
        return late | (1e3 * waited > self._most_ttft_ms) | self._is_refused

    @property
    def ttft_ms(self) -> Floats:
        """Time to the first token [N]; NaN where there is none."""
        return 1e3 * (self.first - self.arrived)

    @property
    def tbt_ms(self) -> Percentiles:
        """Time between tokens, over all of them."""
        if not self._gaps:
            return Percentiles.of(np.zeros(0))
        gaps, counts = np.concatenate(self._gaps), np.concatenate(self._counts)
        mean_ms = 1e3 * float(np.nansum(self.last - self.first) / counts.sum())
        return replace(Percentiles.of(1e3 * gaps, counts), mean=mean_ms)

    @property
    def tpot_ms(self) -> Floats:
        """Mean time per output token after the first, of requests with more than one."""
        several: Flags = self.tokens > 1
        mean: Floats = 1e3 * (self.last - self.first)[several] / (self.tokens[several] - 1)
        return mean

    @property
    def _most_ttft_ms(self) -> float:
        slo = self.objectives.ttft_slo_ms
        return np.inf if slo is None else slo
