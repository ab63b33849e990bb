"""The unit of work between scheduler and executor: a frozen, columnar `Launch`.

A launch names slots, never requests, and carries only what changed since the launch before:
the executor keeps each slot's token, position, sampling parameters and page table. Launches
compare with ==, so one trace gives the same launches in two processes.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol


class Program(StrEnum):
    """The compiled program that a launch runs."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class SlotParams:
    """Sampling parameters of a request that has just been given a slot."""

    slot: int
    temperature: float
    seed: int


@dataclass(frozen=True, slots=True)
class Launch:
    """One execution of one program over R rows, at most one row per slot.

    bucket: padded size the program was compiled for: tokens T for prefill, rows B for decode.
    slots [R]: the slot of each row.
    starts, counts [R]: prefill only: first position and number of the tokens computed for a row.
    tokens [sum(counts)]: prefill only: the rows' token ids, packed in row order.
    samples [R]: prefill only: the row's last token ends its prompt, so the token sampled after it
        becomes the slot's token; other rows' samples are thrown away.
    admitted: slots whose owner is new; their page tables start empty.
    pages: (slot, index, page): page-table entries set since the launch before.

    A decode row reads its token and position from its slot, samples the next token and moves on
    by one position.
    """

    program: Program
    bucket: int
    slots: tuple[int, ...]
    starts: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()
    samples: tuple[bool, ...] = ()
    admitted: tuple[SlotParams, ...] = ()
    pages: tuple[tuple[int, int, int], ...] = ()


type Ticket = int


class Executor(Protocol):
    """Runs launches in the order of submission; knows nothing of requests."""

    def submit(self, launch: Launch) -> Ticket:
        """Starts a launch without waiting for it; deltas apply in order of submission."""

    def result(self, ticket: Ticket) -> tuple[int, ...]:
        """Waits for a launch: the sampled token id of each row [R], whether or not it counts.

        Each ticket is asked for once. Raises what the device raised.
        """
