"""A generating route from its request to its response, and what happens when the client leaves."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from duetjax.serve.body import read_json
from duetjax.serve.call import Call, Delta, joined
from duetjax.serve.context import Context, Service
from duetjax.serve.form import wait_for_look
from duetjax.serve.generation import Generation
from duetjax.serve.objectives import objectives
from duetjax.serve.streaming import send_stream
from duetjax.serve.timings import wants_timings


class GenerationEndpoint:
    """The ASGI application behind one generating route.

    prepare: checks and tokenises a body; runs in a thread, since both may take long.
    """

    def __init__(
        self, context: Context, prepare: Callable[[Service, dict[str, Any]], Call]
    ) -> None:
        self._context = context
        self._prepare = prepare

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request; faults before the response begins are raised."""
        arrived = time.perf_counter()
        request = Request(scope, receive)
        with self._context.admission.admit():
            objective = objectives(request.headers)
            timings = wants_timings(request.headers)
            try:
                body = await read_json(request, self._context.service.limits)
            except ClientDisconnect:
                return
            self._context.queue.check(1)  # before tokenising, which is most of a refusal's cost
            call = await asyncio.to_thread(self._prepare, self._context.service, body)
            call = call.with_headers(objective, timings=timings)
            generation = Generation(self._context, call, arrived)
            answer = _answer(self._context, generation, call, scope, receive, send)
            await _while_connected(receive, answer)


async def _answer(
    context: Context,
    generation: Generation,
    call: Call,
    scope: Scope,
    receive: Receive,
    send: Send,
) -> None:
    await wait_for_look(context, call)
    with generation:
        if call.stream:
            await send_stream(call, generation, send, context.metrics.refuse)
            return
        response = await _collect(call, generation)
    await response(scope, receive, send)


async def _collect(call: Call, generation: Generation) -> Response:
    """The whole response to a call that does not stream."""
    deltas: list[list[Delta]] = [[] for _ in call.choices]
    while not generation.is_finished:
        if (delta := await generation.next()) is not None:
            deltas[delta.index].append(delta)
    whole = call.reply.whole([joined(own) for own in deltas])
    usage = {"usage": generation.usage(call)}
    body = orjson.dumps(whole | usage | generation.told_timings())
    return Response(body, headers=call.headers, media_type="application/json")


async def _while_connected(receive: Receive, answer: Coroutine[Any, Any, None]) -> None:
    """Runs `answer`, and cancels it as soon as the client is gone, even if nothing is sent."""
    work = asyncio.create_task(answer)
    watch = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            work.result()
    finally:
        work.cancel()
        watch.cancel()
        await asyncio.wait((work, watch))


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
