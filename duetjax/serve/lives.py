"""Which requests are live and what becomes of them, for those who look on; nothing is kept."""

from collections.abc import Callable
from typing import Protocol

from duetjax.policy.request import FinishReason
from duetjax.trace_events import RequestLife

type LifeWatcher = Callable[[RequestLife], None]


class Teller(Protocol):
    """Who knows a live request. ended: by time.perf_counter, as all its times."""

    def life(  # noqa: D102
        self, request_id: str, finish: FinishReason | None = None, ended: float | None = None
    ) -> RequestLife: ...


class Lives:
    """Live requests by id. For the event loop's thread alone."""

    def __init__(self) -> None:
        self._tellers: dict[str, Teller] = {}
        self._watchers: list[LifeWatcher] = []

    def begin(self, request_id: str, teller: Teller) -> None:
        """A request has been submitted."""
        self._tellers[request_id] = teller

    def end(self, request_id: str, finish: FinishReason, ended: float) -> None:
        """A request has ended; while nobody watches that is not worth a word."""
        teller = self._tellers.pop(request_id)
        if self._watchers:
            life = teller.life(request_id, finish, ended)
            for watcher in self._watchers:
                watcher(life)

    def watch(self, watcher: LifeWatcher) -> Callable[[], None]:
        """Tells of each request as it ends, until what is returned here is called."""
        self._watchers.append(watcher)
        return lambda: self._watchers.remove(watcher)

    def now(self) -> list[RequestLife]:
        """Of all that are live."""
        return [teller.life(request_id) for request_id, teller in self._tellers.items()]
