"""Launches in flight: how one is put together, what was foretold of it, and how long it took."""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from duetjax.policy.columns import Batch, Chunk, Columns
from duetjax.policy.durations import Durations, Step
from duetjax.policy.launch import FinishedStep, Lane, Launch, Program, Split, Ticket
from duetjax.policy.limits import SchedulerLimits
from duetjax.policy.policies import Duet
from duetjax.policy.roster import Deltas, slot_of


@dataclass(frozen=True, slots=True)
class Pace:
    """How long launches may take. durations: who foretells steps; None where nobody does.

    tbt_slo_ms: objective for the time between tokens of requests that bring none.
    max_prefill_launch_ms: beside decode; None is 4 x the tightest objective of what decodes.
    """

    durations: Durations | None = None
    tbt_slo_ms: float = 50.0
    max_prefill_launch_ms: float | None = None


@dataclass(slots=True, eq=False)
class Flight:
    """A launch that has not completed: its rows are those of `batch`, then one per chunk.

    step: what it was foretold by. began: when it was planned. why: see `Aggregate`. generated,
    step_ends: see `CompletedLaunch`.
    """

    launch: Launch
    batch: Batch
    chunks: tuple[Chunk, ...]
    step: Step | None
    began: float
    why: str
    next_step: int = 0
    generated: int = 0
    step_ends: tuple[float, ...] = ()


