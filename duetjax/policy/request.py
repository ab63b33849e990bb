"""One generation as the scheduler sees it: tokens in, tokens out, pages held."""

from dataclasses import dataclass, field, replace
from enum import StrEnum

from duetjax.config import SamplingParams


class FinishReason(StrEnum):
    """Why a generation ended, in OpenAI's words where it has them."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class NewRequest:
    """A generation to run, in plain values (it may cross a process boundary).

    max_tokens: at least 1. sampling: how tokens are chosen; its seed is given (whoever submits
    draws one when the user did not), its n, max_tokens and stop are not looked at.
    stop_ids: token ids that end it, end-of-sequence ids included where they are not to be ignored;
    the id itself is reported and counted.
    """

    id: str
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams
    stop_ids: tuple[int, ...] = ()


def new_requests(
    request_id: str,
    prompt: tuple[int, ...],
    params: SamplingParams,
    *,
    eos_token_ids: tuple[int, ...],
    room: int,
) -> tuple[NewRequest, ...]:
    """The n generations of one prompt, with ids `request_id`-0, -1 and so on.

    room: max_tokens where params leave it open. params.seed must be set by now.
    """
    assert params.seed is not None, f"{request_id} has no seed"
    eos = () if params.ignore_eos else eos_token_ids
    stop_ids = tuple(dict.fromkeys((*eos, *(params.stop_token_ids or ()))))
    return tuple(
        NewRequest(
            id=f"{request_id}-{index}",
            prompt=prompt,
            max_tokens=room if params.max_tokens is None else params.max_tokens,
            sampling=replace(params, seed=_wrapped(params.seed + index)),
            stop_ids=stop_ids,
        )
        for index in range(params.n)
    )


def _wrapped(seed: int) -> int:
    """The 64-bit signed integer with the same bits."""
    return (seed + 2**63) % 2**64 - 2**63


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How likely a sampled token was by the model alone (natural logarithm), and what else was.

    top: as many of the most likely tokens as were asked for, as (id, logprob), most likely first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What one step produced for one request.

    token_ids: newly sampled ids, in order, never empty unless finish says why it ended.
    logprobs: one per token id where the request asked for them, else empty.
    """

    id: str
    token_ids: tuple[int, ...]
    finish: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(slots=True, eq=False)
class Request:
    """A request's progress, owned and written by the scheduler alone.

    tokens: prompt and output so far. num_computed: how many of them have their KV written, a
    prefix of `tokens`; preemption sets it to 0. num_sent: how many output tokens have been handed
    on. pages: the KV pages held, by position.
    """

    new: NewRequest
    sequence: int
    tokens: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_sent: int = 0
    pages: list[int] = field(default_factory=list)
    slot: int | None = None

    @property
    def num_output(self) -> int:
        """Tokens sampled so far."""
        return len(self.tokens) - len(self.new.prompt)
