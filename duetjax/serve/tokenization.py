"""POST /tokenize and /detokenize: text to token ids and back, as vLLM has them."""

import asyncio
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import FailFast, Field, WithJsonSchema
from starlette.requests import Request
from starlette.responses import Response

from duetjax.config import InvalidRequest
from duetjax.serve.body import json_response, read_json
from duetjax.serve.call import check_characters, check_ids, check_model
from duetjax.serve.chat import encode_messages
from duetjax.serve.context import Context, Service
from duetjax.serve.fields import Body, parsed
from duetjax.serve.protocol import TEXT, Messages, ModelName, TokenId, ignored_header

MOST_TOKENS_A_POSITION = 8
"""Token ids that /detokenize takes, times max_model_len: as many as text it may come from."""


class TokenizeBody(Body):
    """A prompt, or messages for the chat template."""

    model: ModelName
    prompt: Annotated[str, WithJsonSchema(TEXT)] | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, bool | str] = Field(default_factory=dict)


class DetokenizeBody(Body):
    """Token ids."""

    model: ModelName
    tokens: Annotated[
        list[TokenId], FailFast(), Field(json_schema_extra={"maxItems": "max_detokenized"})
    ]


class TokenizationEndpoint:
    """One of the two routes; tokenising may take long, so it is done in a thread."""

    def __init__(
        self, context: Context, compute: Callable[[Service, dict[str, Any]], Response]
    ) -> None:
        self._context = context
        self._compute = compute

    async def answer(self, request: Request) -> Response:
        """Answers one request; raises `InvalidRequest` or `HttpError`."""
        with self._context.admission.admit():
            body = await read_json(request, self._context.service.limits)
            return await asyncio.to_thread(self._compute, self._context.service, body)


def tokenize(service: Service, given: dict[str, Any]) -> Response:
    """The ids of a prompt, or of messages as the chat template writes them."""
    body = parsed(TokenizeBody, given, service.limits)
    headers = ignored_header(body, strict=service.strict_params)
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
    answer = {"count": len(tokens), "max_model_len": service.max_model_len, "tokens": tokens}
    return json_response(answer, headers)


def detokenize(service: Service, given: dict[str, Any]) -> Response:
    """The text of token ids, special tokens spelled out."""
    body = parsed(DetokenizeBody, given, service.limits)
    headers = ignored_header(body, strict=service.strict_params)
    check_model(service, body.model)
    most = MOST_TOKENS_A_POSITION * service.max_model_len
    if len(body.tokens) > most:
        raise InvalidRequest(
            f"tokens has {len(body.tokens)} ids; at most {most} are possible", param="tokens"
        )
    check_ids(service, body.tokens, "tokens")
    text = service.tokenizer.decode(body.tokens, skip_special_tokens=False)
    return json_response({"prompt": text}, headers)
