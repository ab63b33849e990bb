"""Carries the engine's outputs from its thread to the asyncio tasks that wait for them.

The engine thread makes one call into the event loop per step, whatever the number of requests;
the loop sorts the step's outputs into one mailbox per HTTP call.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from duetjax.policy.request import RequestOutput, StepOutputs
from duetjax.serve.errors import HttpError


class Arrival(NamedTuple):
    """An output and when the engine handed it over, in seconds of time.perf_counter."""

    output: RequestOutput
    at: float


type Mail = Arrival | HttpError


class Mailbox:
    """What has come for one HTTP call, in order; for one task of the event loop to take out.

    Waiting costs no timer of its own: one is set and, when it rings, set again for what is left.
    """

    def __init__(self) -> None:
        self._mail: deque[Mail] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._until = math.inf

    def __len__(self) -> int:
        return len(self._mail)

    def put(self, mail: Mail) -> None:
        """Adds a piece, and wakes who waits."""
        self._mail.append(mail)
        self._wake()

    def take(self) -> Mail:
        """The oldest piece, of an empty box none: `IndexError`."""
        return self._mail.popleft()

    async def wait(self, seconds: float) -> None:
        """Until something comes, or for so long; not to end earlier than a wait before it."""
        loop = asyncio.get_running_loop()
        self._until = loop.time() + seconds
        if self._timer is None:
            self._timer = loop.call_at(self._until, self._ring)
        self._waiter = loop.create_future()
        await self._waiter

    def close(self) -> None:
        """Nobody waits any more."""
        if self._timer is not None:
            self._timer.cancel()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _ring(self) -> None:
        loop = asyncio.get_running_loop()
        if loop.time() < self._until:
            self._timer = loop.call_at(self._until, self._ring)
        else:
            self._timer = None
            self._wake()


class Dispatcher:
    """Mailboxes by engine request id. All but `on_outputs` is for the event loop's thread."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._mailboxes: dict[str, Mailbox] = {}
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

    def subscribe(self, ids: Iterable[str]) -> Mailbox:
        """One mailbox for all of `ids`; raises the failure if every call has been given up."""
        if self._failure is not None:
            raise self._failure
        mailbox = Mailbox()
        self._mailboxes.update(dict.fromkeys(ids, mailbox))
        return mailbox

    def unsubscribe(self, ids: Iterable[str]) -> None:
        """Ends a subscription; outputs that still come for these ids are dropped."""
        for request_id in ids:
            self._mailboxes.pop(request_id).close()

    @property
    def num_waiting(self) -> int:
        """Requests whose outputs somebody waits for."""
        return len(self._mailboxes)

    def give_up(self, failure: HttpError) -> None:
        """Ends every call, present and to come, with `failure`."""
        self._failure = failure
        for mailbox in set(self._mailboxes.values()):
            mailbox.put(failure)

    def _deliver(self, outputs: StepOutputs, at: float) -> None:
        for output in outputs:
            if (mailbox := self._mailboxes.get(output.id)) is not None:
                mailbox.put(Arrival(output, at))
