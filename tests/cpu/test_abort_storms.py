"""Storms of clients that ask for a stream and leave, each at another moment."""

import asyncio
import json
import os
import random
import resource
import socket
import struct
import time
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from server_process import metric, serving

STORMS, CONNECTIONS = 5, 1000
PATIENCE = 30.0  # seconds until what they held must be back
SPARE_DESCRIPTORS = 100
FLAGS = (
    *("--device", "sim", "--sim-step-ms", "10/10", "--max-num-seqs", "128", "--page-size", "16"),
    *("--max-num-queued-reqs", str(CONNECTIONS)),  # so that nobody is turned away
)
CONTROL = {"model": "duetjax-demo", "prompt": "Once", "max_tokens": 20, "seed": 7}
MOMENTS = ("before all", "before all", "at once", "soon", "in the stream")
RESET = struct.pack("ii", 1, 0)


@pytest.fixture
def descriptors():
    """How many connections may be open at once, here and in the server."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = CONNECTIONS + SPARE_DESCRIPTORS
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
    yield min(CONNECTIONS, most - SPARE_DESCRIPTORS)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_five_storms_leave_nothing_behind(descriptors):
    with serving(*FLAGS) as (process, url):
        pids = (process.pid, child_of(process.pid))
        answer = control(url)
        most = settled(url, pids, lambda state: not any(state["used"]))
        assert not any(most["used"])
        # Some threads start when they are first needed, and stay: those that tokenise, and in each
        # process the one that writes what the other does not read at once.
        most["threads"] = [each + 1 for each in most["threads"]]
        most["threads"][0] += min(32, (os.cpu_count() or 1) + 4)  # asyncio's pool
        for number in range(STORMS):
            began = storm(url, number, descriptors)
            assert began > CONNECTIONS / 20, f"storm {number}: {began} streams began"
            after = settled(url, pids, lambda state: is_within(state, most))
            assert is_within(after, most), f"after storm {number}: {after}, at most {most}"
            assert httpx.get(f"{url}/readyz", trust_env=False).status_code == 200
            assert control(url) == answer, f"after storm {number}"


def control(url):
    """What a request always gets."""
    response = httpx.post(f"{url}/v1/completions", json=CONTROL, trust_env=False, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()["choices"]


def child_of(pid):
    """The one process that another has started."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):  # others end meanwhile
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    [child] = [each for each, parent in parents.items() if parent == pid]
    return child


def settled(url, pids, is_right):
    """What is held once it `is_right`, or after much patience."""
    deadline = time.monotonic() + PATIENCE
    while not is_right(state := held(url, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)  # or the server has not yet closed the connection of the look before
    return state


def is_within(state, most):
    return all(
        value <= top for what in most for value, top in zip(state[what], most[what], strict=True)
    )


def held(url, pids):
    """By the server's process and the engine's; used: by requests, which is 0 when none is left."""
    threads, descriptors = (
        [len(os.listdir(f"/proc/{pid}/{what}")) for pid in pids] for what in ("task", "fd")
    )
    pages = [metric(url, "duetjax_pages", f'state="{state}"') for state in ("held", "quarantined")]
    requests = [metric(url, f"vllm:num_requests_{state}") for state in ("running", "waiting")]
    return {"threads": threads, "descriptors": descriptors, "used": [*pages, *requests]}


def storm(url, seed, at_once):
    """A thousand clients come and go; how many of them saw a stream begin."""
    address = ("127.0.0.1", httpx.URL(url).port)
    draw = random.Random(seed)
    return sum(
        asyncio.run(batch(address, draw, min(at_once, CONNECTIONS - first)))
        for first in range(0, CONNECTIONS, at_once)
    )


async def batch(address, draw, count):
    async with asyncio.timeout(PATIENCE):
        return sum(await asyncio.gather(*(come_and_go(address, draw) for _ in range(count))))


async def come_and_go(address, draw):
    """Whether a stream began."""
    loop, request = asyncio.get_running_loop(), streaming_request(draw)
    with socket.socket() as end:
        end.setblocking(False)
        await loop.sock_connect(end, address)
        if draw.random() < 0.5:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        moment = draw.choice(MOMENTS)
        size = draw.randrange(len(request)) if moment == "before all" else len(request)
        await loop.sock_sendall(end, request[:size])
        if moment == "soon":
            await asyncio.sleep(draw.uniform(0, 0.3))
        if moment != "in the stream":
            return False
        read = await loop.sock_recv(end, 4096)
        for _ in range(draw.randrange(3)):
            await loop.sock_recv(end, 4096)
        return read.startswith(b"HTTP/1.1 200")


def streaming_request(draw):
    """Does not end by itself for longer than anybody has patience."""
    words = " ".join(draw.choices(("a", "page", "of", "the", "prompt"), k=draw.randrange(1, 60)))
    asked = {"model": "duetjax-demo", "prompt": words, "stream": True, "max_tokens": 3500}
    body = json.dumps(asked | {"ignore_eos": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: storm\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body
