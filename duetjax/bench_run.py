"""Sends a benchmark's requests when they are due, whatever becomes of the others."""

import asyncio
import gc
import time
from collections.abc import Sequence
from typing import Any

import orjson
from tqdm import tqdm

from duetjax.bench_client import Client, Record, get, stream
from duetjax.bench_report import Outcome
from duetjax.config import ConfigError
from duetjax.sim.workload import Arrival

_AHEAD_SECONDS = 0.5
"""So long before a request is due its connection is opened."""
_ANSWER_SECONDS = 30.0


class Run:
    """Requests to one route. max_concurrency: so many at a time, others wait; timeout_s: of each.

    Belongs to one event loop.
    """

    def __init__(
        self, client: Client, path: str, *, max_concurrency: int | None, timeout_s: float
    ) -> None:
        self._client, self._path, self._timeout_s = client, path, timeout_s
        self._places = None if max_concurrency is None else asyncio.Semaphore(max_concurrency)

    async def all_of(self, arrivals: Sequence[Arrival], bodies: Sequence[bytes]) -> Outcome:
        """Each at its time; where its task is cancelled, what there is until then."""
        gc.collect()
        gc.freeze()  # what is there stays, and need not be looked at
        records: list[Record] = []
        began, used, was_stopped = time.monotonic() + _AHEAD_SECONDS, time.process_time(), False
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
        cpu_share = (time.process_time() - used) / (seconds + _AHEAD_SECONDS)
        return Outcome(records, began, seconds, cpu_share, was_stopped)

    async def one(self, record: Record, body: bytes) -> None:
        """One request; what becomes of it is in its record."""
        if self._places is None:
            await self._send(record, body)
        else:
            await _until(record.due)
            record.began = time.monotonic()
            async with self._places:
                await self._send(record, body)
        record.is_over = True

    async def _send(self, record: Record, body: bytes) -> None:
        connection = None
        try:
            async with asyncio.timeout_at(max(record.due, time.monotonic()) + self._timeout_s):
                connection = await self._client.connect()
                await _until(record.due)
                if self._places is None:
                    record.began = time.monotonic()
                await stream(connection, self._path, body, record)
        except TimeoutError:
            record.error = "timeout"
        except OSError as error:
            record.error = f"connection {error.strerror or error}".lower()
        finally:
            if connection is not None:
                connection.close()


async def _until(at: float) -> None:
    """A time of asyncio's clock, which is time.monotonic; up to 1 ms later, as it rounds up."""
    if (left := at - time.monotonic()) > 0:
        await asyncio.sleep(left)


# What the server says of itself.


async def first_model(client: Client) -> str:
    """The name under which the server serves a model. Raises `ConfigError`."""
    models = (await _asked(client, "/v1/models")).get("data")
    if not models:
        raise ConfigError(f"{client.address.base_url}/v1/models names no model; give --model")
    return str(models[0]["id"])


async def vocab_size(client: Client, otherwise: int) -> int:
    """What the schema of a prompt's ids at /openapi.json allows; where it says nothing, that."""
    try:
        document = await _asked(client, "/openapi.json")
        ways = document["components"]["schemas"]["CompletionBody"]["properties"]["prompt"]["anyOf"]
        [ids] = [way["items"] for way in ways if "maximum" in way.get("items", ())]
        return int(ids["maximum"]) + 1
    except (ConfigError, KeyError, TypeError, ValueError):
        return otherwise


async def _asked(client: Client, path: str) -> dict[str, Any]:
    where = f"{client.address.base_url}{path}"
    try:
        async with asyncio.timeout(_ANSWER_SECONDS):
            status, body = await get(client, path)
    except OSError as error:
        why = error.strerror or str(error) or "no answer"
        raise ConfigError(f"{where}: {why}; start `duetjax serve`, or give --base-url") from None
    if status in (401, 403):
        raise ConfigError(f"{where}: {status}; give --api-key, or set OPENAI_API_KEY")
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        document = None
    if status != 200 or not isinstance(document, dict):
        raise ConfigError(f"{where}: {status}; is this an OpenAI-compatible server?")
    return document
