"""The outermost layer of the app: request ids on every response, 500s in the house's shape."""

import logging
import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from duetjax.serve.errors import error_response, internal_error

_log = logging.getLogger(__name__)
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class RequestIds:
    """Middleware that echoes x-request-id, or makes one up where none or a bad one was sent.

    The id only names the request to its client: two requests with the same one do not meet.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs the app; an exception that nobody expected becomes a 500 and a log entry."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        has_begun = False

        async def send_with_id(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            if has_begun:
                raise
            _log.exception("request %s failed: %s %r", request_id, scope["method"], scope["path"])
            await error_response(internal_error())(scope, receive, send_with_id)