class Flights:
    """Launches by ticket, and what each lane has to do with them.

    episode: the split of launches that share the device, while there are any. now, why: when and
    why launches are being planned. ms_per_token: of the last prefill launch, as foretold; None
    before the first.
    """

    def __init__(self, limits: SchedulerLimits, durations: Durations | None) -> None:
        self.episode: Duet | None = None
        self.now = 0.0
        self.why = ""
        self.ms_per_token: float | None = None
        self._limits = limits
        self._durations = durations
        self._tickets = count()
        self._flights: dict[Ticket, Flight] = {}
        self._depth = dict.fromkeys(Lane, 0)
        self._ended = dict.fromkeys(Lane, 0.0)
        self._took_ms = dict.fromkeys(Lane, 0.0)

    def __len__(self) -> int:
        return len(self._flights)

    def __iter__(self) -> Iterator[Flight]:
        return iter(self._flights.values())

    def __contains__(self, ticket: object) -> bool:
        return ticket in self._flights

    @property
    def are_split(self) -> bool:
        """Whether lanes share the device."""
        return bool(self._depth[Lane.PREFILL] or self._depth[Lane.DECODE])

    def idle_ms(self, lane: Lane) -> float:
        """How long ago the lane's last launch to end did."""
        return 1e3 * (self.now - self._ended[lane])

    def took_ms(self, lane: Lane) -> float:
        """How long that one took, from when the lane was free for it; 0 of none."""
        return self._took_ms[lane]

    def last(self, lane: Lane) -> Flight:
        """Of the launches on a busy lane the last."""
        return next(each for each in reversed(self._flights.values()) if each.launch.lane is lane)

    def is_busy(self, lane: Lane) -> bool:
        """Whether a launch is on the lane."""
        return self._depth[lane] > 0

    def has_room(self, lane: Lane) -> bool:
        """Whether the lane may have one more."""
        return self._depth[lane] < self._limits.launches_per_lane

    def step(self, finished: FinishedStep) -> Flight:
        """The launch of a finished step, which must be its next."""
        flight = self._flights.get(finished.ticket)
        assert flight is not None, f"commit of launch {finished.ticket}, which is not in flight"
        expected = flight.next_step
        assert finished.step == expected, f"step {finished.step} of {flight.launch}, not {expected}"
        flight.next_step += 1
        return flight

    def complete(self, flight: Flight, now: float) -> float:
        """A launch has ended; tells who foretold it how long it took once its lane was free.

        Since when that was, in seconds.
        """
        lane = flight.launch.lane
        del self._flights[flight.launch.ticket]
        self._depth[lane] -= 1
        began = max(flight.began, self._ended[lane])
        self._ended[lane], self._took_ms[lane] = now, 1e3 * (now - began)
        if flight.step is not None and self._durations is not None:
            self._durations.observe(flight.step, self._took_ms[lane] / flight.launch.k)
        return began

    def repeated(self, batch: Batch) -> Launch | None:
        """The last launch, if nothing but one-step decode launches of `batch` is in flight."""
        if self._depth[Lane.WHOLE] < self._limits.launches_per_lane:
            return None
        for flight in self:
            if flight.batch is not batch or flight.chunks or flight.launch.k > 1:
                return None
        return flight.launch

    def skip(self, now: float) -> None:
        """Launches have ended by now and were followed by others like them."""
        self._ended[Lane.WHOLE] = now
        for flight in self:
            flight.began = now

    def check_integrity(self) -> None:
        """Asserts that lanes are counted right and keep their rules; for tests."""
        depth = dict.fromkeys(Lane, 0)
        for flight in self:
            depth[flight.launch.lane] += 1
        assert depth == self._depth, f"{depth}, counted {self._depth}"
        assert max(depth.values()) <= self._limits.launches_per_lane, depth
        assert not (depth[Lane.WHOLE] and self.are_split), depth

    def begin(
        self,
        lane: Lane,
        split: Split | None,
        rows: tuple[Batch, tuple[Chunk, ...]],
        k: int,
        columns: Columns,
        deltas: Deltas,
    ) -> Launch:
        """Puts a launch of decoding rows and chunks in flight; the latter make it a prefill."""
        batch, chunks = rows
        ticket, fed = next(self._tickets), [slot_of(chunk.request) for chunk in chunks]
        slots = batch.slot_tuple + tuple(fed)
        num_tokens = len(batch) + sum(chunk.count for chunk in chunks)
        program = Program.PREFILL if chunks else Program.DECODE
        buckets = self._limits.prefill_buckets if chunks else self._limits.decode_buckets
        bucket = buckets[bisect_left(buckets, num_tokens)]
        columns.ticket[batch.slots] = ticket
        columns.launches[batch.slots] += 1
        if chunks:
            columns.ticket[fed] = ticket
            columns.launches[fed] += 1
            for chunk in chunks:
                if chunk.request.began is None:
                    chunk.request.began = self.now
        step, predicted_ms = None, None
        if self._durations is not None:
            step = Step(lane, split, program, bucket, *_tokens(batch, chunks, k, columns))
            predicted_ms = k * self._durations.step_ms(step)
            if chunks:
                self.ms_per_token = predicted_ms / num_tokens
        launch = Launch(
            ticket=ticket,
            program=program,
            bucket=bucket,
            slots=slots,
            lane=lane,
            split=split,
            k=k,
            wants_top=batch.wants_top or any(c.ends and c.request.wants_top for c in chunks),
            predicted_ms=predicted_ms,
            **_prefill_columns(batch, chunks, columns),
            **deltas.take(ticket, columns),
        )
        self._flights[ticket] = Flight(launch, batch, chunks, step, self.now, self.why)
        self._depth[lane] += 1
        return launch


def _tokens(
    batch: Batch, chunks: tuple[Chunk, ...], k: int, columns: Columns
) -> tuple[NDArray[np.int64] | int, NDArray[np.int64]]:
    """Tokens that each row of a launch computes in a step, and has in KV before the first."""
    if not chunks:
        return 1, columns.planned[batch.slots] - k
    rows, size = len(batch), len(batch) + len(chunks)
    new, cached = np.ones(size, np.int64), np.empty(size, np.int64)
    new[rows:] = [chunk.count for chunk in chunks]
    cached[:rows] = columns.planned[batch.slots] - k
    cached[rows:] = [chunk.start for chunk in chunks]
    return new, cached


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
