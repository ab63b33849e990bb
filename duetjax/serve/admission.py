"""Who may start work: counts calls in flight, and turns new ones away once the server drains."""

import asyncio
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from duetjax.serve.errors import HttpError


class Admission:
    """The door for work; used on the event loop's thread only."""

    def __init__(self) -> None:
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._drain_ends: float | None = None

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Counts one call while it is open; raises a 503 if the server is shutting down."""
        self.check_open()
        self._in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()

    @property
    def in_flight(self) -> int:
        """Calls being answered."""
        return self._in_flight

    @property
    def is_open(self) -> bool:
        """Whether new work is taken: the server does not drain."""
        return self._drain_ends is None

    def check_open(self) -> None:
        """Raises the 503 that new work and health checks get while the server drains."""
        if self._drain_ends is not None:
            left = max(1, math.ceil(self._drain_ends - time.monotonic()))
            raise shutting_down({"retry-after": str(left)})

    def close(self, drain_seconds: float) -> None:
        """Admits nothing from now on; what is in flight has `drain_seconds` to finish."""
        self._drain_ends = time.monotonic() + drain_seconds

    async def wait_idle(self, seconds: float) -> bool:
        """Waits until nothing is in flight; False if that took longer than `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True


def shutting_down(headers: dict[str, str] | None = None) -> HttpError:
    """503 for work that a server about to exit refuses, or gives up."""
    return HttpError(503, "shutting_down", "the server is shutting down", headers=headers)
