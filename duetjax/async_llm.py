"""`AsyncLLM`: the Python API for asyncio, many requests at a time from one event loop.

async with AsyncLLM() as llm:
    async for output in llm.generate("What is TTFT?", SamplingParams(max_tokens=64), "my-id"):
        print(output.outputs[0].text)           # all of the text so far
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

from duetjax.build import LoadedModel
from duetjax.completion import (
    Completion,
    EncodedPrompt,
    RequestOutput,
    check_alive,
    request_output,
)
from duetjax.config import InvalidRequest, SamplingParams
from duetjax.form import Form
from duetjax.llm import BaseLLM, Message, Prompt, prioritised
from duetjax.policy.request import NewRequest, StepOutputs
from duetjax.policy.request import RequestOutput as EngineOutput


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request but for its prompt."""

    id: str
    params: SamplingParams
    priority: int
    cache_salt: str


class AsyncLLM(BaseLLM):
    """A model with its engine for asyncio; shut it down, or use it in an `async with` block.

    The settings are those of `BaseLLM`. Loading blocks, so make it before the event loop is busy.
    Its methods are for one event loop at a time, but for `shutdown`.
    """

    def _start(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._calls: dict[str, _Call] = {}  # by the user's request id
        self._waiting: dict[str, _Call] = {}  # by the engine's
        self._model.engine.start(self._on_outputs)

    def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Completes one prompt, a text or token ids; yields it anew as it grows.

        Each output holds all there is so far of all n completions; the last one is `finished`. A
        caller that is slower than the model gets fewer and larger steps. Closing the iterator, or
        cancelling the task that waits for it, aborts the request.

        sampling_params: None is the model's defaults. request_id: for `abort`; made up if None.
        priority: lower goes first. cache_salt: the prefix cache is shared only among requests with
        the same one. Before the first output it raises `InvalidRequest` for what cannot be served
        or an id in use; at any time `EngineDead`. A completion that fails alone does not raise: its
        finish_reason is "error".
        """
        asked = self._asked(sampling_params, request_id, priority, cache_salt)
        return self._run(partial(self._encode, prompt), asked)

    def chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        parallel_tool_calls: bool = True,
        chat_template_kwargs: Mapping[str, object] | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Answers a conversation through the model's chat template; otherwise as `generate`.

        tools, parallel_tool_calls, chat_template_kwargs: see `LLM.chat`.
        """
        asked = self._asked(sampling_params, request_id, priority, cache_salt)
        encode = partial(
            self._encode_chat,
            messages,
            tools,
            chat_template_kwargs,
            single_call=not parallel_tool_calls,
        )
        return self._run(encode, asked)

    async def abort(self, request_id: str) -> None:
        """Ends a request, whose last output then says "abort"; of no effect if it has ended."""
        if (call := self._calls.get(request_id)) is not None:
            call.abort()

    def shutdown(self, timeout: float = 30) -> None:
        """Ends what is running with "abort" and frees the engine; safe to call twice.

        Waits for the step in progress, at most `timeout` seconds; from any thread.
        """
        self._model.engine.shutdown(timeout)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.shutdown)

    def _asked(
        self,
        params: SamplingParams | None,
        request_id: str | None,
        priority: int,
        cache_salt: str | None,
    ) -> _Asked:
        return _Asked(
            id=f"async-{next(self._numbers)}" if request_id is None else request_id,
            params=self._model.defaults if params is None else params,
            priority=priority,
            cache_salt=cache_salt or "",
        )

    async def _run(
        self, encode: Callable[[], EncodedPrompt], asked: _Asked
    ) -> AsyncGenerator[RequestOutput, None]:
        self._bind()
        if asked.id in self._calls:
            raise InvalidRequest(f"request id {asked.id!r} is already in use; choose another")
        with _Call(self._model, self._waiting) as call:
            self._calls[asked.id] = call
            try:
                prompt = await asyncio.to_thread(encode)  # long texts take long
                # The engine may not yet have ended an earlier request of this id: another number.
                name = f"{asked.id}.{next(self._numbers)}"
                form = await asyncio.to_thread(self._form, prompt, asked.params)
                requests = self._model.new_requests(name, prompt.token_ids, asked.params, form)
                call.submit(prioritised(requests, asked.priority, asked.cache_salt), form)
                while not call.is_finished:
                    await call.advance()
                    yield request_output(asked.id, prompt, call.completions)
            finally:
                del self._calls[asked.id]

    def _bind(self) -> None:
        """Takes the running loop for the one that outputs go to."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            if self._calls and self._loop is not None and not self._loop.is_closed():
                raise RuntimeError("this AsyncLLM still generates on another event loop")
            self._loop = loop

    def _on_outputs(self, outputs: StepOutputs) -> None:
        """On the engine thread: one call into the event loop, whatever the number of requests."""
        loop = self._loop
        assert loop is not None, "outputs before the first request"
        try:
            loop.call_soon_threadsafe(self._deliver, outputs, time.perf_counter())
        except RuntimeError:
            if not loop.is_closed():  # closed: nobody waits any more
                raise

    def _deliver(self, outputs: StepOutputs, at: float) -> None:
        for output in outputs:
            if (call := self._waiting.get(output.id)) is not None:
                call.put(output, at)


class _Call:
    """The n completions of one request; leaving it aborts those that have not ended.

    waiting: where outputs look for the call that takes them, by the engine's request ids.
    """

    def __init__(self, model: LoadedModel, waiting: "dict[str, _Call]") -> None:
        self._model = model
        self._waiting = waiting
        self._open: dict[str, Completion] = {}
        self._arrived: deque[tuple[EngineOutput, float]] = deque()
        self._has_news = asyncio.Event()
        self._is_aborted = False
        self.completions: list[Completion] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()
        for request_id in list(self._open):
            self._end(request_id)

    @property
    def is_finished(self) -> bool:
        """Whether every completion has had its last output."""
        return not self._open

    def submit(self, requests: Sequence[NewRequest], form: Form) -> None:
        """Starts the completions; aborts them at once if the call already was."""
        now = time.perf_counter()
        for new in requests:
            completion = Completion.begin(self._model.tokenizer, new.sampling, now, form)
            self._open[new.id] = completion
            self._waiting[new.id] = self
            self._model.engine.submit(new)
            self.completions.append(completion)
        if self._is_aborted:
            self.abort()

    def abort(self) -> None:
        """Asks the engine to end what is open."""
        self._is_aborted = True
        for request_id in self._open:
            self._model.engine.abort(request_id)

    def put(self, output: EngineOutput, at: float) -> None:
        """Leaves an output for `advance`."""
        self._arrived.append((output, at))
        self._has_news.set()

    async def advance(self) -> None:
        """Waits for outputs and takes all that are there; raises if the engine dies."""
        while not self._arrived:
            self._has_news.clear()
            await self._has_news.wait()
        while self._arrived:
            self._take(*self._arrived.popleft())

    def _take(self, output: EngineOutput, at: float) -> None:
        completion = self._open.get(output.id)
        if completion is None:
            return  # its stop string came first
        check_alive(self._model.engine, output)
        completion.take(output, at)
        if completion.finish is not None:
            if output.finish is None:
                self._model.engine.abort(output.id)
            self._end(output.id)

    def _end(self, request_id: str) -> None:
        del self._open[request_id], self._waiting[request_id]
