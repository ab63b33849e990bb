"""The page at /: one file with everything in it, which talks to the server that it came from."""

import base64
import hashlib
import importlib.resources
import re

from starlette.requests import Request
from starlette.responses import Response

PATH = "/"
_INLINE = re.compile(rb"<(style|script)>(.*?)</\1>", re.DOTALL)


class Page:
    """Serves index.html; a browser runs and draws nothing else, and asks nobody else.

    Public: without the key that the user types in, it cannot ask for anything.
    """

    def __init__(self) -> None:
        self._text = (importlib.resources.files(__name__) / "index.html").read_bytes()
        hashes = {kind: f"'sha256-{_hash(body)}'" for kind, body in _INLINE.findall(self._text)}
        policy = {
            "default-src": "'none'",
            "connect-src": "'self'",
            "style-src": hashes[b"style"],
            "script-src": hashes[b"script"],
            "base-uri": "'none'",
            "form-action": "'none'",
            "frame-ancestors": "'none'",
        }
        self._headers = {
            "content-security-policy": "; ".join(f"{name} {to}" for name, to in policy.items()),
            "cache-control": "no-cache",
            "referrer-policy": "no-referrer",
            "x-content-type-options": "nosniff",
        }

    async def answer(self, request: Request) -> Response:
        """The page, whatever the state of the engine."""
        return Response(self._text, media_type="text/html", headers=self._headers)


def _hash(body: bytes) -> str:
    return base64.b64encode(hashlib.sha256(body).digest()).decode()
