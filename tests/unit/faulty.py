"""What the tests of faults attack: a server in this process over the alphabet engine."""

import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from fake_engine import FakeEngine
from serve_setup import MODEL, Served, serving, write_tokenizer

PATIENCE = 5.0  # seconds; without its guard a server may never answer
CONTROL = {"model": MODEL, "prompt": "m", "max_tokens": 4}


@contextmanager
def server(*, engine: dict[str, Any] | None = None, **settings: Any) -> Iterator[Served]:
    """A server; `engine`: settings of its `FakeEngine`, the others of `serving`."""
    with serving(_folder(), FakeEngine(**engine or {}), **settings) as served:
        yield served


def harm(served: Served) -> str | None:
    """What is wrong with a server that was attacked; None if it is as it was."""
    with httpx.Client(base_url=served.url, timeout=PATIENCE, trust_env=False) as http:
        served.engine.executor.release()
        if not _in_time(lambda: http.get("/readyz").status_code == 200):
            return f"not ready ({code(http.get('/readyz'))})"
        if not _in_time(lambda: _is_idle(served)):
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


def _is_idle(served: Served) -> bool:
    stats = served.engine.stats()
    holds = (stats.running, stats.waiting, stats.pages_held, served.context.admission.in_flight)
    return not any(holds) and not served.context.dispatcher.num_waiting


def _in_time(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE
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
