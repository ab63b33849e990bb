"""Carries the engine's outputs from its thread to the asyncio tasks that wait for them.

The engine thread makes one call into the event loop per step, whatever the number of requests;
the loop sorts the step's outputs into one queue per HTTP call.
"""

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass

from duetjax.policy.request import RequestOutput, StepOutputs
from duetjax.serve.errors import HttpError


@dataclass(frozen=True, slots=True)
class Arrival:
    """An output and when the engine handed it over, in seconds of time.perf_counter."""

    output: RequestOutput
    at: float


type Mail = Arrival | HttpError


class Dispatcher:
    """Queues by engine request id. All but `on_outputs` is for the event loop's thread."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._queues: dict[str, asyncio.Queue[Mail]] = {}
        self._failure: HttpError | None = None

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        """Names the loop that outputs go to; before the engine starts."""
        self._loop = loop

    def on_outputs(self, outputs: StepOutputs) -> None:
        """Takes one step's outputs; called by the engine thread, returns at once."""
        assert self._loop is not None, "bind() before the engine starts"
        try:
            self._loop.call_soon_threadsafe(self._deliver, outputs, time.perf_counter())
        except RuntimeError:
            if not self._loop.is_closed():  # closed: the server is gone and nobody waits
                raise

    def subscribe(self, ids: Iterable[str]) -> asyncio.Queue[Mail]:
        """One queue for all of `ids`; raises the failure if every call has been given up."""
        if self._failure is not None:
            raise self._failure
        queue: asyncio.Queue[Mail] = asyncio.Queue()
        self._queues.update(dict.fromkeys(ids, queue))
        return queue

    def unsubscribe(self, ids: Iterable[str]) -> None:
        """Ends a subscription; outputs that still come for these ids are dropped."""
        for request_id in ids:
            del self._queues[request_id]

    @property
    def num_waiting(self) -> int:
        """Requests whose outputs somebody waits for."""
        return len(self._queues)

    def give_up(self, failure: HttpError) -> None:
        """Ends every call, present and to come, with `failure`."""
        self._failure = failure
        for queue in set(self._queues.values()):
            queue.put_nowait(failure)

    def _deliver(self, outputs: StepOutputs, at: float) -> None:
        for output in outputs:
            if (queue := self._queues.get(output.id)) is not None:
                queue.put_nowait(Arrival(output, at))
