"""Requests that wait for a slot, by priority and age; and those that wait for a twin's page."""

from heapq import heappop, heappush

from duetjax.policy.prefix_cache import Place
from duetjax.policy.request import NewRequest, Phase, Rank, Request

AGEING_SECONDS = 10.0
"""One step of priority is worth this much waiting, so that nothing waits for ever."""


def rank(new: NewRequest, now: float, sequence: int) -> Rank:
    """A place in line that never changes: arrival, later by AGEING_SECONDS per step of priority."""
    return (now + new.priority * AGEING_SECONDS, sequence)


class WaitingQueue:
    """A heap of waiting requests, from which ended ones vanish; beside it, those put off.

    A request is put off while another computes the very page that it would compute first: it waits
    for that page, not for the queue.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[Rank, Request]] = []
        self._computing: dict[Place, list[Request]] = {}
        self._num_waiting = 0
        self.num_tokens = 0  # of the prompts that wait

    def __len__(self) -> int:
        return self._num_waiting

    def add(self, request: Request) -> None:
        """Lines up a request of phase WAITING, new or preempted."""
        assert request.phase is Phase.WAITING, request
        self._num_waiting += 1
        self.num_tokens += len(request.new.prompt)
        heappush(self._heap, (request.rank, request))

    def first(self) -> Request | None:
        """Whose turn it is."""
        while self._heap and self._heap[0][1].phase is not Phase.WAITING:
            heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    def pop(self) -> Request:
        """Takes the first one out."""
        request = heappop(self._heap)[1]
        self.forget(request)
        return request

    def forget(self, request: Request) -> None:
        """A request no longer waits; its phase tells those in line."""
        self._num_waiting -= 1
        self.num_tokens -= len(request.new.prompt)

    def put_off_first(self, twin: Place) -> bool:
        """Sets the first one aside if somebody computes `twin`, until `computed` says so."""
        others = self._computing.get(twin)
        if others is None:
            return False
        others.append(heappop(self._heap)[1])
        return True

    def computing(self, twin: Place) -> bool:
        """Somebody begins to compute a page; False if somebody else does already."""
        if twin in self._computing:
            return False
        self._computing[twin] = []
        return True

    def computed(self, twin: Place) -> None:
        """The page is there, or never will be: whoever waits for it is back in line."""
        for request in self._computing.pop(twin):
            heappush(self._heap, (request.rank, request))

    def waiting(self) -> list[Request]:
        """All of them, for tests and for debugging."""
        everyone = [request for _, request in self._heap]
        everyone += [request for others in self._computing.values() for request in others]
        return [request for request in everyone if request.phase is Phase.WAITING]
