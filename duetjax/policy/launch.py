"""The unit of work between scheduler and executor: a frozen, columnar `Launch`.

A launch names slots, never requests, and carries only what changed since the launch before: the
executor keeps each slot's token, position, sampling parameters, limit and page table. Launches
compare with ==, so one trace gives the same launches in two processes.
"""

from dataclasses import dataclass
from enum import IntFlag, StrEnum
from typing import Protocol

from duetjax.config import SamplingParams


class Program(StrEnum):
    """The compiled program that a launch runs; PREFILL takes prompt chunks and decoding rows."""

    PREFILL = "prefill"
    DECODE = "decode"


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

    bucket: padded size the program was compiled for: tokens T for prefill, rows B for decode.
    slots [R]: the slot of each row.
    starts, counts [R]: prefill only: first position and number of the tokens computed for a row;
        a count of 0 is a decoding row, whose one token and position are its slot's.
    tokens [sum(counts)]: prefill only: the chunks' token ids, packed in row order.
    samples [R]: prefill only: the row's last token ends its prompt, so the token sampled after it
        becomes the slot's token; True for decoding rows. Other rows' samples are thrown away.
    admitted: slots whose owner is new.
    pages: (slot, index, page): page-table entries set since the launch before.
    limits: (slot, limit) set since the launch before. A slot takes decoding steps while it has not
        stopped and its position is below its limit: min(last position fed + 1, reserved room).
    wants_top: also copy each row's most likely tokens to the host.

    A decoding row feeds its slot's token at its slot's position, samples the next token and moves
    on by one position. A slot that has stopped or is at its limit does not move, and writes nothing
    outside the dummy page. Deltas apply before the first of the k steps; prefill has k = 1.
    """

    program: Program
    bucket: int
    slots: tuple[int, ...]
    k: int = 1
    starts: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()
    samples: tuple[bool, ...] = ()
    admitted: tuple[SlotParams, ...] = ()
    pages: tuple[tuple[int, int, int], ...] = ()
    limits: tuple[tuple[int, int], ...] = ()
    wants_top: bool = False


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


@dataclass(frozen=True, slots=True)
class StepResult:
    """One step of a launch, by row [R].

    logprobs: of the sampled tokens, natural logarithm, by the model alone (before penalties,
    temperature and filters). top: the 20 most likely tokens as (id, logprob), most likely first
    (fewer where the vocabulary is smaller); empty unless the launch wants them.
    """

    tokens: tuple[int, ...]
    flags: tuple[RowFlag, ...]
    logprobs: tuple[float, ...]
    top: tuple[tuple[tuple[int, float], ...], ...] = ()


type Ticket = int


class Executor(Protocol):
    """Runs launches in the order of submission; knows nothing of requests."""

    def submit(self, launch: Launch) -> Ticket:
        """Starts a launch without waiting for it; deltas apply in order of submission."""

    def result(self, ticket: Ticket, step: int = 0) -> StepResult:
        """Waits for a step of a launch, step < k; each is asked for once, in order.

        Raises what the device raised.
        """
