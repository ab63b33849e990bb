"""Several replicas of DuetJAX behind one address, by Ray Serve; docs/operations.md says more.

`serve run deploy.ray_serve:app model=Qwen/Qwen3-8B num_replicas=2`, in the repository's root, where
duetjax and ray[serve] are installed; num_gpus=0 where there are none. Each replica is a whole
server: its own GPU, engine, queue and prefix cache. Routes, streams and errors are those of
`duetjax serve`.
"""

import os
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, ConfigDict
from ray import serve
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from duetjax.build import ModelRequest, load
from duetjax.build_service import build_service
from duetjax.config import ConfigError, EngineConfig
from duetjax.engine import EngineDead
from duetjax.serve.app import create_app

_DRAIN_SECONDS = 30.0
_END_SECONDS = 35.0
_REPLICA = "x-duetjax-replica"


class Arguments(BaseModel):
    """What `serve run` takes as NAME=VALUE, and a config file of Ray Serve under `args`.

    num_gpus: of a replica; 1, or 0 to compute on processors. engine: fields of `EngineConfig`, as
    in {"max_num_seqs": 256}; for a config file.
    """

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    num_replicas: int = 2
    num_gpus: int = 1
    engine: dict[str, Any] = {}


# A replica refuses by itself what is too much, with a 429 that says when to come again: so Ray
# passes on whatever comes, and lets nothing wait where nobody answers.
@serve.deployment(
    max_ongoing_requests=10_000,
    health_check_period_s=1.0,
    graceful_shutdown_timeout_s=_DRAIN_SECONDS + _END_SECONDS,
)
@serve.ingress()
class DuetJAX:
    """One replica: a model, and the app that serves it."""

    def __init__(self, model: str | None, engine: dict[str, Any]) -> None:
        """Returns once the model is loaded and its programs are compiled."""
        config, key = EngineConfig(**engine), os.environ.get("DUETJAX_API_KEY")
        if key is not None and not key.strip():
            raise ConfigError("DUETJAX_API_KEY is empty; give a key, or leave it out")
        self._model = load(ModelRequest(model), config, needs_tokenizer=True, own_process=True)
        self._service = replace(
            build_service(self._model),
            api_key=key,
            watchdog_s=config.watchdog_s,
            tbt_slo_ms=config.tbt_slo_ms,
        )

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Called by Ray, which then runs the app's start-up; that starts the engine."""
        return naming_replica(create_app(self._service))

    def check_health(self) -> None:
        """Called by Ray, which puts another replica in the place of one that raises."""
        engine = self._model.engine
        if engine.failure is not None or not engine.is_healthy:
            raise EngineDead(f"the engine does not run: {engine.failure!r}")

    def __del__(self) -> None:
        """Called by Ray once the calls in flight have ended, or had their time."""
        self._model.engine.shutdown(timeout=_END_SECONDS)


def naming_replica(served: ASGIApp) -> ASGIApp:
    """An app whose answers say in a header which replica gave them."""
    name = serve.get_replica_context().replica_id.unique_id

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[_REPLICA] = name
            await send(message)

        await served(scope, receive, send_named)

    return app


def app(arguments: Arguments) -> serve.Application:
    """The replicas; the address is a matter of `serve start`."""
    replicas = DuetJAX.options(
        num_replicas=arguments.num_replicas, ray_actor_options={"num_gpus": arguments.num_gpus}
    )
    return replicas.bind(arguments.model, arguments.engine)
