"""`duetjax serve` in a process of its own, for the tests that meet it as users do."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import httpx


@contextmanager
def serving(
    *flags: str, program: tuple[str, ...] = ("-m", "duetjax.cli"), **environment: str
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Starts a server on a free port; yields the process and its address.

    program: what Python runs in place of the command line; it gets the same arguments.
    """
    command = [sys.executable, *program, "serve", "--port", "0", *flags]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        line = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert found, process.stderr.read()
        yield process, found[0]
    finally:
        process.kill()
        process.communicate()


def metric(url: str, name: str, *labels: str) -> float:
    """The value of a series of /metrics whose labels contain all of `labels`."""
    lines = httpx.get(f"{url}/metrics", trust_env=False).text.splitlines()
    [value] = [
        line.rpartition(" ")[2]
        for line in lines
        if re.match(rf"{name}[ {{]", line) and all(label in line for label in labels)
    ]
    return float(value)
