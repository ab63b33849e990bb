"""Bearer keys: nothing but what is listed here is public once the server has a key."""

import hmac
from collections.abc import Callable, Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from duetjax.serve.errors import HttpError, error_response

PUBLIC_PATHS = frozenset({"/", "/livez", "/readyz", "/health"})


class BearerAuth:
    """Middleware that answers 401 to a request without the key; None as key lets all in.

    It compares the whole path as it came, so no spelling of a private path is public. also_public:
    beside `PUBLIC_PATHS`. refuse: told of each that is turned away.
    """

    def __init__(
        self,
        app: ASGIApp,
        api_key: str | None,
        also_public: Collection[str],
        refuse: Callable[[str], None],
    ) -> None:
        self._app = app
        self._expected = None if api_key is None else api_key.encode()
        self._public = PUBLIC_PATHS.union(also_public)
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes on lifespan events and authorised requests."""
        if scope["type"] != "http" or self._is_allowed(scope):
            await self._app(scope, receive, send)
            return
        error = HttpError(
            401,
            "invalid_api_key",
            "missing or wrong API key; send it as 'Authorization: Bearer KEY'",
            headers={"www-authenticate": "Bearer"},
        )
        self._refuse(error.reason)
        await error_response(error)(scope, receive, send)

    def _is_allowed(self, scope: Scope) -> bool:
        if self._expected is None or scope["path"] in self._public:
            return True
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        # latin-1 is how ASGI headers were decoded, so this gives back the client's bytes
        matches = hmac.compare_digest(key.strip().encode("latin-1"), self._expected)
        return matches and scheme.lower() == "bearer"
