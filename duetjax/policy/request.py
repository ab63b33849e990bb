"""One generation as the scheduler sees it: tokens in, tokens out, pages held."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import Enum, StrEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from duetjax.config import SamplingParams
from duetjax.policy.prefix_cache import Node, Place


class FinishReason(StrEnum):
    """Why a generation ended, in OpenAI's words where it has them.

    ERROR: its logits were not finite, or the engine failed. CONSTRAINT: nobody could say what it
    may go on with.
    """

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"
    CONSTRAINT = "constraint"


@dataclass(frozen=True, slots=True)
class Reasoning:
    """How an answer's reasoning is bounded, which ends with the text `end`, as "</think>".

    begin: what it begins with where has_begun is not set, as "<think>"; an answer that does not
    begin so has none. max_tokens: most tokens before `end`, which then follows; None: no bound.
    """

    begin: str
    end: str
    has_begun: bool
    max_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Constraint:
    """What an answer's tokens must keep to; see duetjax/constrain/.

    grammar: llguidance's text of the grammar that the answer is in, behind its reasoning if it has
    any; None: any text.
    """

    grammar: str | None = None
    reasoning: Reasoning | None = None


@dataclass(frozen=True, slots=True)
class Permit:
    """What a constrained request may sample next: its output's tokens `at` .. `at + steps - 1`.

    mask: one bit per token id, as `Launch.allowed` has it; empty for any token. steps: None for all
    that are to come. error: why it cannot go on; empty where it can.
    """

    id: str
    at: int
    mask: bytes = b""
    steps: int | None = 1
    error: str = ""


@dataclass(frozen=True, slots=True)
class NewRequest:
    """A generation to run, in plain values (it may cross a process boundary).

    max_tokens: at least 1. sampling: how tokens are chosen; its seed is given (whoever submits
    draws one when the user did not), its n, max_tokens and stop are not looked at.
    stop_ids: token ids that end it, end-of-sequence ids included where they are not to be ignored;
    the id itself is reported and counted. priority: lower goes first; see `queue.AGEING_SECONDS`.
    cache_salt: KV is shared only among requests with the same one. tbt_slo_ms: objective for the
    time between its tokens; None is the engine's. constraint: what its tokens must keep to.
    """

    id: str
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams
    stop_ids: tuple[int, ...] = ()
    priority: int = 0
    cache_salt: str = ""
    tbt_slo_ms: float | None = None
    constraint: Constraint | None = None


def new_requests(
    request_id: str,
    prompt: tuple[int, ...],
    params: SamplingParams,
    *,
    eos_token_ids: tuple[int, ...],
    room: int,
    priority: int = 0,
    cache_salt: str = "",
    constraint: Constraint | None = None,
) -> tuple[NewRequest, ...]:
    """The n generations of one prompt, with ids `request_id`-0, -1 and so on.

    room: max_tokens where params leave it open. params.seed must be set by now. constraint: made of
    params.structured_outputs and max_reasoning_tokens.
    """
    assert params.seed is not None, f"{request_id} has no seed"
    eos = () if params.ignore_eos else eos_token_ids
    stop_ids = tuple(dict.fromkeys((*eos, *(params.stop_token_ids or ()))))
    return tuple(
        NewRequest(
            id=f"{request_id}-{index}",
            prompt=prompt,
            max_tokens=room if params.max_tokens is None else params.max_tokens,
            sampling=replace(params, seed=_wrapped(params.seed + index), structured_outputs=None),
            stop_ids=stop_ids,
            priority=priority,
            cache_salt=cache_salt,
            constraint=constraint,
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


class RequestOutput(NamedTuple):
    """What one step produced for one request; one is made for each token, so a tuple.

    token_ids: newly sampled ids, in order, never empty unless finish says why it ended.
    logprobs: one per token id where the request asked for them, else empty. num_cached_tokens: in
    the first output of a request, how many tokens of its prompt came from the prefix cache;
    queued_seconds: there too, how long it waited for its first launch. num_launches: in the last
    one, how many launches were planned with it.
    """

    id: str
    token_ids: tuple[int, ...]
    finish: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    num_cached_tokens: int = 0
    queued_seconds: float = 0.0
    num_launches: int = 0


@dataclass(frozen=True, slots=True)
class StepOutputs:
    """What one step produced, by column, in plain values; iterating gives a `RequestOutput` each.

    ids, tokens: one sampled token per request. finished: (id, why) of requests whose last output
    this is, in `ids` or, without a token, not. logprobs, cached: (row, its logprob), (row, its
    num_cached_tokens), for the rows that have any. queued: (row, its queued_seconds) of first
    outputs. launches: (id, its num_launches) of those that a step finished.
    """

    ids: tuple[str, ...] = ()
    tokens: tuple[int, ...] = ()
    finished: tuple[tuple[str, FinishReason], ...] = ()
    logprobs: tuple[tuple[int, TokenLogprob], ...] = ()
    cached: tuple[tuple[int, int], ...] = ()
    queued: tuple[tuple[int, float], ...] = ()
    launches: tuple[tuple[str, int], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.ids or self.finished)

    def __iter__(self) -> Iterator[RequestOutput]:
        finished, logprobs, cached = dict(self.finished), dict(self.logprobs), dict(self.cached)
        queued, launches = dict(self.queued), dict(self.launches)
        for row, (request_id, token) in enumerate(zip(self.ids, self.tokens, strict=True)):
            scored = (logprobs[row],) if row in logprobs else ()
            finish = finished.pop(request_id, None)
            output = RequestOutput(request_id, (token,), finish, scored, cached.get(row, 0))
            if row in queued:
                output = output._replace(queued_seconds=queued[row])
            if finish is not None:
                output = output._replace(num_launches=launches.get(request_id, 0))
            yield output
        for request_id, why in finished.items():
            yield RequestOutput(request_id, (), why, num_launches=launches.get(request_id, 0))


class Phase(Enum):
    """Where a request stands.

    HANDING_OVER: its prompt ends in a launch on the prefill lane. HELD: launches in flight feed the
    last that its permit allows. ENDING: they feed the last that it may feed at all.
    """

    WAITING = "waiting"
    PREFILLING = "prefilling"
    HANDING_OVER = "handing over"
    DECODING = "decoding"
    HELD = "held"
    ENDING = "ending"
    ENDED = "ended"


type Rank = tuple[float, int]
type Sampled = tuple[str, int | None]
"""A constrained request, and a token that it has sampled; None: it begins its output anew."""
type Tokens = NDArray[np.int32]


@dataclass(slots=True, eq=False)
class Request:
    """A request's progress, owned and written by the scheduler alone; numbers are in `columns`.

    rank: lower goes first. known: prompt and output so far, while it has no slot. slot: kept, while
    waiting too, until no launch in flight names it. pages: KV pages by position. chain: nodes of
    the prefix cache for the first pages; pages[i] is another page than chain[i]'s where two
    computed the same at once. twin: the page it computes next, where others wait for it. keys:
    what identifies each full page among its siblings: its tokens. num_cached: tokens that it
    found in the prefix cache when it was first admitted. num_muted: tokens to be sampled once
    more, handed on before. arrived: when it was added. began: when its first launch was planned.
    num_launches: planned with it before it was last preempted. permit: what it may sample, where it
    is constrained; None until that is known.
    """

    new: NewRequest
    rank: Rank
    known: Tokens
    phase: Phase = Phase.WAITING
    slot: int | None = None
    pages: list[int] = field(default_factory=list)
    chain: list[Node] = field(default_factory=list)
    twin: Place | None = None
    keys: list[bytes] = field(default_factory=list)
    num_cached: int | None = None
    num_muted: int = 0
    arrived: float = 0.0
    began: float | None = None
    num_launches: int = 0
    permit: Permit | None = None

    @property
    def wants_top(self) -> bool:
        """Whether its logprobs come with alternatives."""
        return bool(self.new.sampling.logprobs)

    def is_permitted(self, num_known: int) -> bool:
        """Whether it may sample the token behind so many known ones."""
        if self.new.constraint is None:
            return True
        permit, at = self.permit, num_known - len(self.new.prompt)
        if permit is None or at < permit.at:
            return False
        return permit.steps is None or at < permit.at + permit.steps

    def restart(self) -> None:
        """Forgets the output, to be decoded again with the same seed and not handed on twice.

        Computed as a prompt, it would differ in the last bits.
        """
        num_prompt = len(self.new.prompt)
        self.num_muted += len(self.known) - num_prompt
        self.known = self.known[:num_prompt]
        self.keys.clear()
        self.permit = None

    def learn_keys(self, tokens: Tokens, page_size: int) -> None:
        """Adds the keys of all full pages of `tokens`, its tokens so far."""
        first, full = len(self.keys), len(tokens) // page_size
        if first < full:
            packed = tokens[first * page_size : full * page_size].tobytes()
            size = tokens.itemsize * page_size
            self.keys += [packed[at : at + size] for at in range(0, len(packed), size)]
