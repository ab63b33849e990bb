"""The Starlette application: routes, and what every request passes through."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from duetjax.config import InvalidRequest
from duetjax.serve.admission import Admission
from duetjax.serve.auth import BearerAuth
from duetjax.serve.body import json_response
from duetjax.serve.chat import prepare_chat
from duetjax.serve.completions import prepare_completion
from duetjax.serve.context import Context, Service
from duetjax.serve.debug import StepsEndpoint
from duetjax.serve.dispatch import Dispatcher
from duetjax.serve.endpoint import GenerationEndpoint
from duetjax.serve.errors import HttpError, handle_fault, model_not_found
from duetjax.serve.exposition import CONTENT_TYPE
from duetjax.serve.metrics import Metrics
from duetjax.serve.openapi import OpenApiEndpoint
from duetjax.serve.page import Page
from duetjax.serve.probes import probes
from duetjax.serve.queue_bound import QueueBound
from duetjax.serve.request_ids import RequestIds
from duetjax.serve.tokenization import TokenizationEndpoint, detokenize, tokenize
from duetjax.serve.tracing import TraceEndpoint


def create_app(service: Service) -> Starlette:
    """The endpoint as an ASGI application; its start-up starts the engine.

    `app.state.context` is the `Context` that the routes share.
    """
    queue = QueueBound(service.client, service.limits)
    metrics = Metrics(
        service.client, service.model_names[0], service.compilations, queue, service.tbt_slo_ms
    )
    context = Context(service, Dispatcher(), Admission(), metrics, queue)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        context.dispatcher.bind(asyncio.get_running_loop())
        service.client.start(context.dispatcher.on_outputs)
        service.client.watch(service.watchdog_s)
        yield
        service.checker.close()

    app = Starlette(
        routes=_routes(context),
        middleware=[
            Middleware(RequestIds, max_headers=service.limits.max_headers, refuse=metrics.refuse),
            Middleware(
                BearerAuth,
                api_key=service.api_key,
                also_public=["/metrics"] if service.metrics_public else [],
                refuse=metrics.refuse,
            ),
        ],
        exception_handlers={
            HttpError: handle_fault,
            InvalidRequest: handle_fault,
            HTTPException: handle_fault,
        },
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.context = context
    return app


def _routes(context: Context) -> list[Route]:
    service = context.service
    return [
        Route(
            "/v1/completions",
            GenerationEndpoint(context, prepare_completion),
            methods=["POST"],
        ),
        Route(
            "/v1/chat/completions",
            GenerationEndpoint(context, prepare_chat),
            methods=["POST"],
        ),
        Route("/v1/models", partial(_list_models, service)),
        Route("/v1/models/{id:path}", partial(_show_model, service)),
        Route("/v1/limits", partial(_show_limits, service)),
        Route("/tokenize", TokenizationEndpoint(context, tokenize).answer, methods=["POST"]),
        Route("/detokenize", TokenizationEndpoint(context, detokenize).answer, methods=["POST"]),
        *probes(context),
        Route("/metrics", partial(_show_metrics, context)),
        Route("/debug/steps", StepsEndpoint(context), methods=["GET"]),
        Route("/debug/trace", TraceEndpoint(context), methods=["GET"]),
        Route("/openapi.json", OpenApiEndpoint(service).answer),
        Route("/", Page().answer),
    ]


async def _list_models(service: Service, request: Request) -> Response:
    models = [_model(service, name) for name in service.model_names]
    return json_response({"object": "list", "data": models})


async def _show_model(service: Service, request: Request) -> Response:
    name = request.path_params["id"]
    if name not in service.model_names:
        raise model_not_found(name, service.model_names)
    return json_response(_model(service, name))


async def _show_limits(service: Service, request: Request) -> Response:
    client = service.client
    return json_response(
        service.limits.document(max_model_len=service.max_model_len, max_num_seqs=client.num_slots)
    )


async def _show_metrics(context: Context, request: Request) -> Response:
    return Response(context.metrics.render(), headers={"content-type": CONTENT_TYPE})


def _model(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "duetjax",
        "max_model_len": service.max_model_len,
    }
