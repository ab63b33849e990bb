"""A checked request, ready for the engine: one `Choice` per generation, and how to answer."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, Self

from duetjax.config import InvalidRequest, SamplingParams
from duetjax.constrain.grammars import check_together
from duetjax.form import PLAIN, Form
from duetjax.policy.request import Constraint, NewRequest, TokenLogprob, new_requests
from duetjax.serve.context import Service
from duetjax.serve.errors import model_not_found
from duetjax.serve.objectives import Objectives
from duetjax.serve.protocol import GenerationBody
from duetjax.text.answer import CallDelta

# Parameters that the model's defaults stand in for.
_RECOMMENDED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class Choice:
    """One generation, and the index that the client sees."""

    index: int
    new: NewRequest


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token of a choice's text; offset: where its own text begins in it, in characters."""

    id: int
    offset: int
    score: TokenLogprob


class Delta(NamedTuple):
    """A piece of one choice's output; finish_reason is set on its last.

    logprobs: where they were asked for, the tokens of `text`. Unlike token_ids, which are told as
    they are sampled, they wait for text that is held back, and leave out what a stop cuts off.
    reasoning, calls: the parts of the answer beside its text, where it is taken apart.
    """

    index: int  # type: ignore[assignment] # of the choice; hides tuple.index
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None
    logprobs: tuple[ScoredToken, ...] = ()
    reasoning: str = ""
    calls: tuple[CallDelta, ...] = ()


def joined(deltas: Sequence[Delta]) -> Delta:
    """All deltas of one choice, in order, as one."""
    return Delta(
        index=deltas[0].index,
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(t for delta in deltas for t in delta.token_ids),
        finish_reason=deltas[-1].finish_reason,
        logprobs=tuple(token for delta in deltas for token in delta.logprobs),
        reasoning="".join(delta.reasoning for delta in deltas),
        calls=_whole_calls([call for delta in deltas for call in delta.calls]),
    )


def _whole_calls(pieces: Sequence[CallDelta]) -> tuple[CallDelta, ...]:
    by_index: dict[int, list[CallDelta]] = {}
    for piece in pieces:
        by_index.setdefault(piece.index, []).append(piece)
    return tuple(
        CallDelta(index, some[0].name, "".join(piece.arguments for piece in some))
        for index, some in by_index.items()
    )


class ReplyFormat(Protocol):
    """How a route spells its output. Usage and errors are the same on every route."""

    @property
    def is_text_only(self) -> bool:
        """Whether all that its chunks tell of tokens is their text."""

    def whole(self, choices: Sequence[Delta]) -> dict[str, Any]:
        """The body of a response that is not streamed, `choices` complete and by index."""

    def chunk(self, delta: Delta, *, is_first: bool) -> list[dict[str, Any]]:
        """The stream's chunks for one delta; `is_first` of its choice."""

    def last(self) -> dict[str, Any]:
        """The chunk without choices that carries usage."""


@dataclass(frozen=True, slots=True)
class Call:
    """Everything decided about one HTTP call before the engine sees it.

    n: generations per prompt. prompt_tokens: each prompt counted once, whatever n is. headers: for
    the response. ttft_slo_ms: its objective for the first token; None is the server's. timings:
    whether the client asks how long its parts took. form: how answers are taken apart.
    """

    choices: tuple[Choice, ...]
    reply: ReplyFormat
    n: int
    prompt_tokens: int
    stream: bool
    include_usage: bool
    headers: Mapping[str, str]
    ttft_slo_ms: float | None = None
    timings: bool = False
    form: Form = PLAIN

    def with_headers(self, objectives: Objectives, *, timings: bool) -> Self:
        """The same call with what its headers ask for: objectives of its own, and timings."""
        choices = self.choices
        if (tbt := objectives.tbt_ms) is not None:
            choices = tuple(replace(c, new=replace(c.new, tbt_slo_ms=tbt)) for c in choices)
        ttft = objectives.ttft_ms
        return replace(self, choices=choices, ttft_slo_ms=ttft, timings=timings)

    def usage(
        self, completion_tokens: int, cached: Mapping[int, int], reasoning_tokens: int = 0
    ) -> dict[str, Any]:
        """OpenAI's usage object; cached: tokens that each choice found in the prefix cache.

        The choices of a prompt find what the first of them has computed; what all of them found
        was there before.
        """
        found = [cached.get(choice.index, 0) for choice in self.choices]
        prompts = range(0, len(found), self.n)
        details = {"reasoning_tokens": reasoning_tokens}
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self.prompt_tokens + completion_tokens,
            "prompt_tokens_details": {
                "cached_tokens": sum(min(found[i : i + self.n]) for i in prompts)
            },
            **({"completion_tokens_details": details} if self.form.counts_reasoning else {}),
        }


