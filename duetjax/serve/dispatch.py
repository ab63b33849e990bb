"""Carries the engine's outputs from its thread to the asyncio tasks that wait for them.

The engine thread makes one call into the event loop per step, whatever the number of requests;
the loop sorts the step's outputs into one mailbox per HTTP call.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Iterable

from duetjax.policy.request import RequestOutput, StepOutputs
from duetjax.serve.errors import HttpError

type Arrival = tuple[RequestOutput, float]
"""An output and when the engine handed it over, in seconds of time.perf_counter."""

type Mail = Arrival | HttpError


class Mailbox:
    """Outputs on their way to one HTTP call, for one task of the event loop.

    mail: what has come, to be taken out from the left. A wait sets no timer where one rings before
    its end: that is then set again for what is left.
    """

    def __init__(self) -> None:
        self.mail: deque[Mail] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._until = math.inf
        self._timer: asyncio.TimerHandle | None = None
        self._rings_at = math.inf

    def put(self, mail: Mail) -> None:
        """Adds a piece, and wakes who waits."""
        self.mail.append(mail)
        self._wake()

    async def wait(self, until: float) -> None:
        """Returns when something more comes, or at a time of time.perf_counter."""
        self._until = until
        if until < self._rings_at:
            self._set_timer()
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter

    def close(self) -> None:
        """Stops the timer: nobody waits any more."""
        if self._timer is not None:
            self._timer.cancel()

    def _set_timer(self) -> None:
        self.close()
        self._rings_at = self._until
        seconds = self._until - time.perf_counter()
        self._timer = asyncio.get_running_loop().call_later(seconds, self._ring)

    def _ring(self) -> None:
        self._rings_at = math.inf
        if time.perf_counter() >= self._until:
            self._wake()
        else:
            self._set_timer()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Dispatcher:
    """Mailboxes by engine request id. All but `on_outputs` is for the event loop's thread."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._mailboxes: dict[str, Mailbox] = {}
        self._waiters: set[asyncio.Future[None]] = set()
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

    async def unless_given_up[T](self, future: asyncio.Future[T]) -> T:
        """What a future comes to; raises the failure if every call is given up before that."""
        if self._failure is not None:
            raise self._failure
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            await asyncio.wait((future, waiter), return_when=asyncio.FIRST_COMPLETED)
            if self._failure is not None and not future.done():
                raise self._failure
            return future.result()
        finally:
            self._waiters.discard(waiter)
            future.cancel()

    @property
    def num_waiting(self) -> int:
        """Requests whose outputs somebody waits for."""
        return len(self._mailboxes)

    def give_up(self, failure: HttpError) -> None:
        """Ends every call, present and to come, with `failure`."""
        self._failure = failure
        for mailbox in set(self._mailboxes.values()):
            mailbox.put(failure)
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _deliver(self, outputs: StepOutputs, at: float) -> None:
        for output in outputs:
            if (mailbox := self._mailboxes.get(output.id)) is not None:
                mailbox.put((output, at))
