"""Faults as HTTP responses: OpenAI's error object with its four keys, on every route and status."""

from collections.abc import Mapping
from http import HTTPStatus
from reprlib import repr as short
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from duetjax.config import DuetJAXError, InvalidRequest
from duetjax.engine import Engine


class HttpError(Exception):
    """A response other than success; `code` is what programs branch on, never empty.

    reason: what it is counted under; None is the code.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        reason: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.headers = headers
        self.reason = reason or code


def model_not_found(name: str, served: tuple[str, ...]) -> HttpError:
    """404 for a model that is not this server's."""
    message = f"the model {short(name)} does not exist here; served: {', '.join(served)}"
    return HttpError(404, "model_not_found", message, param="model")


def engine_dead(reason: str) -> HttpError:
    """500 for requests that a failed engine can no longer finish."""
    return HttpError(500, "engine_dead", reason)


def not_running(client: Engine) -> str:
    """Why an engine takes no work, in words that anybody may read; the log has the others."""
    failure = client.failure
    reason = str(failure) if isinstance(failure, DuetJAXError) else "see the server's log"
    return f"the engine is not running: {reason}"


def non_finite_logits() -> HttpError:
    """500 for a request that failed alone, in an engine that goes on.

    The same request would most likely fail again, so official clients are told not to repeat it.
    """
    return HttpError(
        500,
        "non_finite_logits",
        "the model computed NaN or infinity for this request; other requests are not affected",
        headers={"x-should-retry": "false"},
    )


def constraint_failed(param: str) -> HttpError:
    """400 for an answer that could not go on under its grammar."""
    return HttpError(
        400,
        "constraint_failed",
        "the answer could not go on under its schema, which is too complex, or this model's"
        " tokenizer cannot be constrained, as the server's log says; simplify the schema",
        param=param,
        headers={"x-should-retry": "false"},
    )


def deadline_exceeded(
    status: int, why: str, limit: str, headers: Mapping[str, str] | None = None
) -> HttpError:
    """503 for a request that never began, to be sent again; 504 for one that took too long."""
    if status == 504:
        headers = {"x-should-retry": "false"}  # it would take as long once more
    return HttpError(status, "deadline_exceeded", why, headers=headers, reason=limit)


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


async def handle_fault(request: Request, fault: Exception) -> Response:
    """Starlette's exception handler for what routes, request parsing and the engine raise."""
    if isinstance(fault, InvalidRequest):
        fault = HttpError(400, fault.code, str(fault), param=fault.param, reason=fault.reason)
    elif isinstance(fault, HTTPException):
        status = HTTPStatus(fault.status_code)
        code = status.name.lower()
        message = f"{request.method} {request.scope['path'][:200]!r}: {status.phrase.lower()}"
        fault = HttpError(status, code, message, headers=fault.headers)
    assert isinstance(fault, HttpError), fault
    request.app.state.context.metrics.refuse(fault.reason)
    return error_response(fault)
