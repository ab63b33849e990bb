"""What asks how the server is: /livez, /readyz and /health. None of them waits for the engine."""

from functools import partial

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from duetjax.serve.body import json_response
from duetjax.serve.context import Context
from duetjax.serve.errors import HttpError, not_running


def probes(context: Context) -> list[Route]:
    """Routes for those who restart containers, send traffic, and wait for a start."""
    return [
        Route("/livez", partial(_live, context)),
        Route("/readyz", partial(_ready, context)),
        Route("/health", partial(_health, context)),
    ]


async def _live(context: Context, request: Request) -> Response:
    """Whether the process should go on; also while it drains."""
    _check_engine(context)
    silence = context.service.client.silence
    return json_response({"status": "ok", "silence_s": round(silence, 3)})


async def _ready(context: Context, request: Request) -> Response:
    """Whether to send work here now: healthy, and the queue not full."""
    _check_health(context)
    full = context.queue.why_full()
    if full is not None:
        headers = {"retry-after": str(context.queue.seconds())}
        raise HttpError(503, "queue_full", full, headers=headers)
    return json_response({"status": "ok"})


async def _health(context: Context, request: Request) -> Response:
    """Whether work can be done here, however busy the engine is."""
    _check_health(context)
    return json_response({"status": "ok"})


def _check_health(context: Context) -> None:
    if context.service.client.failure is None:  # else this server will not come back
        context.admission.check_open()
    _check_engine(context)


def _check_engine(context: Context) -> None:
    """Raises a 503 if the engine has failed or ended."""
    client = context.service.client
    if client.failure is not None or not client.is_healthy:
        raise HttpError(503, "engine_dead", not_running(client))
