"""POST /v1/completions: text or token ids in, their continuation out."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from duetjax.serve.call import Call, Delta, check_characters, check_count, check_model, make_choices
from duetjax.serve.context import Service
from duetjax.serve.form import completion_form
from duetjax.serve.logprobs import completion_logprobs
from duetjax.serve.protocol import CompletionBody, ignored_header
from duetjax.text.tokenizer import Tokenizer

_USUAL_MAX_TOKENS = 16  # OpenAI's


def prepare_completion(service: Service, given: dict[str, Any]) -> Call:
    """Checks and tokenises a request body; slow for long prompts, so not on the event loop.

    Raises `InvalidRequest` or `HttpError`.
    """
    body = CompletionBody.parse(given, service.limits)
    check_model(service, body.model)
    check_count(service, len(body.prompt), body.n)
    prompts = [_encode(service, prompt) for prompt in body.prompt]
    call_id = f"cmpl-{uuid.uuid4().hex}"
    form = completion_form(service, body.response_format)
    choices = make_choices(
        *(service, body, call_id, prompts),
        usual_max_tokens=_USUAL_MAX_TOKENS,
        constraint=form.constraint,
    )
    echoes = [_echo(service, prompt) for prompt in body.prompt] if body.echo else []
    reply = CompletionReply(
        head={"id": call_id, "object": "text_completion", "created": int(time.time())}
        | {"model": body.model},
        echoes=tuple(echoes[c.index // body.n] for c in choices) if body.echo else None,
        prompts=tuple(c.new.prompt for c in choices) if body.return_token_ids else None,
        logprobs_of=None if body.logprobs is None else service.tokenizer,
    )
    return Call(
        choices=choices,
        reply=reply,
        n=body.n,
        prompt_tokens=sum(map(len, prompts)),
        stream=body.stream,
        include_usage=body.stream_options is not None and body.stream_options.include_usage,
        headers=ignored_header(body, strict=service.strict_params),
        form=form,
    )


def _encode(service: Service, prompt: str | tuple[int, ...]) -> tuple[int, ...]:
    if not isinstance(prompt, str):
        return prompt
    check_characters(service, len(prompt), "prompt")
    return tuple(service.tokenizer.encode(prompt))


def _echo(service: Service, prompt: str | tuple[int, ...]) -> str:
    return prompt if isinstance(prompt, str) else service.tokenizer.decode(prompt)


@dataclass(frozen=True, slots=True)
class CompletionReply:
    """The text_completion objects of one call.

    echoes: per choice, the prompt's text to put before the output. prompts: per choice, the
    token ids to show where the client asked for token ids. logprobs_of: the tokenizer that names
    the tokens, where it asked for logprobs.
    """

    head: dict[str, Any]
    echoes: tuple[str, ...] | None
    prompts: tuple[tuple[int, ...], ...] | None
    logprobs_of: Tokenizer | None

    @property
    def is_text_only(self) -> bool:
        """Whether the client asked for neither token ids nor logprobs."""
        return self.prompts is None and self.logprobs_of is None

    def whole(self, choices: Sequence[Delta]) -> dict[str, Any]:
        """The response body, without usage."""
        whole = [self._choice(c, is_first=True) | self._logprobs(c) for c in choices]
        return self.head | {"choices": whole}

    def chunk(self, delta: Delta, *, is_first: bool) -> list[dict[str, Any]]:
        """One chunk, or none where there is nothing to tell."""
        choice = self._choice(delta, is_first=is_first)
        if delta.logprobs:
            choice |= self._logprobs(delta)
        elif not choice["text"] and delta.finish_reason is None and self.prompts is None:
            return []
        return [self.head | {"choices": [choice]}]

    def last(self) -> dict[str, Any]:
        """The chunk that carries usage."""
        return self.head | {"choices": []}

    def _choice(self, delta: Delta, *, is_first: bool) -> dict[str, Any]:
        echo = self.echoes[delta.index] if self.echoes and is_first else ""
        choice = {
            "index": delta.index,
            "text": echo + delta.text,
            "logprobs": None,
            "finish_reason": delta.finish_reason,
        }
        if self.prompts is not None:
            choice["token_ids"] = delta.token_ids
            if is_first:
                choice["prompt_token_ids"] = self.prompts[delta.index]
        return choice

    def _logprobs(self, delta: Delta) -> dict[str, Any]:
        if self.logprobs_of is None:
            return {}
        return {"logprobs": completion_logprobs(self.logprobs_of, delta.logprobs)}
