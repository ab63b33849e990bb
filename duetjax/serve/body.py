"""Request bodies, bounded while they arrive, then JSON objects; and JSON as an answer."""

import asyncio
from collections.abc import Mapping
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from duetjax.config import InvalidRequest
from duetjax.serve.errors import HttpError
from duetjax.serve.limits import Limits


async def read_json(request: Request, limits: Limits) -> dict[str, Any]:
    """The body as a JSON object.

    413 for more than max_body_bytes, before it is read where Content-Length tells; 408 where it
    takes longer than body_timeout_s; 400 for what is not a JSON object, which includes NaN, bad
    UTF-8, lone surrogates and deep nesting.
    """
    try:
        async with asyncio.timeout(limits.body_timeout_s or None):
            return _parse(await _read(request, limits.max_body_bytes))
    except TimeoutError:
        raise HttpError(
            408,
            "request_timeout",
            f"the request body did not come within {limits.body_timeout_s:g} s",
            headers={"connection": "close"},
            reason="body_timeout_s",
        ) from None


async def _read(request: Request, most: int) -> bytes:
    declared = request.headers.get("content-length")  # its syntax is h11's business
    if declared is not None and int(declared) > most:
        raise _too_large(most)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise _too_large(most)
    return bytes(body)


def json_response(value: object, headers: Mapping[str, str] | None = None) -> Response:
    """An answer as JSON."""
    return Response(orjson.dumps(value), headers=headers, media_type="application/json")


def _too_large(most: int) -> HttpError:
    message = f"the request body is larger than {most} bytes"
    return HttpError(413, "body_too_large", message, reason="max_body_bytes")


def _parse(body: bytes) -> dict[str, Any]:
    if not body:
        raise InvalidRequest("the request body is empty; send a JSON object")
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the request body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidRequest(f"the request body must be a JSON object, not {_KINDS[type(value)]}")
    return value


_KINDS = {
    list: "an array",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "a boolean",
    type(None): "null",
}
