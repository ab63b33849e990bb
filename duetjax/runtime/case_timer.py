"""Times launches on an executor as an engine makes them, without an engine and its requests.

Two launches of a lane are in flight, as while serving, and a step takes from the completion of the
one before it to its own. The median of a few counts: it is what a scheduler has to reckon with,
where the shortest would be what happens when nothing disturbs. What the pages hold is of no
interest, so a row decodes at any context after one token has been put before it.
"""

import queue
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from statistics import median

import numpy as np

from duetjax.config import DuetJAXError, SamplingParams
from duetjax.policy.grid import Case, Shape
from duetjax.policy.launch import (
    Executor,
    FinishedStep,
    Lane,
    Launch,
    Program,
    RowFlag,
    SlotParams,
    Split,
    pack,
)
from duetjax.policy.limits import SchedulerLimits

PATIENCE_S = 120.0
_IN_FLIGHT = 2
_GREEDY = SamplingParams(temperature=0.0, seed=0)


@dataclass(frozen=True, slots=True)
class Timing:
    """How long a step took. steps_before: that its rows had decoded before the middle one."""

    ms: float
    steps_before: int
    num_steps: int


@dataclass(slots=True, eq=False)
class _Deltas:
    """What the first launch of a case changes."""

    admitted: list[SlotParams] = field(default_factory=list)
    pages: list[tuple[int, int, int]] = field(default_factory=list)
    limits: list[tuple[int, int]] = field(default_factory=list)

    def take(self) -> dict[str, tuple[object, ...]]:
        """All of it, once."""
        taken = {name: tuple(getattr(self, name)) for name in ("admitted", "pages", "limits")}
        self.admitted, self.pages, self.limits = [], [], []
        return taken


@dataclass(slots=True, eq=False)
class _Run:
    """A shape on its lane. wanted: steps to be timed. most: that its rows have room for.

    ends: when each step completed.
    """

    shape: Shape
    lane: Lane
    split: Split | None
    slots: tuple[int, ...]
    wanted: int
    most: float
    began: float = 0.0
    submitted: int = 0
    in_flight: int = 0
    ends: list[float] = field(default_factory=list)

    @property
    def has_enough(self) -> bool:
        """Whether all steps that are wanted lie between two completions."""
        return len(self.ends) > self.wanted

    @property
    def has_room(self) -> bool:
        """Whether its rows can take the steps of one more launch."""
        return self.submitted + self.shape.k <= self.most


class DeviceHangs(DuetJAXError):
    """A step has not come, so whoever waits for it, as `Executor.close` does, waits for ever."""


