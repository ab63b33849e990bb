"""A benchmark's requests to an engine in this process: token ids in, tokens out, and no HTTP."""

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

from duetjax.bench_client import Record
from duetjax.bench_load import Tokens
from duetjax.bench_run import Send
from duetjax.build import LoadedModel
from duetjax.config import InvalidRequest, SamplingParams
from duetjax.engine import EngineDead
from duetjax.policy.request import FinishReason, NewRequest, StepOutputs

type Body = tuple[Tokens, int]
"""A prompt, and how many tokens are to follow."""

_DEAD = "engine_dead"


class OwnEngine:
    """Implements `bench_run.Target` over a model's engine, which it starts.

    Belongs to the event loop that runs when it is made. params: of every request. watchdog_s: as of
    `EngineConfig`.
    """

    backend = "duetjax in-process"

    def __init__(self, model: LoadedModel, params: SamplingParams, watchdog_s: float) -> None:
        self.model, self.vocab_size = model.name, model.engine.vocab_size
        self._loaded, self._params = model, params
        self._numbers = itertools.count()
        self._loop = asyncio.get_running_loop()
        self._open: dict[str, tuple[Record, asyncio.Future[None]]] = {}
        model.engine.start(self._on_outputs)
        model.engine.watch(watchdog_s)

    def body(self, prompt: Tokens, num_tokens: int) -> Body:
        """See `Target`."""
        return prompt, num_tokens

    @asynccontextmanager
    async def opened(self, body: Body) -> AsyncGenerator[Send]:
        """See `Target`; the engine knows nothing of the request until it is sent."""
        prompt, num_tokens = body
        name, params = f"bench-{next(self._numbers)}", replace(self._params, max_tokens=num_tokens)
        [new] = self._loaded.new_requests(name, tuple(prompt.tolist()), params)
        try:
            yield partial(self._generate, new)
        finally:
            self._open.pop(new.id, None)
            self._loaded.engine.abort(new.id)

    async def _generate(self, new: NewRequest, record: Record) -> None:
        record.prompt_tokens = len(new.prompt)
        ended = self._loop.create_future()
        self._open[new.id] = record, ended
        try:
            self._loaded.engine.submit(new)
        except InvalidRequest as error:
            record.error = error.code
        except EngineDead:
            record.error = _DEAD
        else:
            await ended

    def _on_outputs(self, outputs: StepOutputs) -> None:
        """On the engine's thread: one call into the event loop, whatever the number of requests."""
        try:
            self._loop.call_soon_threadsafe(self._deliver, outputs, time.monotonic())
        except RuntimeError:
            if not self._loop.is_closed():  # closed: nobody waits any more
                raise

    def _deliver(self, outputs: StepOutputs, at: float) -> None:
        for output in outputs:
            record, ended = self._open.get(output.id, (None, None))
            if record is None or ended is None or ended.done():
                continue  # it was given up
            if output.token_ids:
                record.events.append(at)
                record.tokens += len(output.token_ids)
            if output.finish is not None:
                record.error = self._error(output.finish)
                ended.set_result(None)

    def _error(self, finish: FinishReason) -> str | None:
        """What went wrong with a request that ended so, by the endpoint's codes."""
        if finish is FinishReason.ERROR:
            return "non_finite_logits" if self._loaded.engine.failure is None else _DEAD
        return "abort" if finish is FinishReason.ABORT else None
