"""The servers that server.py measures; `serve` is what each one's process runs.

Ours over the real scheduler and engine, on a device whose steps take a given time and nobody's
processor, the engine in a process of its own or in the server's; a bare Starlette application that
sends given bytes to everybody at a given pace; or the engine alone, whose requests come without
HTTP.
"""

import asyncio
import gc
import random
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

from duetjax.build import LoadedModel
from duetjax.checkpoint.source import resolve_model
from duetjax.config import SamplingParams
from duetjax.engine import Engine, EngineClient
from duetjax.engine_process import EngineProcess
from duetjax.engine_worker import work
from duetjax.policy.launch import Deliver, FinishedStep, Lane, Launch, Split, StepResult
from duetjax.policy.limits import SchedulerLimits, decode_buckets, prefill_buckets
from duetjax.policy.policies import StaticSplit
from duetjax.policy.request import NewRequest
from duetjax.policy.scheduler import Scheduler
from duetjax.serve.context import Service
from duetjax.serve.server import HttpServer, bind
from duetjax.sim.clock import RealClock
from duetjax.sim.executor import SimulatedExecutor
from duetjax.sim.script import Script
from duetjax.text.tokenizer import Tokenizer

STREAMS = 256
TEXT = "~"  # of every token, and nowhere else in a stream: tokens are counted by it
LONGEST = 2**17
PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
_PREFILL_SHARE = 0.3  # of a decode step's time, so that their ends meet at every phase
_PREFILL_TOKENS = 128
_LAG_SECONDS = 0.005


@dataclass(frozen=True, slots=True)
class Case:
    """What a server does.

    server: duetjax, together (both in one process), engine (alone) or bare. step_ms: between the
    tokens of a stream. prompts: one long prompt is computed on the prefill lane meanwhile. chunk:
    what the bare server sends per token.
    """

    name: str
    server: str
    route: str
    step_ms: float
    prompts: bool = False
    chunk: bytes = b""


class Notes:
    """Of a server process: what it has used, and what has been late, since they were last taken."""

    def __init__(self) -> None:
        self._late: dict[str, list[float]] = {"lag": [], "wake": [], "decode": [], "prefill": []}
        self.beside: Connection | None = None  # a process whose notes are taken as well

    def add(self, what: str, seconds: float) -> None:
        """Something was so late."""
        self._late[what].append(seconds)

    def take(self) -> dict[str, Any]:
        """Milliseconds by kind, and processor seconds so far, by thread too."""
        late = {what: 1e3 * np.array(found) for what, found in self._late.items()}
        for found in self._late.values():
            found.clear()
        threads = {
            thread.name: time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
            for thread in threading.enumerate()
            if thread.ident is not None
        }
        notes = {"late": late, "cpu_s": time.process_time(), "threads": threads}
        if self.beside is not None:
            self.beside.send(None)
            others = self.beside.recv()
            notes["late"] = others["late"] | {"lag": late["lag"]}
            notes["cpu_s"] += others["cpu_s"]
            notes["threads"] = others["threads"] | threads
        return notes

    async def lag(self) -> None:
        """Notes how late the event loop is, forever."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + _LAG_SECONDS
            await asyncio.sleep(_LAG_SECONDS)
            self.add("lag", loop.time() - due)


class NotedClock(RealClock):
    """A clock that notes how late a thread comes back from waiting for the end of a step."""

    def __init__(self, notes: Notes) -> None:
        self._notes = notes

    def wait(self, changed: threading.Condition, until: float) -> None:
        """See `Clock`."""
        super().wait(changed, until)
        if (late := self.now() - until) >= 0:
            self._notes.add("wake", late)


class NotedExecutor(SimulatedExecutor):
    """Samples `token` only, and notes how long each lane waits for its next launch."""

    def __init__(self, step_ms: float, token: int, notes: Notes) -> None:
        super().__init__(Script(step_ms, _PREFILL_SHARE * step_ms), NotedClock(notes))
        self._token, self._notes = token, notes
        self._lanes: dict[int, Lane] = {}  # of launches in flight
        self._waits: dict[Lane, float] = {}  # lanes with room, and since when

    def start(self, deliver: Deliver) -> None:
        """See `Executor`."""

        def noted(item: FinishedStep | BaseException) -> None:
            if isinstance(item, FinishedStep):
                self._waits.setdefault(self._lanes.pop(item.ticket), time.perf_counter())
                tokens = np.full(len(item.result.flags), self._token, np.int32)
                result = StepResult(tokens, item.result.flags, item.result.logprobs)
                item = FinishedStep(item.ticket, item.step, result)
            deliver(item)

        super().start(noted)

    def submit(self, launch: Launch) -> None:
        """See `Executor`."""
        if (since := self._waits.pop(launch.lane, None)) is not None:
            lane = "prefill" if launch.lane is Lane.PREFILL else "decode"
            self._notes.add(lane, time.perf_counter() - since)
        self._lanes[launch.ticket] = launch.lane
        super().submit(launch)


type Announce = Callable[[Callable[[], None]], None]
"""Told on the event loop, once it serves, how to begin with prompts."""


def serve(case: Case, pipe: Connection) -> None:
    """The server's process: tells its port, then does what it is told."""
    notes = Notes()
    serves = _serve_bare if case.server == "bare" else _serve_duetjax
    with bind("127.0.0.1", 0) as listener:
        listener.listen(STREAMS)

        def announce(prompts: Callable[[], None]) -> None:
            """On the event loop, which must not be lost from sight."""

            def obey() -> None:
                while True:
                    if pipe.recv() == "notes":
                        pipe.send(notes.take())
                    else:
                        prompts()

            asyncio.get_running_loop().create_task(notes.lag(), name="lag")
            threading.Thread(target=obey, name="notes", daemon=True).start()
            pipe.send(listener.getsockname()[1])

        serves(case, listener, announce, notes)


