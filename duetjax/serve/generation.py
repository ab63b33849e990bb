"""The engine requests behind one HTTP call: submitted together, ended together."""

import asyncio
from typing import Self

from duetjax.engine import EngineDead
from duetjax.policy.request import FinishReason, NewRequest
from duetjax.serve.admission import shutting_down
from duetjax.serve.call import Call, Choice, Delta
from duetjax.serve.context import Context
from duetjax.serve.dispatch import Arrival, Mail
from duetjax.serve.errors import HttpError, engine_dead, generation_failed
from duetjax.text.stream import TextStream

_LOST = "the engine has died and the request is lost; see the server's log"


class _Progress:
    """One choice under way: its text so far, and when its tokens came."""

    def __init__(self, choice: Choice, text: TextStream) -> None:
        self.choice = choice
        self.text = text
        self.num_tokens = 0
        self.first_at = 0.0
        self.last_at = 0.0


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
        self._arrived = arrived
        self._ids = [choice.new.id for choice in call.choices]
        self._open = {
            choice.new.id: _Progress(
                choice,
                TextStream(context.service.tokenizer, choice.stop, choice.include_stop_str),
            )
            for choice in call.choices
        }
        self._unfinished_because = FinishReason.ABORT
        self.num_tokens = 0

    def __enter__(self) -> Self:
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
            raise engine_dead(_LOST) from None
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
            raise engine_dead("the engine is not running; see the server's log") from None

    def _advance(self, progress: _Progress, arrival: Arrival) -> Delta:
        output, choice = arrival.output, progress.choice
        if output.finish in (FinishReason.ERROR, FinishReason.ABORT):
            raise self._failure(output.finish)
        if output.token_ids:
            self._observe_tokens(progress, arrival.at, len(output.token_ids))
        finish = output.finish
        if finish is None:
            delta = progress.text.push(output.token_ids)
        else:
            at_stop_id = finish is FinishReason.STOP
            delta = progress.text.end(output.token_ids, at_stop_id=at_stop_id)
        if delta.stopped:
            finish = FinishReason.STOP
            if output.finish is None:
                self._client.abort(output.id)
        if finish is not None:
            self._end(progress, finish)
        reason = None if finish is None else finish.value
        return Delta(choice.index, delta.text, output.token_ids, reason)

    def _failure(self, finish: FinishReason) -> HttpError:
        """Why the engine ended a request unasked: it shuts down, has died, or lost this one."""
        if finish is FinishReason.ABORT:
            return shutting_down()
        if not self._client.is_healthy:
            return engine_dead(_LOST)
        return generation_failed()

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
