"""Launches made by hand, with known rows: to be timed, and to give the same tokens each time."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from duetjax.config import SamplingParams
from duetjax.policy.launch import FinishedStep, Lane, Launch, Program, SlotParams, Split, pack
from gpu.lane_play import Deliveries
from gpu.lane_rig import Executor, Rig

PROMPT = 4
"""Tokens of the prompts from which rows begin to decode."""


@dataclass(frozen=True)
class Timed:
    """seconds: from the first submission to the last delivery. ends: of each step, by ticket.

    tokens: of each step, by ticket.
    """

    seconds: float
    ends: dict[int, list[float]]
    tokens: dict[int, list[tuple[int, ...]]]


@dataclass
class Hand:
    """Makes launches and runs them on lanes that have been started."""

    rig: Rig
    executor: Executor
    deliveries: Deliveries
    _tickets: "count[int]" = field(default_factory=count)

    @property
    def decoding(self) -> tuple[int, ...]:
        """Slots that decode: all but one."""
        return tuple(range(self.rig.programs.slots.num_slots - 1))

    @property
    def steps_left(self) -> int:
        """Decode steps that rows may take from their beginning."""
        return self.rig.longest - PROMPT - 1

    def beginning(self) -> list[Launch]:
        """Puts every decoding slot at its beginning, whatever it was at."""
        rows = self.rig.programs.buckets.prefill[-1] // PROMPT
        slots = self.decoding
        return [self._prompts(slots[i : i + rows], PROMPT) for i in range(0, len(slots), rows)]

    def decode(
        self,
        split: Split | None,
        k: int,
        *,
        pages: tuple[tuple[int, int, int], ...] = (),
        limits: tuple[tuple[int, int], ...] = (),
    ) -> Launch:
        """All decoding slots, beside prefill on a split or with the device to themselves."""
        return Launch(
            next(self._tickets),
            Program.DECODE,
            self.rig.programs.buckets.decode[-1],
            self.decoding,
            lane=Lane.WHOLE if split is None else Lane.DECODE,
            split=split,
            k=k,
            pages=pages,
            limits=limits,
        )

    def prompt(self, split: Split | None) -> Launch:
        """A prompt of the largest size in the slot that does not decode."""
        size = min(self.rig.programs.buckets.prefill[-1], self.rig.longest - 1)
        return self._prompts((self.rig.programs.slots.num_slots - 1,), size, split)

    def _prompts(self, slots: Sequence[int], size: int, split: Split | None = None) -> Launch:
        """A history has a slot's token counts set back; the slot that never decodes has none."""
        rig, owners = self.rig, []
        width, vocab = rig.programs.slots.table_width, rig.programs.slots.vocab_size
        tokens: list[int] = []
        for slot in slots:
            sampling = SamplingParams(temperature=0.7, seed=slot)
            prompt = np.random.default_rng(slot).integers(0, vocab, size).tolist()
            history = tuple(prompt) if slot in self.decoding else ()
            owners.append(SlotParams(slot, sampling, (), size, history))
            tokens += prompt
        return Launch(
            next(self._tickets),
            Program.PREFILL,
            rig.programs.buckets.prefill[-1],
            tuple(slots),
            lane=Lane.WHOLE if split is None else Lane.PREFILL,
            split=split,
            starts=(0,) * len(slots),
            counts=(size,) * len(slots),
            packed=pack(tokens),
            samples=(True,) * len(slots),
            admitted=tuple(owners),
            pages=tuple((s, i, 1 + s * width + i) for s in slots for i in range(width)),
            limits=tuple((slot, rig.longest - 1) for slot in slots),
        )

    def run(self, launches: Sequence[Launch]) -> Timed:
        """Submits launches and waits for all their steps."""
        began = time.perf_counter()
        for launch in launches:
            self.executor.submit(launch)
        return self.collect(launches, began)

    def collect(self, launches: Sequence[Launch], began: float) -> Timed:
        """Waits for launches that have been submitted."""
        ends: dict[int, list[float]] = {launch.ticket: [] for launch in launches}
        tokens: dict[int, list[tuple[int, ...]]] = {launch.ticket: [] for launch in launches}
        moment, finished = began, None
        for _ in range(sum(launch.k for launch in launches)):
            moment, finished = self.deliveries.next()
            assert isinstance(finished, FinishedStep)
            ends[finished.ticket].append(moment)
            tokens[finished.ticket].append(tuple(finished.result.tokens.tolist()))
        return Timed(moment - began, ends, tokens)