def _engine(tokenizer: Tokenizer, step_ms: float, notes: Notes) -> EngineClient:
    limits = SchedulerLimits(
        num_pages=2**16,
        page_size=64,
        num_slots=STREAMS + 1,
        max_model_len=LONGEST,
        max_num_batched_tokens=2 * STREAMS,
        decode_buckets=decode_buckets(STREAMS + 1),
        prefill_buckets=prefill_buckets(2 * STREAMS),
    )
    return EngineClient(
        Scheduler(limits, StaticSplit(_PREFILL_TOKENS, Split(1, 1), k=1)),
        NotedExecutor(step_ms, tokenizer.encode(TEXT)[-1], notes),
        vocab_size=tokenizer.vocab_size,
    )


def _tokenizer() -> Tokenizer:
    folder = resolve_model(None).folder
    assert folder is not None, "the demo model has a folder"
    return Tokenizer.from_folder(folder)


@contextmanager
def _apart(case: Case, notes: Notes) -> Iterator[Engine]:
    """The engine in a process of its own, whose notes are taken with the server's."""
    with Listener() as listener:
        address = str(listener.address)
        process = EngineProcess([sys.executable, __file__], case.step_ms, address)
        with listener.accept() as worker:
            process.wait_ready()
            notes.beside = worker
            yield process


def _engine_process(descriptor: int) -> None:
    """The engine's own process: this file as a program."""

    def load(step_ms: float, address: str) -> LoadedModel:
        notes, server = Notes(), Client(address)

        def obey() -> None:
            with suppress(EOFError):  # it has what it wanted
                while True:
                    server.recv()
                    server.send(notes.take())

        threading.Thread(target=obey, name="notes", daemon=True).start()
        tokenizer, source = _tokenizer(), resolve_model(None)
        return LoadedModel(
            name=source.name,
            config=source.config,
            tokenizer=tokenizer,
            generation=source.generation,
            max_model_len=LONGEST,
            engine=_engine(tokenizer, step_ms, notes),
            _seeds=random.Random(0),
        )

    work(descriptor, load)


def _serve_duetjax(case: Case, listener: socket.socket, announce: Announce, notes: Notes) -> None:
    tokenizer, params = _tokenizer(), SamplingParams(seed=0)
    with ExitStack() as stack:
        if case.server == "duetjax":
            client: Engine = stack.enter_context(_apart(case, notes))
        else:
            client = _engine(tokenizer, case.step_ms, notes)
        _run(case, listener, announce, client, tokenizer, params)


def _run(
    case: Case,
    listener: socket.socket,
    announce: Announce,
    client: Engine,
    tokenizer: Tokenizer,
    params: SamplingParams,
) -> None:

    def begin(_: str) -> None:
        if case.server == "engine":
            for index in range(STREAMS):
                client.submit(NewRequest(str(index), (1,), LONGEST // 2, params))
        announce(prompts)

    def prompts() -> None:
        client.submit(NewRequest("prompt", (1,) * (LONGEST - 8), 1, params))

    service = Service(
        client=client,
        tokenizer=tokenizer,
        model_names=("demo",),
        created=0,
        max_model_len=LONGEST,
        vocab_size=tokenizer.vocab_size,
        eos_token_ids=(),
        defaults=SamplingParams(),
        compilations=lambda: 0,
    )
    HttpServer(service, listener).run(begin)


def _serve_bare(case: Case, listener: socket.socket, announce: Announce, notes: Notes) -> None:
    tick = asyncio.Event()

    async def beat() -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            due = max(due + case.step_ms / 1e3, loop.time())
            await asyncio.sleep(due - loop.time())
            tick.set()
            tick.clear()

    async def chunks() -> AsyncIterator[bytes]:
        while await tick.wait():
            yield case.chunk

    async def answer(request: Request) -> StreamingResponse:
        await request.body()
        return StreamingResponse(chunks(), media_type="text/event-stream")

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        announce(lambda: None)
        beating = asyncio.create_task(beat())
        yield
        beating.cancel()

    route = Route(PATHS[case.route], answer, methods=["POST"])
    app = Starlette(routes=[route], lifespan=lifespan)
    settings = {"ws": "none", "log_config": None, "access_log": False, "server_header": False}
    config = uvicorn.Config(app, http="h11", loop="asyncio", proxy_headers=False, **settings)
    gc.collect()
    gc.freeze()  # as ours does
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    _engine_process(int(sys.argv[1]))