class CaseTimer:
    """Times cases on an executor, which it starts; nothing else may use that.

    steps: room that decoding rows have. Raises `DeviceHangs` if a step does not come, and what the
    executor delivers.
    """

    def __init__(
        self,
        executor: Executor,
        limits: SchedulerLimits,
        steps: int,
        vocab_size: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._executor = executor
        self._limits = limits
        self._steps = steps
        self._clock = clock
        self._tickets = count()
        self._delivered: queue.SimpleQueue[tuple[FinishedStep | BaseException, float]]
        self._delivered = queue.SimpleQueue()
        largest = limits.prefill_buckets[-1]
        self._tokens = np.random.default_rng(0).integers(vocab_size, size=largest).tolist()
        executor.start(lambda finished: self._delivered.put((finished, clock())))

    def time(self, case: Case, wanted: Sequence[int]) -> list[Timing | None]:
        """Of a step of each shape; None where fewer than two of its steps ran beside the other's.

        wanted: how many steps of each to time.
        """
        runs, deltas = self._prepared(case, wanted)
        self._decode_from(runs, deltas)
        flying: dict[int, _Run] = {}
        for _ in range(_IN_FLIGHT):
            for run in runs:
                if run.has_room and (run.submitted <= run.wanted or len(runs) == 2):
                    self._submit(run, flying, deltas)
        while flying:
            finished, at = self._next()
            run = flying[finished.ticket]
            run.ends.append(at)
            if finished.step == run.shape.k - 1:
                del flying[finished.ticket]
                run.in_flight -= 1
                if self._goes_on(run, runs):
                    self._submit(run, flying, deltas)
        return [_timing(run, runs) for run in runs]

    def _prepared(self, case: Case, wanted: Sequence[int]) -> tuple[list[_Run], _Deltas]:
        """Slots and pages for every row, each its own."""
        deltas, slots, pages, runs = _Deltas(), count(), count(1), []
        for shape, lane, steps in zip(case.shapes, case.lanes, wanted, strict=True):
            held = [each + self._steps for each in shape.contexts]
            held += [cached + new for cached, new in shape.chunks]
            own = []
            for num_tokens in held:
                own.append(slot := next(slots))
                deltas.admitted.append(SlotParams(slot, _GREEDY))
                needed = self._limits.num_pages_for(num_tokens)
                deltas.pages += [(slot, index, next(pages)) for index in range(needed)]
                deltas.limits.append((slot, num_tokens))
            most = self._steps if shape.contexts else float("inf")
            runs.append(_Run(shape, lane, case.split, tuple(own), steps, most))
        return runs, deltas

    def _decode_from(self, runs: Sequence[_Run], deltas: _Deltas) -> None:
        """Brings every row that decodes to its context, by a prompt that ends there."""
        rows = [
            row for run in runs for row in zip(run.slots, run.shape.contexts, strict=False)
        ]  # those of prompts come after those that decode
        if not rows:
            return
        slots, contexts = zip(*rows, strict=True)
        buckets = self._limits.prefill_buckets
        bucket = next(each for each in buckets if each >= len(rows))
        launch = Launch(
            next(self._tickets),
            Program.PREFILL,
            bucket,
            slots,
            starts=tuple([context - 1 for context in contexts]),
            counts=(1,) * len(rows),
            packed=pack(self._tokens[: len(rows)]),
            samples=(True,) * len(rows),
            **deltas.take(),  # type: ignore[arg-type]
        )
        self._executor.submit(launch)
        self._next()

    def _submit(self, run: _Run, flying: dict[int, _Run], deltas: _Deltas) -> None:
        launch = self._launch(run, deltas)
        flying[launch.ticket] = run
        run.began = run.began or self._clock()
        run.submitted += run.shape.k
        run.in_flight += 1
        self._executor.submit(launch)

    def _launch(self, run: _Run, deltas: _Deltas) -> Launch:
        shape, rows = run.shape, len(run.shape.contexts)
        prompts: dict[str, object] = {}
        if shape.chunks:
            cached, new = zip(*shape.chunks, strict=True)
            prompts = {
                "starts": (0,) * rows + cached,
                "counts": (0,) * rows + new,
                "packed": pack(self._tokens[: sum(new)]),
                "samples": (True,) * (rows + len(new)),
            }
        return Launch(
            next(self._tickets),
            shape.program,
            shape.bucket,
            run.slots,
            run.lane,
            run.split,
            shape.k,
            **prompts,  # type: ignore[arg-type]
            **deltas.take(),  # type: ignore[arg-type]
        )

    def _goes_on(self, run: _Run, runs: Sequence[_Run]) -> bool:
        """Whether a lane gets one more launch: until it, and what runs beside it, has enough."""
        if not run.has_room:
            return False
        if len(runs) == 1:
            return run.submitted <= run.wanted
        is_over = any(not each.has_room and not each.in_flight for each in runs)
        return not is_over and not all(each.has_enough for each in runs)

    def _next(self) -> tuple[FinishedStep, float]:
        try:
            finished, at = self._delivered.get(timeout=PATIENCE_S)
        except queue.Empty:
            raise DeviceHangs(
                f"a step has not completed within {PATIENCE_S:g} s: the device hangs, or the model"
                " is too large for it"
            ) from None
        if isinstance(finished, BaseException):
            raise finished
        if not (finished.result.flags & RowFlag.SAMPLED).all():
            raise DuetJAXError(
                "a row has sampled no token, so what is timed is not what serves: its logits are"
                " not finite; choose another --dtype, or --load-format auto"
            )
        return finished, at


def _timing(run: _Run, runs: Sequence[_Run]) -> Timing | None:
    """The median of the steps that the other lane, if any, was busy beside."""
    timed = list(_beside(run, runs))
    if len(timed) < 2:
        return None
    ms = 1e3 * median(seconds for _, seconds in timed)
    places = [place for place, _ in timed]
    middle = places[len(places) // 2] if run.shape.contexts else 0
    return Timing(ms, middle, len(timed))


def _beside(run: _Run, runs: Sequence[_Run]) -> Iterator[tuple[int, float]]:
    """Steps by their place, and their seconds."""
    others = [each for each in runs if each is not run]
    first = max([run.ends[0], *(each.began for each in others)])
    last = min([run.ends[-1], *(each.ends[-1] for each in others)])
    for place in range(1, len(run.ends)):
        if first <= run.ends[place - 1] and run.ends[place] <= last:
            yield place, run.ends[place] - run.ends[place - 1]
