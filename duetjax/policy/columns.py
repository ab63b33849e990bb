"""The numbers that every plan and commit goes over, by slot: columns instead of objects.

With 256 running requests a loop over objects takes longer than a short decode step's planning may.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from duetjax.policy.request import Request

NO_TICKET = -1

type Slots = NDArray[np.int64]


class Columns:
    """One row per slot; positions count tokens fed, so KV written.

    computed: by launches that have been committed. planned: with those in flight; a row that
    stops early never gets there. end: most it will ever feed. room: what its pages hold. ticket:
    last launch that names the slot. takes: whether its owner still takes results.
    """

    def __init__(self, num_slots: int) -> None:
        self.computed = np.zeros(num_slots, np.int64)
        self.planned = np.zeros(num_slots, np.int64)
        self.end = np.zeros(num_slots, np.int64)
        self.room = np.zeros(num_slots, np.int64)
        self.ticket = np.full(num_slots, NO_TICKET, np.int64)
        self.takes = np.zeros(num_slots, np.bool_)

    def open(self, slot: int, computed: int, end: int, room: int) -> None:
        """A slot's new owner."""
        self.computed[slot] = self.planned[slot] = computed
        self.end[slot], self.room[slot] = end, room
        self.ticket[slot] = NO_TICKET
        self.takes[slot] = True

    def limit(self, slot: int) -> int:
        """First position that the slot may not feed."""
        return int(min(self.end[slot], self.room[slot]))

    def steps(self, slots: Slots, k: int) -> Slots:
        """How many of `k` steps each slot has the room and the right to take, from `planned` on."""
        limit = np.minimum(self.end[slots], self.room[slots])
        return np.clip(limit - self.planned[slots], 0, k)

    def short(self, slots: Slots, k: int) -> Slots:
        """Which of `slots` (indices into it) want more room for `k` steps."""
        want = np.minimum(self.planned[slots] + k, self.end[slots])
        return np.flatnonzero(want > self.room[slots])


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Decoding rows in order of rank, with what planning and committing them needs ready to hand.

    scored: rows whose logprobs are asked for. wants_top: whether any asks for alternatives.
    """

    requests: tuple[Request, ...]
    slots: Slots
    slot_tuple: tuple[int, ...]
    ids: tuple[str, ...]
    appends: tuple[Callable[[int], None], ...]
    scored: tuple[int, ...]
    wants_top: bool

    @classmethod
    def of(cls, requests: Sequence[Request]) -> "Batch":
        """The batch of requests that have slots."""
        slots = [request.slot for request in requests]
        assert None not in slots, f"no slot: {requests}"
        wanted = [request.new.sampling.logprobs for request in requests]
        return cls(
            requests=tuple(requests),
            slots=np.array(slots, np.int64),
            slot_tuple=tuple(slots),  # type: ignore[arg-type]
            ids=tuple([request.new.id for request in requests]),
            appends=tuple([request.tokens.append for request in requests]),
            scored=tuple([row for row, number in enumerate(wanted) if number is not None]),
            wants_top=any(request.wants_top for request in requests),
        )

    def __len__(self) -> int:
        return len(self.requests)


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """A row of a prefill launch: `count` tokens of a prompt from `start` on; ends: the last."""

    request: Request
    start: int
    count: int
    ends: bool

    @property
    def tokens(self) -> list[int]:
        """The tokens themselves."""
        return self.request.tokens[self.start : self.start + self.count]
