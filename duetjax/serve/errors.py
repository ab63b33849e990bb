"""Faults as HTTP responses: OpenAI's error object with its four keys, on every route and status."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from duetjax.config import InvalidRequest

_ROUTING_CODES = {404: "not_found", 405: "method_not_allowed"}


class HttpError(Exception):
    """A response other than success; `code` is what programs branch on, never empty."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.headers = headers


def model_not_found(name: str, served: tuple[str, ...]) -> HttpError:
    """404 for a model that is not this server's."""
    message = f"the model {name!r} does not exist here; served: {', '.join(served)}"
    return HttpError(404, "model_not_found", message, param="model")


def engine_dead(reason: str) -> HttpError:
    """500 for requests that a failed engine can no longer finish."""
    return HttpError(500, "engine_dead", reason)


def generation_failed() -> HttpError:
    """500 for a request that failed alone, in an engine that goes on."""
    return HttpError(500, "generation_failed", "the generation failed; see the server's log")


def internal_error() -> HttpError:
    """500 for a fault of this server; what it was stands in its log, not in the response."""
    return HttpError(500, "internal_error", "internal server error; see the server's log")


def error_object(error: HttpError) -> dict[str, Any]:
    """The body of an error response, and the data of an error event in a stream."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    return {
        "error": {
            "message": str(error),
            "type": kind,
            "param": error.param,
            "code": error.code,
        }
    }


def error_response(error: HttpError) -> Response:
    """The complete response to a request that failed before its response began."""
    return Response(
        orjson.dumps(error_object(error)),
        status_code=error.status,
        headers=error.headers,
        media_type="application/json",
    )


def as_http_error(fault: HttpError | InvalidRequest | HTTPException) -> HttpError:
    """Maps what routes, request parsing and the engine raise to a response."""
    if isinstance(fault, HttpError):
        return fault
    if isinstance(fault, InvalidRequest):
        return HttpError(400, fault.code, str(fault), param=fault.param)
    code = _ROUTING_CODES.get(fault.status_code, HTTPStatus(fault.status_code).name.lower())
    return HttpError(fault.status_code, code, fault.detail, headers=fault.headers)


async def handle_fault(request: Request, fault: Exception) -> Response:
    """Starlette's exception handler for the faults that `as_http_error` knows."""
    assert isinstance(fault, HttpError | InvalidRequest | HTTPException), fault
    error = as_http_error(fault)
    if isinstance(fault, HTTPException) and fault.status_code in _ROUTING_CODES:
        error.args = (f"{request.method} {request.url.path}: {fault.detail.lower()}",)
    return error_response(error)
