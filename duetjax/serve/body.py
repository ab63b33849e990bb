"""Request bodies, bounded while they arrive, then JSON objects; and JSON as an answer."""

from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from duetjax.config import InvalidRequest
from duetjax.serve.errors import HttpError

MAX_BODY_BYTES = 2 * 2**20


async def read_json(request: Request) -> dict[str, Any]:
    """The body as a JSON object.

    413 for more than `MAX_BODY_BYTES`, before it is read where Content-Length tells; 400 for
    what is not a JSON object, which includes NaN, bad UTF-8, lone surrogates and deep nesting.
    """
    return _parse(await _read(request))


async def _read(request: Request) -> bytes:
    declared = request.headers.get("content-length")  # its syntax is h11's business
    if declared is not None and int(declared) > MAX_BODY_BYTES:
        raise _too_large()
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise _too_large()
    return bytes(body)


def json_response(value: object) -> Response:
    """An answer as JSON."""
    return Response(orjson.dumps(value), media_type="application/json")


def _too_large() -> HttpError:
    return HttpError(
        413, "body_too_large", f"the request body is larger than {MAX_BODY_BYTES} bytes"
    )


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
