"""The engine's own process: loads the model and does what the server's process says.

Started by `engine_process.EngineProcess` alone. It ends with the server's process, however that
ends, and lets nobody else end it: signals are for the server, which drains first.
"""

import gc
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from duetjax import build
from duetjax.build import LoadedModel, ModelRequest
from duetjax.config import DuetJAXError, EngineConfig
from duetjax.log_lines import LogFormat, log_to_stderr
from duetjax.policy.request import FinishReason, StepOutputs
from duetjax.wire import Channel, new_request, plain, plain_counts, plain_outputs

TICK_SECONDS = 0.2  # between signs of life

_log = logging.getLogger(__name__)


def main(log_format: str, descriptor: int) -> None:
    """Serves the other end of a socket, which says what to load; never returns."""
    work(descriptor, _load, LogFormat(log_format))


def work(
    descriptor: int,
    load: Callable[..., LoadedModel],
    log_format: LogFormat = LogFormat.TEXT,
) -> None:
    """Serves the other end of a socket with what `load` makes of its first message."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    channel = Channel(socket.socket(fileno=descriptor))
    inbox: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(channel, inbox), daemon=True).start()
    with log_to_stderr(log_format):
        try:
            _, *values = inbox.get()
            _Worker(load(*values), channel).serve(inbox)
        except DuetJAXError as error:
            channel.send("error", str(error))
        except BaseException as error:
            _log.exception("the engine's process failed")
            channel.send("error", f"the engine's process failed: {error!r}")
        inbox.get()  # until the other end leaves, which ends this process


class _Worker:
    """A loaded model and the channel that it is served by."""

    def __init__(self, model: LoadedModel, channel: Channel) -> None:
        self._client = model.engine
        self._model = model
        self._channel = channel
        self._is_started = threading.Event()

    def serve(self, inbox: "queue.SimpleQueue[tuple[Any, ...]]") -> None:
        """Says that it is ready, then does as it is told until it is told to end."""
        client, model = self._client, self._model
        self._channel.send(
            "ready",
            plain(client.limits),
            client.vocab_size,
            plain(client.rung),
            client.constrains,
            model.max_model_len,
            model.notice,
            plain(client.stats()),
            plain_counts(client.launch_counts()),
            model.compilations(),
        )
        gc.collect()
        gc.freeze()
        threading.Thread(target=self._tick, daemon=True).start()
        stop_watching = None
        while True:
            what, *values = inbox.get()
            if what == "submit":
                self._submit(*values)
            elif what == "abort":
                client.abort(values[0], unless_begun=values[1])
            elif what == "start":
                client.start(self._on_outputs)
                self._is_started.set()
            elif what == "watch":
                client.watch(values[0])
            elif what == "launches":
                if values[0]:
                    stop_watching = client.watch_launches(self._on_launches)
                elif stop_watching is not None:
                    stop_watching()
            else:
                assert what == "shutdown", what
                ended = client.shutdown(values[0])
                self._channel.send("closed", ended, plain(client.stats()), self._failure)
                return

    def _submit(self, values: tuple[Any, ...]) -> None:
        new = new_request(values)
        try:
            self._client.submit(new)
        except DuetJAXError:  # the server's process has looked at it, so that hardly happens
            self._on_outputs(StepOutputs(finished=((new.id, FinishReason.ERROR),)))

    def _on_outputs(self, outputs: StepOutputs) -> None:
        stats = plain(self._client.stats())
        self._channel.send("outputs", stats, plain_outputs(outputs), self._failure)

    def _on_launches(self, launches: tuple[Any, ...]) -> None:
        self._channel.send("launches", plain(launches))

    def _tick(self) -> None:
        self._is_started.wait()
        while True:
            client = self._client
            counts = plain_counts(client.launch_counts())
            compiled = self._model.compilations()
            stats = plain(client.stats())
            self._channel.send("tick", stats, counts, client.silence, compiled, self._failure)
            time.sleep(TICK_SECONDS)

    @property
    def _failure(self) -> tuple[bool, str] | None:
        """Whether anybody may read it, and what it says."""
        failure = self._client.failure
        if failure is None:
            return None
        is_told = isinstance(failure, DuetJAXError)
        return is_told, str(failure) if is_told else repr(failure)


def _read(channel: Channel, inbox: "queue.SimpleQueue[tuple[Any, ...]]") -> None:
    for message in channel.receive():
        inbox.put(message)
    sys.stderr.flush()
    os._exit(0)  # the server's process has left; Python's own end could wait for a device


def _load(request: tuple[Any, ...], engine: tuple[Any, ...]) -> LoadedModel:
    return build.load(_model_request(request), _engine_config(engine))


def _model_request(values: tuple[Any, ...]) -> ModelRequest:
    model, tokenizer, chat_template, load_format = values
    template = None if chat_template is None else Path(chat_template)
    return ModelRequest(model, tokenizer, template, load_format)


def _engine_config(values: tuple[Any, ...]) -> EngineConfig:
    names = [field.name for field in fields(EngineConfig)]
    return EngineConfig(**dict(zip(names, values, strict=True)))
