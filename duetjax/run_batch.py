"""Runs a batch: each request answered as the endpoint would, by the endpoint, without a socket."""

import asyncio
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from reprlib import repr as short
from typing import Any

import orjson
from starlette.types import ASGIApp, Message
from tqdm import tqdm

from duetjax.batch import CHAT, COMPLETIONS, BadLine, BatchRequest, ResultFile
from duetjax.config import InvalidRequest
from duetjax.engine import EngineDead
from duetjax.serve.app import create_app
from duetjax.serve.context import Service
from duetjax.serve.errors import HttpError, error_object
from duetjax.serve.limits import Limits
from duetjax.serve.protocol import ChatBody, CompletionBody, GenerationBody

_BODIES: Mapping[str, type[GenerationBody]] = {COMPLETIONS: CompletionBody, CHAT: ChatBody}


def run_batch(
    service: Service,
    requests: Iterable[BatchRequest | BadLine],
    output: ResultFile,
    total: int,
    max_in_flight: int,
) -> int:
    """Answers all requests, at most max_in_flight at a time; the number of those that failed.

    total: how many there are, for the progress bar.
    Starts the engine, which is the caller's to shut down. Raises `EngineDead` if it dies.
    """
    with tqdm(total=total, desc="generating", unit="request", disable=None) as bar:
        return asyncio.run(_run(service, iter(requests), output, bar, max_in_flight))


async def _run(
    service: Service,
    requests: Iterator[BatchRequest | BadLine],
    output: ResultFile,
    bar: "tqdm[Any]",
    max_in_flight: int,
) -> int:
    app, num_failed = create_app(service), 0

    async def work() -> None:
        nonlocal num_failed
        for request in requests:  # shared: whoever is free takes the next one
            result = await _answer(app, service, request)
            num_failed += result["error"] is not None
            output.add(request.line, result)
            bar.update()

    async with app.router.lifespan_context(app):
        await asyncio.gather(*(work() for _ in range(max_in_flight)))
    return num_failed


async def _answer(
    app: ASGIApp, service: Service, request: BatchRequest | BadLine
) -> dict[str, Any]:
    if isinstance(request, BadLine):
        return _result(request, None, _error(request.line, _http_error(request.error)["error"]))
    if request.body.get("model") is None:
        request.body["model"] = service.model_names[0]
    try:
        body = _checked_body(request, service.limits)
    except InvalidRequest as error:
        reply = _Reply(400, uuid.uuid4().hex, orjson.dumps(_http_error(error)))
    else:
        reply = await _post(app, request.url, body)
    if reply.status == 200:
        return _result(request, reply, None)
    if not service.client.is_healthy:
        raise EngineDead(f"the engine failed: {service.client.failure!r}")
    return _result(request, reply, _error(request.line, orjson.loads(reply.body)["error"]))


def _checked_body(request: BatchRequest, limits: Limits) -> bytes:
    """The body as JSON; refuses also what the endpoint would take and a batch does not."""
    body = _BODIES[request.url].parse(request.body, limits)
    if unknown := list(body.unknown_fields()):
        raise InvalidRequest(f"body has unknown fields: {short(unknown)}", param=unknown[0])
    if body.stream:
        raise InvalidRequest("stream: a batch does not stream; leave it out", param="stream")
    try:
        return orjson.dumps(request.body)
    except orjson.JSONEncodeError as error:  # it reads deeper nesting than it writes
        raise InvalidRequest(f"body cannot be passed on: {error}", param="body") from None


def _http_error(error: InvalidRequest) -> dict[str, Any]:
    return error_object(HttpError(400, error.code, str(error), param=error.param))


def _error(line: int, error: dict[str, Any]) -> dict[str, Any]:
    return {
        "code": error["code"],
        "message": f"line {line}: {error['message']}",
        "param": error["param"],
        "line": line,
    }


@dataclass(frozen=True, slots=True)
class _Reply:
    """An HTTP response; body: JSON."""

    status: int
    request_id: str
    body: bytes


def _result(
    request: BatchRequest | BadLine, reply: _Reply | None, error: dict[str, Any] | None
) -> dict[str, Any]:
    response = None
    if reply is not None:
        response = {
            "status_code": reply.status,
            "request_id": reply.request_id,
            "body": orjson.Fragment(reply.body),
        }
    return {
        "id": f"batch_req_{uuid.uuid4().hex}",
        "custom_id": request.custom_id,
        "response": response,
        "error": error,
    }


async def _post(app: ASGIApp, path: str, body: bytes) -> _Reply:
    """One request to the app without a socket."""
    request_id = uuid.uuid4().hex
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "root_path": "",
        "query_string": b"",
        "headers": [(b"x-request-id", request_id.encode())],
        "client": None,
        "server": None,
    }
    requests: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    replies: list[Message] = []

    async def receive() -> Message:
        if not requests:
            await asyncio.get_running_loop().create_future()  # this client never leaves
        return requests.pop()

    async def send(message: Message) -> None:
        replies.append(message)

    await app(scope, receive, send)
    start, *rest = replies
    return _Reply(start["status"], request_id, b"".join(part.get("body", b"") for part in rest))
