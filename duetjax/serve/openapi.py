"""GET /openapi.json: what this server takes and answers, with its own limits, as OpenAPI 3.1."""

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from importlib.metadata import version
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from duetjax.serve.auth import PUBLIC_PATHS
from duetjax.serve.context import Service
from duetjax.serve.objectives import MILLISECONDS, TBT_HEADERS, TTFT_HEADERS
from duetjax.serve.openapi_schemas import Schema, schemas
from duetjax.serve.timings import TIMINGS_HEADER
from duetjax.serve.tracing import MAX_SECONDS

_CODES: Mapping[int, tuple[str, ...]] = {
    400: (
        *("invalid_value", "unsupported_parameter", "context_length_exceeded"),
        *("chat_template_failed", "too_many_headers", "malformed_http", "constraint_failed"),
    ),
    401: ("invalid_api_key",),
    404: ("model_not_found", "not_found"),
    405: ("method_not_allowed",),
    408: ("request_timeout",),
    413: ("body_too_large",),
    429: ("queue_full", "too_many_watchers"),
    500: ("internal_error", "engine_dead", "non_finite_logits"),
    503: ("shutting_down", "queue_full", "deadline_exceeded", "engine_dead"),
    504: ("deadline_exceeded",),
}
"""What answers that are no success may have as `code`, by status."""

_ANYWHERE = (400, 405, 408, 500)
_WORK = (404, 413, 503)
_JSON, _EVENTS = "application/json", "text/event-stream"
_RETRY_AFTER = {"retry-after": {"schema": {"type": "string", "pattern": "^[0-9]+$"}}}
_HEADERS: Mapping[int, Schema] = {
    401: {"www-authenticate": {"schema": {"const": "Bearer"}, "required": True}},
    405: {"allow": {"schema": {"type": "string"}, "required": True}},
    429: _RETRY_AFTER,
    503: _RETRY_AFTER,
}


@dataclass(frozen=True, slots=True)
class _Operation:
    """A route's method. answers: schemas of a success by media type. faults: beside `_ANYWHERE`.

    body: the name of its schema; example: of one, but for the model.
    """

    name: str
    summary: str
    answers: Mapping[str, Schema]
    faults: tuple[int, ...] = ()
    body: str | None = None
    example: Mapping[str, Any] = field(default_factory=dict)
    parameters: tuple[Schema, ...] = ()


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _events(name: str) -> Schema:
    """Of each event of a stream, as OpenAPI 3.1 has no word for the stream."""
    told = {
        "type": "string",
        "contentMediaType": _JSON,
        "contentSchema": {"anyOf": [_ref(name), _ref("Error")]},
    }
    return {
        "description": "One event; [DONE] is the last, an error ends what has begun.",
        "type": "object",
        "properties": {"data": {"anyOf": [{"const": "[DONE]"}, told]}},
        "required": ["data"],
    }


def _objective(what: str, name: str, *aliases: str) -> Schema:
    also = "".join(f" {alias} is the same." for alias in aliases)
    return {
        "name": name,
        "in": "header",
        "description": f"Objective for the time {what}, in milliseconds.{also}",
        "schema": {"type": "string", "pattern": f"^{MILLISECONDS.pattern}$"},
    }


_OBJECTIVES = (
    _objective("to the first token", *TTFT_HEADERS),
    _objective("between tokens", *TBT_HEADERS),
)
_TIMINGS: Schema = {
    "name": TIMINGS_HEADER,
    "in": "header",
    "description": "1: the answer, or its last event but one, has a field duetjax_timings.",
    "schema": {"enum": ["0", "1"]},
}
_MODEL_ID = {"name": "id", "in": "path", "required": True, "schema": _ref("ModelName")}
_WINDOW = {
    "name": "seconds",
    "in": "query",
    "description": "How long to look.",
    "schema": {"type": "number", "exclusiveMinimum": 0, "maximum": MAX_SECONDS, "default": 5},
}
_TURNS = [{"role": "user", "content": "What is TTFT?"}]

