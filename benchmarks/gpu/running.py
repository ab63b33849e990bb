"""Runs items, each in a process of its own that is ended when its time is up."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu.bench import SO_FAR
from gpu.building import ROOT, build_fake, build_launcher
from gpu.items import Outcome, find

TAIL_LINES = 40


@dataclass(frozen=True, slots=True)
class Finding:
    """What an item came to, as this process saw it. tail: the last lines that it printed."""

    outcome: Outcome
    seconds: float
    figures: Mapping[str, Any]
    failures: tuple[str, ...]
    tail: tuple[str, ...]


class Runner:
    """Builds what items need, then runs them one by one.

    build: where libraries are compiled to. scratch: where items write; a folder for each.
    """

    def __init__(self, backend: str, build: Path, scratch: Path) -> None:
        self._backend = backend
        self._fake = build_fake(build) if backend == "fake" else None
        self._launcher, self.launcher_origin = build_launcher(build)
        self._scratch = scratch

    def run(self, name: str, limit_s: float | None) -> Finding:
        """Runs an item under its own time limit or another."""
        item = find(name)
        assert item is not None, name
        if self._backend not in item.backends:
            return Finding(Outcome.SKIP, 0.0, {}, (_needs(item.backends),), ())
        folder = self._scratch / name
        folder.mkdir()
        answer, log = folder / "answer.json", folder / "log.txt"
        command = [sys.executable, "-X", "faulthandler", str(ROOT / "benchmarks/gpu_check.py")]
        command += ["--backend", self._backend, "--item", name]
        command += ["--launcher", str(self._launcher), "--answer", str(answer)]
        if self._fake is not None:
            command += ["--fake", str(self._fake)]
        began = time.monotonic()
        status = _run(command, log, limit_s or item.limit_s, self._environment())
        seconds = round(time.monotonic() - began, 1)
        tail = tuple(log.read_text("utf-8", errors="replace").splitlines()[-TAIL_LINES:])
        if answer.exists():
            found = json.loads(answer.read_text("utf-8"))
            outcome, failures = Outcome(found["outcome"]), tuple(found["failures"])
            kept = tail if outcome is Outcome.FAIL else ()
            return Finding(outcome, seconds, found["figures"], failures, kept)
        figures, failures = _so_far(folder)
        return Finding(Outcome.FAIL, seconds, figures, (*failures, _why(status, seconds)), tail)

    def _environment(self) -> dict[str, str]:
        """Without a GPU what uses JAX runs on the processor."""
        own = {} if self._backend == "cuda" else {"JAX_PLATFORMS": "cpu"}
        return {**os.environ, "PYTHONUNBUFFERED": "1", **own}


def _needs(backends: tuple[str, ...]) -> str:
    return "needs JAX on a GPU" if backends == ("cuda",) else "needs a GPU or its double"


def _so_far(folder: Path) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """What an item found that did not come to its end."""
    try:
        found = json.loads((folder / SO_FAR).read_text("utf-8"))
    except (OSError, ValueError):  # none yet, or ended while it was writing
        return {}, ()
    return found["figures"], tuple(found["failures"])


def _why(status: int | None, seconds: float) -> str:
    if status is None:
        return f"given up after {seconds:.0f} s"
    if status < 0:
        return f"died of {signal.Signals(-status).name}"
    return f"ended with {status} and no answer"


def _run(
    command: list[str], log: Path, limit_s: float, environment: Mapping[str, str]
) -> int | None:
    """The exit status; None if the time was up, which ends the process and all that it started."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Has a process say where it is (Python's fault handler does), then ends it and its own."""
    process.send_signal(signal.SIGABRT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(3)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