def check_model(service: Service, name: str) -> None:
    """Raises a 404 for a model that is not served."""
    if name not in service.model_names:
        raise model_not_found(name, service.model_names)


def check_characters(service: Service, num_characters: int, param: str) -> None:
    """Refuses text that cannot fit, before time is spent on tokenising it."""
    limit = service.limits.characters(service.max_model_len)
    if num_characters > limit:
        raise InvalidRequest(
            f"the prompt has {num_characters} characters; at most {limit} are accepted",
            param=param,
            code="context_length_exceeded",
            reason="max_prompt_characters",
        )


def check_count(service: Service, num_prompts: int, n: int) -> None:
    """Bounds the work one request may ask for; before anything is multiplied."""
    most = service.limits.max_choices
    if num_prompts * n > most:
        raise InvalidRequest(
            f"{num_prompts} prompts with n {n} make {num_prompts * n} choices;"
            f" at most {most} per request",
            param="n",
            reason="max_choices",
        )


def make_choices(
    service: Service,
    body: GenerationBody,
    call_id: str,
    prompts: Sequence[tuple[int, ...]],
    *,
    usual_max_tokens: int | None,
    constraint: Constraint | None = None,
) -> tuple[Choice, ...]:
    """The generations that a request asks for, `n` per prompt, checked against the limits.

    usual_max_tokens: for requests that name none where generation_config.json does not either;
    None is all that is left of max_model_len.
    """
    requests: list[NewRequest] = []
    for number, prompt in enumerate(prompts):
        check_ids(service, prompt, body.prompt_field)
        params = _sampling(service, body, prompt, usual_max_tokens)
        if constraint is not None and constraint.grammar is not None:
            check_together(params)
        requests += new_requests(
            f"{call_id}-{number}",
            prompt,
            params,
            eos_token_ids=service.eos_token_ids,
            room=service.max_model_len - len(prompt),
            priority=body.priority,
            cache_salt=body.cache_salt or "",
            constraint=constraint,
        )
    return tuple(Choice(index, new) for index, new in enumerate(requests))


def _sampling(
    service: Service,
    body: GenerationBody,
    prompt: tuple[int, ...],
    usual_max_tokens: int | None,
) -> SamplingParams:
    check_ids(service, body.stop_token_ids, "stop_token_ids")
    asked = {name: getattr(body, name) for name in _RECOMMENDED}
    params = replace(
        service.defaults,
        n=body.n,
        frequency_penalty=body.frequency_penalty,
        presence_penalty=body.presence_penalty,
        logit_bias=body.logit_bias,
        max_tokens=_fit(service, body, prompt, service.defaults.max_tokens or usual_max_tokens),
        min_tokens=body.min_tokens,
        seed=secrets.randbits(62) if body.seed is None else body.seed,
        stop=body.stop,
        stop_token_ids=tuple(body.stop_token_ids),
        ignore_eos=body.ignore_eos,
        include_stop_str_in_output=body.include_stop_str_in_output,
        logprobs=body.asked_logprobs,
        **{name: value for name, value in asked.items() if value is not None},
    )
    check_ids(service, [token for token, _ in params.biases], "logit_bias")
    return params


def _fit(service: Service, body: GenerationBody, prompt: tuple[int, ...], usual: int | None) -> int:
    """max_tokens: as asked if prompt and output fit; otherwise the usual, cut to what is left."""
    asked = body.asked_max_tokens
    if not prompt:
        message = "the prompt has no tokens; give at least one to continue from"
        raise InvalidRequest(message, param=body.prompt_field)
    left = service.max_model_len - len(prompt)
    if left < 1 or (asked is not None and asked > left):
        raise InvalidRequest(
            f"the prompt has {len(prompt)} tokens and {asked or 1} are to be generated, but"
            f" max_model_len is {service.max_model_len}; shorten the prompt or lower max_tokens",
            param=body.prompt_field if left < 1 else "max_tokens",
            code="context_length_exceeded",
            reason="max_model_len",
        )
    if asked is not None:
        return asked
    return left if usual is None else min(usual, left)


def check_ids(service: Service, ids: Sequence[int], param: str) -> None:
    """The device clamps an index out of range silently, so none may reach it."""
    if ids and not (min(ids) >= 0 and max(ids) < service.vocab_size):
        wrong = next(t for t in ids if not 0 <= t < service.vocab_size)
        raise InvalidRequest(
            f"token id {wrong} in {param} is not in [0, {service.vocab_size})", param=param
        )
