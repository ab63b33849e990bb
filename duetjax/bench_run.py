"""Sends a benchmark's requests when they are due, whatever becomes of the others."""

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from tqdm import tqdm

from duetjax.bench_client import Record
from duetjax.bench_load import Tokens
from duetjax.bench_report import Outcome
from duetjax.sim.workload import Arrival

_AHEAD_SECONDS = 0.5
"""So long before a request is due it is opened."""

type Send = Callable[[Record], Awaitable[None]]
"""Sends a request; what becomes of it is in its record by the time it returns."""


class Target[Body](Protocol):
    """What a benchmark's requests go to: an endpoint, or an engine.

    backend, model: as the result calls them. vocab_size: prompts' ids are below it.
    """

    backend: str
    model: str
    vocab_size: int

    def body(self, prompt: Tokens, num_tokens: int) -> Body:
        """A request for so many tokens after a prompt, as `opened` takes it."""

    def opened(self, body: Body) -> AbstractAsyncContextManager[Send]:
        """A request all but sent; leaving it ends it, whatever is still to come.

        Entering and sending raise `OSError`.
        """


class Run[Body]:
    """Requests to one target. max_concurrency: so many at a time, others wait; timeout_s: of each.

    Belongs to one event loop.
    """

    def __init__(
        self, target: Target[Body], *, max_concurrency: int | None, timeout_s: float
    ) -> None:
        self._target, self._timeout_s = target, timeout_s
        self._places = None if max_concurrency is None else asyncio.Semaphore(max_concurrency)

    async def all_of(self, arrivals: Sequence[Arrival], bodies: Sequence[Body]) -> Outcome:
        """Each at its time; where its task is cancelled, what there is until then."""
        gc.collect()
        gc.freeze()  # what is there stays, and need not be looked at
        records: list[Record] = []
        began, used, was_stopped = time.monotonic() + _AHEAD_SECONDS, time.thread_time(), False
        try:
            with tqdm(total=len(bodies), desc="benchmark", unit="request", disable=None) as bar:
                async with asyncio.TaskGroup() as group:
                    for arrival, body in zip(arrivals, bodies, strict=True):
                        await _until(began + arrival.at - _AHEAD_SECONDS)
                        records.append(Record(began + arrival.at))
                        task = group.create_task(self.one(records[-1], body))
                        task.add_done_callback(lambda _: bar.update())
        except asyncio.CancelledError:
            was_stopped = True
        finally:
            gc.unfreeze()
        seconds = max(time.monotonic() - began, 1e-9)
        cpu_share = (time.thread_time() - used) / (seconds + _AHEAD_SECONDS)
        return Outcome(records, began, seconds, cpu_share, was_stopped)

    async def one(self, record: Record, body: Body) -> None:
        """One request; what becomes of it is in its record."""
        if self._places is None:
            await self._send(record, body)
        else:
            await _until(record.due)
            record.began = time.monotonic()
            async with self._places:
                await self._send(record, body)
        record.is_over = True

    async def _send(self, record: Record, body: Body) -> None:
        try:
            async with (
                asyncio.timeout_at(max(record.due, time.monotonic()) + self._timeout_s),
                self._target.opened(body) as send,
            ):
                await _until(record.due)
                if self._places is None:
                    record.began, record.sent = time.monotonic(), record.due
                else:
                    record.sent = time.monotonic()
                await send(record)
        except TimeoutError:
            record.error = "timeout"
        except OSError as error:
            record.error = f"connection {error.strerror or error}".lower()


async def _until(at: float) -> None:
    """A time of asyncio's clock, which is time.monotonic; up to 1 ms later, as it rounds up."""
    if (left := at - time.monotonic()) > 0:
        await asyncio.sleep(left)
