"""The outermost layer of the app: request ids on every response, 500s in the house's shape."""

import logging
import re
import uuid
from collections.abc import Callable, Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from duetjax.log_lines import current_request_id
from duetjax.serve.errors import HttpError, error_response, internal_error

_log = logging.getLogger(__name__)
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
# Where a body ends is then a matter of taste: a proxy's may differ, and let pass what hides behind.
_TWO_LENGTHS = {b"content-length", b"transfer-encoding"}


class RequestIds:
    """Middleware that echoes x-request-id, or makes one up where none or a bad one was sent.

    The id only names the request to its client: two requests with the same one do not meet.
    max_headers: of a request, others get 400; so do those with two ways to tell a body's length.
    refuse: told of each that failed here.
    """

    def __init__(self, app: ASGIApp, max_headers: int, refuse: Callable[[str], None]) -> None:
        self._app = app
        self._max_headers = max_headers
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs the app; an exception that nobody expected becomes a 500 and a log entry."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        current_request_id.set(request_id)  # for what is logged while it is answered
        has_begun = False

        async def send_with_id(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        error = _fault(scope["headers"], self._max_headers)
        if error is None:
            try:
                await self._app(scope, receive, send_with_id)
            except Exception:
                if has_begun:
                    raise
                method, path = scope["method"], scope["path"]
                _log.exception("request %s failed: %s %r", request_id, method, path)
                error = internal_error()
            else:
                return
        self._refuse(error.reason)
        await error_response(error)(scope, receive, send_with_id)


def _fault(headers: Sequence[tuple[bytes, bytes]], most: int) -> HttpError | None:
    """What is wrong with headers that h11 has let through."""
    if len(headers) > most:
        message = f"the request has {len(headers)} headers; at most {most} are accepted"
        return HttpError(400, "too_many_headers", message, reason="max_headers")
    if {name for name, _ in headers} >= _TWO_LENGTHS:
        return HttpError(
            400,
            "malformed_http",
            "the request has both Content-Length and Transfer-Encoding; send one of them",
            headers={"connection": "close"},
        )
    return None
