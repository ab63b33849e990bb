"""One generation as the scheduler sees it: tokens in, tokens out, pages held."""

from dataclasses import dataclass, field
from enum import StrEnum


class FinishReason(StrEnum):
    """Why a generation ended, in OpenAI's words where it has them."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class NewRequest:
    """A generation to run, in plain values (it may cross a process boundary).

    max_tokens: at least 1. stop_ids: token ids that end it, end-of-sequence ids included where
    they are not to be ignored; the id itself is reported and counted.
    seed: 64-bit, always given: whoever submits draws one when the user did not.
    """

    id: str
    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float
    seed: int
    stop_ids: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What one step produced for one request; times are the engine's clock in seconds.

    token_ids: newly sampled ids, in order, never empty unless finish says why it ended.
    """

    id: str
    token_ids: tuple[int, ...]
    finish: FinishReason | None = None


@dataclass(slots=True, eq=False)
class Request:
    """A request's progress, owned and written by the scheduler alone.

    tokens: prompt and output so far. num_computed: how many of them have their KV written, a
    prefix of `tokens`; preemption sets it to 0. pages: the KV pages held, by position.
    """

    new: NewRequest
    sequence: int
    tokens: list[int] = field(default_factory=list)
    num_computed: int = 0
    pages: list[int] = field(default_factory=list)
    slot: int | None = None

    @property
    def num_output(self) -> int:
        """Tokens sampled so far."""
        return len(self.tokens) - len(self.new.prompt)
