"""`duetjax serve` in a process of its own, for the tests that meet it as users do."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

COMMAND_LINE = ("-m", "duetjax.cli")


@contextmanager
def starting(
    *flags: str,
    program: tuple[str, ...] = COMMAND_LINE,
    apart: bool = False,
    stdout: Any = subprocess.PIPE,
    **env: str,
) -> Iterator[subprocess.Popen[str]]:
    """Starts a server on a free port and does not wait for it; kills it at the end.

    program: what Python runs in place of the command line; it gets the same arguments, and keeps
    the engine in its own process, where it may have changed something, unless `apart`.
    """
    if program is not COMMAND_LINE and not apart:
        flags = ("--disable-frontend-multiprocessing", *flags)
    process = subprocess.Popen(
        [sys.executable, *program, "serve", "--port", "0", *flags],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **env},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@contextmanager
def serving(
    *flags: str, program: tuple[str, ...] = COMMAND_LINE, **environment: str
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server that answers; yields the process and its address. Arguments as of `starting`."""
    with starting(*flags, program=program, **environment) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        line = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert found, process.stderr.read()
        yield process, found[0]


def metric(url: str, name: str, *labels: str) -> float:
    """The value of a series of /metrics whose labels contain all of `labels`."""
    lines = httpx.get(f"{url}/metrics", trust_env=False).text.splitlines()
    [value] = [
        line.rpartition(" ")[2]
        for line in lines
        if re.match(rf"{name}[ {{]", line) and all(label in line for label in labels)
    ]
    return float(value)
