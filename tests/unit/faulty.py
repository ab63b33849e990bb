"""What the tests of faults attack: a server in this process over the alphabet engine."""

import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine
from serve_setup import MODEL, TEMPLATE, Served, serving, write_tokenizer

from duetjax.serve.limits import Limits

PATIENCE = 5.0  # seconds; without its guard a server may never answer
CONTROL = {"model": MODEL, "prompt": "m", "max_tokens": 4}

type Off = Callable[[pytest.MonkeyPatch], None]
"""Switches a guard off."""


@contextmanager
def server(
    *,
    engine: dict[str, Any] | None = None,
    template: str | None = TEMPLATE,
    limits: Limits | None = None,
    **settings: Any,
) -> Iterator[Served]:
    """A server; `engine`: settings of its `FakeEngine`, the others of `serving`.

    template: of its folder; read anew for each server, unless it is the usual one.
    """
    limits = replace(limits or Limits(), **_LIFTED)
    with tempfile.TemporaryDirectory(prefix="duetjax-faults-") as own:
        folder = _folder() if template == TEMPLATE else Path(own)
        if template != TEMPLATE:
            write_tokenizer(folder, template=template)
        with serving(folder, FakeEngine(**engine or {}), limits=limits, **settings) as served:
            yield served


def setting(owner: Any, name: str, value: Any) -> Off:
    """Switches a guard off by what stands in its place."""
    return lambda monkeypatch: monkeypatch.setattr(owner, name, value)


def lifted(*limits: str) -> Off:
    """Servers have no such limits."""

    def off(monkeypatch: pytest.MonkeyPatch) -> None:
        for name in limits:
            monkeypatch.setitem(_LIFTED, name, 2**31 - 1)

    return off


def forever(*limits: str) -> Off:
    """Servers wait for ever."""

    def off(monkeypatch: pytest.MonkeyPatch) -> None:
        for name in limits:
            monkeypatch.setitem(_LIFTED, name, 0)

    return off


def both(*guards: Off) -> Off:
    """None of these guards."""

    def all_off(monkeypatch: pytest.MonkeyPatch) -> None:
        for off in guards:
            off(monkeypatch)

    return all_off


def harm(served: Served) -> str | None:
    """What is wrong with a server that was attacked; None if it is as it was."""
    key = {"authorization": f"Bearer {served.context.service.api_key}"}
    with served.http(headers=key) as http:
        http.timeout = PATIENCE
        served.engine.executor.release()
        in_time(lambda: code(http.get("/readyz")) in ("200", "503 engine_dead"))
        if (ready := code(http.get("/readyz"))) != "200":
            return f"not ready ({ready})"
        if not in_time(lambda: _is_idle(served)):
            return "pages or calls are left"
        answer = http.post("/v1/completions", json=CONTROL)
        if answer.status_code != 200 or answer.json()["choices"][0]["text"] != "nopq":
            return f"the control request fails ({code(answer)})"
    return None


def code(response: httpx.Response) -> str:
    """A response in words: its status, and its error's code."""
    if response.status_code == 200:
        return "200"
    return f"{response.status_code} {response.json()['error']['code']}"


def asking(path: str = "/v1/completions", **fields: Any) -> Callable[[Served], str]:
    """An attack: a request with these fields, a completion of "a" if they say no other."""

    def attack(served: Served) -> str:
        usual = {"prompt": "a"} if path == "/v1/completions" else {}
        with served.http() as http:
            return code(http.post(path, json={"model": MODEL} | usual | fields))

    return attack


def _is_idle(served: Served) -> bool:
    stats = served.engine.stats()
    holds = (stats.running, stats.waiting, stats.pages_held, served.context.admission.in_flight)
    return not any(holds) and not served.context.dispatcher.num_waiting


def in_time(condition: Callable[[], bool], seconds: float = PATIENCE) -> bool:
    """Whether a condition comes true before long."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


@functools.cache
def _folder() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="duetjax-faults-")
    _KEPT.append(folder)  # until the process ends
    write_tokenizer(Path(folder.name))
    return Path(folder.name)


_KEPT: list[tempfile.TemporaryDirectory[str]] = []
_LIFTED: dict[str, int] = {}
