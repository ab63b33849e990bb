"""The unit of work between scheduler and executor: a frozen, columnar `Launch`.

A launch names slots, never requests, and carries only what changed since the launch before: the
executor keeps each slot's token, position, sampling parameters, limit and page table. Launches
compare with ==, so one trace gives the same launches in two processes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntFlag, StrEnum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from duetjax.config import SamplingParams

type Ticket = int


class Program(StrEnum):
    """The compiled program that a launch runs; PREFILL takes prompt chunks and decoding rows."""

    PREFILL = "prefill"
    DECODE = "decode"


class Lane(StrEnum):
    """Where a launch runs: on the whole device, or on one side of a split, beside the other."""

    WHOLE = "whole"
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class Split:
    """How many SMs (on a host: cores) each lane has."""

    decode: int
    prefill: int


@dataclass(frozen=True, slots=True)
class SlotParams:
    """What a slot's new owner brings: the slot's page table starts empty, its limit at 0.

    sampling: its seed is given. stop_ids: ids that stop the row. num_prompt: prompt length, from
    which min_tokens counts. history: prompt and output so far, only where `sampling` has penalties.
    """

    slot: int
    sampling: SamplingParams
    stop_ids: tuple[int, ...] = ()
    num_prompt: int = 0
    history: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Launch:
    """`k` executions of one program over R rows, at most one row per slot.

    ticket: counts launches from 0. lane, split: where it runs; `whole` has no split. Launches of
    one lane take effect in the order of their tickets; `whole` and the others exclude each other.
    bucket: padded size the program was compiled for: tokens T for prefill, rows B for decode.
    slots [R]: the slot of each row.
    starts, counts [R]: prefill only: first position and number of the tokens computed for a row;
        a count of 0 is a decoding row, whose one token and position are its slot's.
    packed [sum(counts)]: prefill only: the chunks' token ids in row order, as int32 in bytes;
        `tokens` unpacks them, `pack` makes them.
    samples [R]: prefill only: the row's last token ends its prompt, so the token sampled after it
        becomes the slot's token; True for decoding rows. Other rows' samples are thrown away.
    admitted: slots whose owner is new.
    pages: (slot, index, page): page-table entries set since the launch before.
    limits: (slot, limit) set since the launch before. A slot takes decoding steps while it has not
        stopped and its position is below its limit: min(last position fed + 1, reserved room), or
        the position at which it must be told what it may sample.
    allowed: (slot, mask) set since the launch before: what it may sample, bit v % 32 of word
        v // 32 for id v, little-endian uint32 in bytes; empty for any token, as for a new owner.
    handovers: (slot, ticket): rows that decode for the first time since that launch finished their
        prompt on the prefill lane. It has completed; their token and position are still its own.
    wants_top: also copy each row's most likely tokens to the host.
    predicted_ms: how long it should take; None where nobody predicts.

    A decoding row feeds its slot's token at its slot's position, samples the next token and moves
    on by one position. A slot that has stopped or is at its limit does not move, and writes nothing
    outside the dummy page. Deltas apply before the first of the k steps; prefill has k = 1.
    """

    ticket: Ticket
    program: Program
    bucket: int
    slots: tuple[int, ...]
    lane: Lane = Lane.WHOLE
    split: Split | None = None
    k: int = 1
    starts: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()
    packed: bytes = b""
    samples: tuple[bool, ...] = ()
    admitted: tuple[SlotParams, ...] = ()
    pages: tuple[tuple[int, int, int], ...] = ()
    limits: tuple[tuple[int, int], ...] = ()
    allowed: tuple[tuple[int, bytes], ...] = ()
    handovers: tuple[tuple[int, Ticket], ...] = ()
    wants_top: bool = False
    predicted_ms: float | None = None

    @property
    def tokens(self) -> tuple[int, ...]:
        """The chunks' token ids."""
        return tuple(np.frombuffer(self.packed, np.int32).tolist())


def pack(tokens: Sequence[int]) -> bytes:
    """Token ids as `Launch.packed` has them."""
    return np.array(tokens, np.int32).tobytes()


class RowFlag(IntFlag):
    """What became of a row in one step.

    SAMPLED: it produced the token; a row without it was inactive, or its chunk ended no prompt.
    STOPPED: the token is one of its stop ids. AT_LIMIT: it may take no further step.
    NON_FINITE: its logits were not finite, or no token was allowed; its token means nothing and
    it takes no further step.
    """

    SAMPLED = 1
    STOPPED = 2
    AT_LIMIT = 4
    NON_FINITE = 8


@dataclass(frozen=True, slots=True, eq=False)
class StepResult:
    """One step of a launch, by row [R], as numpy columns; anything that makes some may be given.

    tokens: int32. flags: uint8, `RowFlag` bits. logprobs: float32, of the sampled tokens, natural
    logarithm, by the model alone (before penalties, temperature and filters). top: the 20 most
    likely tokens as (id, logprob), most likely first (fewer where the vocabulary is smaller);
    empty unless the launch wants them.
    """

    tokens: NDArray[np.int32]
    flags: NDArray[np.uint8]
    logprobs: NDArray[np.float32]
    top: tuple[tuple[tuple[int, float], ...], ...] = ()

    def __post_init__(self) -> None:
        for name, dtype in (("tokens", np.int32), ("flags", np.uint8), ("logprobs", np.float32)):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, StepResult):
            return NotImplemented
        return self.top == other.top and all(
            np.array_equal(mine, theirs)
            for mine, theirs in (
                (self.tokens, other.tokens),
                (self.flags, other.flags),
                (self.logprobs, other.logprobs),
            )
        )

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, slots=True)
class FinishedStep:
    """Step `step` of launch `ticket` is done, step < k; after the last one the launch is."""

    ticket: Ticket
    step: int
    result: StepResult


type Deliver = Callable[[FinishedStep | BaseException], None]


class Executor(Protocol):
    """Runs launches; knows nothing of requests. Owned by one thread, which makes all calls."""

    def start(self, deliver: Deliver) -> None:
        """Begins: `deliver` gets every step as it finishes, from any thread, and must not wait.

        The steps of a launch, and the launches of a lane, arrive in order. Given an exception
        instead, the device has failed and nothing more will come.
        """

    def submit(self, launch: Launch) -> None:
        """Starts a launch without waiting for it; its deltas apply before its first step."""

    def close(self) -> None:
        """Waits for launches in flight, then frees the device's memory."""
