"""A benchmark's requests over HTTP, to a route of a server that speaks OpenAI's API."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Self

import orjson

from duetjax.bench_client import Client, ask, stream
from duetjax.bench_load import CHAT, Tokens, body_of
from duetjax.bench_run import Send
from duetjax.config import ConfigError

_ANSWER_SECONDS = 30.0
_ANY_VOCABULARY = 1000
"""Ids below it are taken to be in the vocabulary of a server that does not tell."""


class Endpoint:
    """Implements `bench_run.Target`; belongs to one event loop. extra: fields of every body."""

    def __init__(
        self, client: Client, path: str, model: str, vocab_size: int, extra: dict[str, Any]
    ) -> None:
        self.backend = "openai-chat" if path == CHAT else "openai"
        self.model, self.vocab_size = model, vocab_size
        self._client, self._path, self._extra = client, path, extra

    @classmethod
    async def find(
        cls, client: Client, path: str, model: str | None, extra: dict[str, Any]
    ) -> Self:
        """Asks the server what is not given. Raises `ConfigError`."""
        model = model or await first_model(client)
        vocab_size = _ANY_VOCABULARY if path == CHAT else await _vocab_size(client)
        return cls(client, path, model, vocab_size, extra)

    def body(self, prompt: Tokens, num_tokens: int) -> bytes:
        """See `Target`."""
        return body_of(self._path, self.model, prompt, num_tokens, self._extra)

    @asynccontextmanager
    async def opened(self, body: bytes) -> AsyncGenerator[Send]:
        """See `Target`; the connection is open then."""
        connection = await self._client.connect()
        try:
            yield partial(stream, connection, self._path, body)
        finally:
            connection.close()


# What the server says of itself.


async def first_model(client: Client) -> str:
    """The name under which the server serves a model. Raises `ConfigError`."""
    models = (await _asked(client, "/v1/models")).get("data")
    if not models:
        raise ConfigError(f"{client.address.base_url}/v1/models names no model; give --model")
    return str(models[0]["id"])


async def _vocab_size(client: Client) -> int:
    """What the schema of a prompt's ids at /openapi.json allows; where it says nothing, a guess."""
    try:
        document = await _asked(client, "/openapi.json")
        ways = document["components"]["schemas"]["CompletionBody"]["properties"]["prompt"]["anyOf"]
        [ids] = [way["items"] for way in ways if "maximum" in way.get("items", ())]
        return int(ids["maximum"]) + 1
    except (ConfigError, KeyError, TypeError, ValueError):
        return _ANY_VOCABULARY


async def _asked(client: Client, path: str) -> dict[str, Any]:
    where = f"{client.address.base_url}{path}"
    try:
        async with asyncio.timeout(_ANSWER_SECONDS):
            answer = await ask(client, "GET", path)
    except OSError as error:
        why = error.strerror or str(error) or "no answer"
        raise ConfigError(f"{where}: {why}; start `duetjax serve`, or give --base-url") from None
    if answer.status in (401, 403):
        raise ConfigError(f"{where}: {answer.status}; give --api-key, or set OPENAI_API_KEY")
    try:
        document = orjson.loads(answer.body)
    except orjson.JSONDecodeError:
        document = None
    if answer.status != 200 or not isinstance(document, dict):
        raise ConfigError(f"{where}: {answer.status}; is this an OpenAI-compatible server?")
    return document
