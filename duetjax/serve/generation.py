"""The engine requests behind one HTTP call: submitted together, ended together."""

import asyncio
from collections import deque
from typing import Self

from duetjax.engine import EngineDead
from duetjax.policy.request import FinishReason, NewRequest, RequestOutput, TokenLogprob
from duetjax.serve.admission import shutting_down
from duetjax.serve.call import Call, Choice, Delta, ScoredToken
from duetjax.serve.context import Context
from duetjax.serve.dispatch import Arrival, Mail
from duetjax.serve.errors import HttpError, engine_dead, non_finite_logits, not_running
from duetjax.text.stream import TextDelta, TextStream
from duetjax.text.tokenizer import Tokenizer


class _Progress:
    """One choice under way: its text so far, and when its tokens came."""

    def __init__(self, choice: Choice, tokenizer: Tokenizer) -> None:
        sampling = choice.new.sampling
        self.choice = choice
        self.num_tokens = 0
        self.first_at = 0.0
        self.last_at = 0.0
        self._text = TextStream(
            tokenizer,
            tuple(sampling.stop or ()),
            sampling.include_stop_str_in_output,
            min_tokens=sampling.min_tokens,
        )
        self._scores: deque[tuple[int, TokenLogprob]] = deque()  # tokens not in the text yet

    def take(self, output: RequestOutput) -> tuple[TextDelta, tuple[ScoredToken, ...]]:
        """The text that a step gives, and its tokens where their logprobs were asked for."""
        if output.finish is None:
            delta = self._text.push(output.token_ids)
        else:
            at_stop_id = output.finish is FinishReason.STOP
            delta = self._text.end(output.token_ids, at_stop_id=at_stop_id)
        if self.choice.new.sampling.logprobs is None:
            return delta, ()
        self._scores.extend(zip(output.token_ids, output.logprobs, strict=True))
        tokens = []
        for offset in delta.offsets:
            token_id, score = self._scores.popleft()
            tokens.append(ScoredToken(token_id, offset, score))
        return delta, tuple(tokens)


class Generation:
    """Runs a call's choices while it is open; whatever has not finished at its exit is aborted.

    arrived: when the HTTP request came, in seconds of time.perf_counter. Entering raises
    `InvalidRequest` or `HttpError` if the engine takes none of it.
    """

    def __init__(self, context: Context, call: Call, arrived: float) -> None:
        self._client = context.service.client
        self._ping_seconds = context.service.ping_seconds
        self._dispatcher = context.dispatcher
        self._metrics = context.metrics
        self._queue = context.queue
        self._arrived = arrived
        self._ids = [choice.new.id for choice in call.choices]
        self._open = {
            choice.new.id: _Progress(choice, context.service.tokenizer) for choice in call.choices
        }
        self._unfinished_because = FinishReason.ABORT
        self.num_tokens = 0
        self.cached: dict[int, int] = {}  # by choice

    def __enter__(self) -> Self:
        self._queue.check(len(self._ids))
        self._mail: asyncio.Queue[Mail] = self._dispatcher.subscribe(self._ids)
        submitted: list[str] = []
        try:
            for progress in self._open.values():
                self._submit(progress.choice.new)
                submitted.append(progress.choice.new.id)
        except BaseException:
            self._dispatcher.unsubscribe(self._ids)
            for request_id in submitted:
                self._client.abort(request_id)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._dispatcher.unsubscribe(self._ids)
        for request_id in self._open:
            self._client.abort(request_id)
            self._metrics.finished[self._unfinished_because].inc()

    @property
    def is_finished(self) -> bool:
        """Whether every choice has had its last delta."""
        return not self._open

    async def next(self) -> Delta | None:
        """The next piece of any choice; None after `ping_seconds` of silence.

        Raises `HttpError` once the call can no longer finish.
        """
        try:
            while True:
                mail = await self._next_mail()
                if isinstance(mail, HttpError):
                    raise mail
                if (progress := self._open.get(mail.output.id)) is not None:
                    return self._advance(progress, mail)
        except TimeoutError:
            if self._client.is_healthy:
                return None
            self._unfinished_because = FinishReason.ERROR
            raise engine_dead(not_running(self._client)) from None
        except HttpError:
            self._unfinished_because = FinishReason.ERROR
            raise

    async def _next_mail(self) -> Mail:
        if not self._mail.empty():
            return self._mail.get_nowait()
        async with asyncio.timeout(self._ping_seconds):
            return await self._mail.get()

    def _submit(self, new: NewRequest) -> None:
        try:
            self._client.submit(new)
        except EngineDead:  # whose message is for the operator, who has it in the log
            raise engine_dead(not_running(self._client)) from None

    def _advance(self, progress: _Progress, arrival: Arrival) -> Delta:
        output, choice = arrival.output, progress.choice
        if output.finish in (FinishReason.ERROR, FinishReason.ABORT):
            raise self._failure(output.finish)
        if output.num_cached_tokens:
            self.cached[choice.index] = output.num_cached_tokens
        if output.token_ids:
            self._observe_tokens(progress, arrival.at, len(output.token_ids))
        finish = output.finish
        delta, logprobs = progress.take(output)
        if delta.stopped:
            finish = FinishReason.STOP
            if output.finish is None:
                self._client.abort(output.id)
        if finish is not None:
            self._end(progress, finish)
        reason = None if finish is None else finish.value
        return Delta(choice.index, delta.text, output.token_ids, reason, logprobs)

    def _failure(self, finish: FinishReason) -> HttpError:
        """Why the engine ended a request unasked: it shuts down, has died, or lost this one."""
        if finish is FinishReason.ABORT:
            return shutting_down()
        if not self._client.is_healthy:
            return engine_dead(not_running(self._client))
        return non_finite_logits()

    def _observe_tokens(self, progress: _Progress, at: float, count: int) -> None:
        if progress.num_tokens:
            self._metrics.inter_token_latency.observe(at - progress.last_at)
        else:
            progress.first_at = at
            self._metrics.time_to_first_token.observe(at - self._arrived)
        progress.last_at = at
        progress.num_tokens += count
        self.num_tokens += count

    def _end(self, progress: _Progress, finish: FinishReason) -> None:
        del self._open[progress.choice.new.id]
        self._metrics.finished[finish].inc()
        self._metrics.e2e_request_latency.observe(progress.last_at - self._arrived)
        if progress.num_tokens > 1:
            decode_seconds = progress.last_at - progress.first_at
            self._metrics.time_per_output_token.observe(decode_seconds / (progress.num_tokens - 1))
