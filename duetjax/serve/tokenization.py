"""POST /tokenize and /detokenize: text to token ids and back, as vLLM has them."""

import asyncio
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import FailFast, Field
from starlette.requests import Request
from starlette.responses import Response

from duetjax.config import InvalidRequest
from duetjax.serve.body import json_response, read_json
from duetjax.serve.call import check_characters, check_ids, check_model
from duetjax.serve.chat import encode_messages
from duetjax.serve.context import Context, Service
from duetjax.serve.protocol import MAX_MESSAGES, Body, Message, parsed

MOST_TOKENS_A_POSITION = 8
"""Token ids that /detokenize takes, times max_model_len: as many as text it may come from."""


class TokenizeBody(Body):
    """A prompt, or messages for the chat template."""

    model: str
    prompt: str | None = None
    messages: Annotated[list[Message], Field(max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, bool | str] = Field(default_factory=dict)


class DetokenizeBody(Body):
    """Token ids."""

    model: str
    tokens: Annotated[list[int], FailFast()]


class TokenizationEndpoint:
    """One of the two routes; tokenising may take long, so it is done in a thread."""

    def __init__(
        self, context: Context, answer: Callable[[Service, dict[str, Any]], dict[str, Any]]
    ) -> None:
        self._context = context
        self._compute = answer

    async def answer(self, request: Request) -> Response:
        """Answers one request; raises `InvalidRequest` or `HttpError`."""
        with self._context.admission.admit():
            body = await read_json(request)
            answer = await asyncio.to_thread(self._compute, self._context.service, body)
        return json_response(answer)


def tokenize(service: Service, given: dict[str, Any]) -> dict[str, Any]:
    """The ids of a prompt, or of messages as the chat template writes them."""
    body = parsed(TokenizeBody, given)
    check_model(service, body.model)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("give prompt or messages, one of them", param="prompt")
    if body.prompt is not None:
        check_characters(service, len(body.prompt), "prompt")
        special = body.add_special_tokens
        tokens = service.tokenizer.encode(body.prompt, add_special_tokens=special)
    else:
        assert body.messages is not None
        tokens = encode_messages(
            service,
            body.messages,
            body.chat_template_kwargs,
            add_generation_prompt=body.add_generation_prompt,
        )
    return {"count": len(tokens), "max_model_len": service.max_model_len, "tokens": tokens}


def detokenize(service: Service, given: dict[str, Any]) -> dict[str, Any]:
    """The text of token ids, special tokens spelled out."""
    body = parsed(DetokenizeBody, given)
    check_model(service, body.model)
    most = MOST_TOKENS_A_POSITION * service.max_model_len
    if len(body.tokens) > most:
        raise InvalidRequest(
            f"tokens has {len(body.tokens)} ids; at most {most} are possible", param="tokens"
        )
    check_ids(service, body.tokens, "tokens")
    return {"prompt": service.tokenizer.decode(body.tokens, skip_special_tokens=False)}