_OPERATIONS: Mapping[tuple[str, str], _Operation] = {
    ("POST", "/v1/completions"): _Operation(
        "createCompletion",
        "Continue prompts",
        {_JSON: _ref("Completion"), _EVENTS: _events("CompletionChunk")},
        (*_WORK, 429, 504),
        "CompletionBody",
        {"prompt": "Prefill is", "max_tokens": 8},
        (*_OBJECTIVES, _TIMINGS),
    ),
    ("POST", "/v1/chat/completions"): _Operation(
        "createChatCompletion",
        "Answer a conversation",
        {_JSON: _ref("ChatCompletion"), _EVENTS: _events("ChatCompletionChunk")},
        (*_WORK, 429, 504),
        "ChatBody",
        {"messages": _TURNS, "max_tokens": 8},
        (*_OBJECTIVES, _TIMINGS),
    ),
    ("GET", "/v1/models"): _Operation("listModels", "What is served", {_JSON: _ref("ModelList")}),
    ("GET", "/v1/models/{id}"): _Operation(
        "retrieveModel", "One of them", {_JSON: _ref("Model")}, (404,), parameters=(_MODEL_ID,)
    ),
    ("GET", "/v1/limits"): _Operation(
        "retrieveLimits", "What a request may hold", {_JSON: _ref("Limits")}
    ),
    ("POST", "/tokenize"): _Operation(
        "tokenize",
        "Token ids of a prompt or of messages: give one of them",
        {_JSON: _ref("Tokenized")},
        _WORK,
        "TokenizeBody",
        {"prompt": "Prefill is"},
    ),
    ("POST", "/detokenize"): _Operation(
        "detokenize",
        "Text of token ids",
        {_JSON: _ref("Detokenized")},
        _WORK,
        "DetokenizeBody",
        {"tokens": [1, 2]},
    ),
    ("GET", "/livez"): _Operation(
        "livez", "Should the process go on?", {_JSON: _ref("Liveness")}, (503,)
    ),
    ("GET", "/readyz"): _Operation(
        "readyz", "Should work be sent here now?", {_JSON: _ref("Health")}, (503,)
    ),
    ("GET", "/health"): _Operation(
        "health", "Can work be done here?", {_JSON: _ref("Health")}, (503,)
    ),
    ("GET", "/metrics"): _Operation(
        "metrics", "Series for Prometheus", {"text/plain": {"type": "string"}}
    ),
    ("GET", "/debug/steps"): _Operation(
        "watchSteps",
        "Each launch as it completes, until the client leaves",
        {_EVENTS: _events("CompletedLaunch")},
        (429, 503),
    ),
    ("GET", "/debug/trace"): _Operation(
        "trace",
        "Launches and requests of the next seconds, in the Trace Event Format",
        {_JSON: {"type": "object", "required": ["traceEvents", "otherData"]}},
        (429, 503),
        parameters=(_WINDOW,),
    ),
    ("GET", "/openapi.json"): _Operation(
        "retrieveOpenApi", "This document", {_JSON: {"type": "object"}}
    ),
    ("GET", "/"): _Operation(
        "showPage", "Chat and watch, in a browser", {"text/html": {"type": "string"}}
    ),
}


class OpenApiEndpoint:
    """The route of the document; it is made once, at the first request for it."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._written: bytes | None = None

    async def answer(self, request: Request) -> Response:
        """Answers one request."""
        if self._written is None:
            self._written = await asyncio.to_thread(self._write, request.app.routes)
        return Response(self._written, media_type=_JSON)

    def _write(self, routes: Iterable[BaseRoute]) -> bytes:
        """Takes a tenth of a second."""
        return orjson.dumps(document(self._service, routes))


def document(service: Service, routes: Iterable[BaseRoute]) -> dict[str, Any]:
    """The OpenAPI document of an app with these routes; each of their methods must be known here.

    HEAD, which every route for GET answers too, is left out.
    """
    paths: dict[str, Any] = {}
    for route in routes:
        assert isinstance(route, Route), route
        for method in sorted((route.methods or set()) - {"HEAD"}):
            described = _operation(service, method, route.path_format)
            paths.setdefault(route.path_format, {})[method.lower()] = described
    codes = tuple(dict.fromkeys(code for each in _CODES.values() for code in each))
    components: dict[str, Any] = {
        "schemas": schemas(service, codes),
        "responses": {f"Error{status}": _fault(status) for status in _CODES},
    }
    if service.api_key is not None:
        components["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "DuetJAX",
            "version": version("duetjax"),
            "description": "An LLM server with OpenAI's routes. Every answer has x-request-id.",
        },
        "paths": paths,
        "components": components,
    }


def _operation(service: Service, method: str, path: str) -> dict[str, Any]:
    told = _OPERATIONS[method, path]
    public = PUBLIC_PATHS.union(["/metrics"] if service.metrics_public else [])
    needs_key = service.api_key is not None and path not in public
    faults = sorted({*_ANYWHERE, *told.faults, *([401] if needs_key else [])})
    success = {
        "description": "Success",
        "content": {media: {"schema": schema} for media, schema in told.answers.items()},
    }
    if told.body is not None and not service.strict_params:
        ignored = "Unknown fields of the body."
        success["headers"] = {
            "x-duetjax-ignored": {"description": ignored, "schema": {"type": "string"}}
        }
    operation: dict[str, Any] = {
        "operationId": told.name,
        "summary": told.summary,
        "responses": {"200": success}
        | {str(status): {"$ref": f"#/components/responses/Error{status}"} for status in faults},
    }
    if told.parameters:
        operation["parameters"] = told.parameters
    if told.body is not None:
        operation["requestBody"] = {
            "description": f"At most {service.limits.max_body_bytes} bytes.",
            "required": True,
            "content": {
                _JSON: {
                    "schema": _ref(told.body),
                    "example": {"model": service.model_names[0], **told.example},
                }
            },
        }
    if needs_key:
        operation["security"] = [{"bearer": []}]
    return operation


def _fault(status: int) -> dict[str, Any]:
    described = {
        "description": f"{HTTPStatus(status).phrase}: {', '.join(_CODES[status])}",
        "content": {_JSON: {"schema": _ref("Error")}},
    }
    return described | ({"headers": _HEADERS[status]} if status in _HEADERS else {})
