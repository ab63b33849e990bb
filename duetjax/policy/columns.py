"""The numbers that every plan and commit goes over, by slot: columns instead of objects.

With 256 running requests a loop over objects takes longer than a short decode step's planning may.
"""

from array import array
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import compress

import numpy as np
from numpy.typing import NDArray

from duetjax.policy.request import Rank, Request, Tokens

NO_TICKET = -1

type Slots = NDArray[np.int64]


class Columns:
    """One row per slot; positions count tokens fed, so KV written.

    tokens [slots, max_model_len]: prompt and output so far, `length` of them. computed: fed by
    launches that have been committed. planned: with those in flight; a row that stops early never
    gets there. end: most it will ever feed; leash: most that it may for now. room: what its pages
    hold. ticket: last launch that names the slot; launches: how many have named it since its owner
    came. takes: whether its owner still takes results.
    """

    def __init__(self, num_slots: int, max_model_len: int) -> None:
        self.tokens = np.zeros((num_slots, max_model_len), np.int32)  # untouched pages cost nothing
        self.length = np.zeros(num_slots, np.int64)
        self.computed = np.zeros(num_slots, np.int64)
        self.planned = np.zeros(num_slots, np.int64)
        self.end = np.zeros(num_slots, np.int64)
        self.leash = np.zeros(num_slots, np.int64)
        self.room = np.zeros(num_slots, np.int64)
        self.ticket = np.full(num_slots, NO_TICKET, np.int64)
        self.launches = np.zeros(num_slots, np.int64)
        self.takes = np.zeros(num_slots, np.bool_)

    def open(self, slot: int, known: Tokens, *, computed: int, end: int, room: int) -> None:
        """A slot's new owner; known: its tokens."""
        self.tokens[slot, : len(known)] = known
        self.length[slot] = len(known)
        self.computed[slot] = self.planned[slot] = computed
        self.end[slot] = self.leash[slot] = end
        self.room[slot] = room
        self.ticket[slot] = NO_TICKET
        self.launches[slot] = 0
        self.takes[slot] = True

    def known(self, slot: int) -> Tokens:
        """A view of a slot's tokens."""
        return self.tokens[slot, : self.length[slot]]

    def append(self, slots: Slots, tokens: Tokens) -> None:
        """One more token for each slot."""
        length = self.length[slots]
        self.tokens[slots, length] = tokens
        self.length[slots] = length + 1

    def limit(self, slot: int) -> int:
        """First position that the slot may not feed."""
        return min(self.leash.item(slot), self.room.item(slot))

    def is_at_end(self, slot: int) -> bool:
        """Whether all that the slot will ever feed is computed."""
        return self.computed.item(slot) >= self.end.item(slot)

    def steps(self, slots: Slots, k: int) -> Slots:
        """How many of `k` steps each slot has the room and the right to take, from `planned` on."""
        limit = np.minimum(self.leash[slots], self.room[slots])
        return np.minimum(np.maximum(limit - self.planned[slots], 0), k)

    def missing_room(self, slots: Slots, k: int) -> tuple[list[int], list[int]]:
        """Which of `slots` (indices into it) want more room for `k` steps, and for how many tokens.

        Each of them has a step left to take.
        """
        want = self.planned[slots] + k
        if k > 1:
            want = np.minimum(want, self.leash[slots])
        missing = want - self.room[slots]
        short = (missing > 0).nonzero()[0]
        return short.tolist(), missing[short].tolist()


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Decoding rows in order of rank.

    slots: twice, as each is at hand faster than it can be made. ids: of the requests. is_scored:
    whether any row's logprobs are asked for. wants_top: whether any asks for alternatives.
    is_constrained: whether any is. slos: of the rows that bring their own.
    """

    requests: tuple[Request, ...] = ()
    slots: Slots = field(default_factory=lambda: np.zeros(0, np.int64))
    slot_tuple: tuple[int, ...] = ()
    ids: tuple[str, ...] = ()
    is_scored: bool = False
    wants_top: bool = False
    is_constrained: bool = False
    slos: tuple[float, ...] = ()

    def kept(self, rows: NDArray[np.bool_]) -> "Batch":
        """Some of its rows."""
        some = rows.tolist()
        return Batch(
            tuple(compress(self.requests, some)),
            self.slots[rows],
            tuple(compress(self.slot_tuple, some)),
            tuple(compress(self.ids, some)),
            self.is_scored,
            self.wants_top,
            self.is_constrained,
            self.slos,
        )

    def __len__(self) -> int:
        return len(self.requests)


class Line:
    """Requests with slots, in order of rank; the batch of them is made when it is asked for."""

    def __init__(self) -> None:
        self._ranks: list[Rank] = []
        self._requests: list[Request] = []
        self._slots = array("q")
        self._ids: list[str] = []
        self._num_scored = self._num_top = self._num_constrained = 0
        self._slos: list[float] = []
        self._batch: Batch | None = Batch()

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    @property
    def last(self) -> Request | None:
        """Last in rank."""
        return self._requests[-1] if self._requests else None

    def add(self, request: Request) -> None:
        """Puts a request in its place."""
        assert request.slot is not None, f"{request.new.id!r} has no slot"
        at = bisect_left(self._ranks, request.rank)
        self._ranks.insert(at, request.rank)
        self._requests.insert(at, request)
        self._slots.insert(at, request.slot)
        self._ids.insert(at, request.new.id)
        self._num_scored += request.new.sampling.logprobs is not None
        self._num_top += request.wants_top
        self._num_constrained += request.new.constraint is not None
        if request.new.tbt_slo_ms is not None:
            self._slos.append(request.new.tbt_slo_ms)
        self._batch = None

    def remove(self, request: Request) -> None:
        """Takes a request out."""
        at = bisect_left(self._ranks, request.rank)
        assert self._requests[at] is request, f"{request.new.id!r} is not in line"
        del self._ranks[at], self._requests[at], self._slots[at], self._ids[at]
        self._num_scored -= request.new.sampling.logprobs is not None
        self._num_top -= request.wants_top
        self._num_constrained -= request.new.constraint is not None
        if request.new.tbt_slo_ms is not None:
            self._slos.remove(request.new.tbt_slo_ms)
        self._batch = None

    def batch(self) -> Batch:
        """All of them."""
        if self._batch is None:
            self._batch = Batch(
                tuple(self._requests),
                np.array(self._slots),
                tuple(self._slots),
                tuple(self._ids),
                self._num_scored > 0,
                self._num_top > 0,
                self._num_constrained > 0,
                tuple(self._slos),
            )
        return self._batch


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """A row of a prefill launch: `count` tokens of a prompt from `start` on; ends: the last."""

    request: Request
    start: int
    count: int
    ends: bool
