"""Clients that are slow, or leave: each loses its own work alone."""

import time
from collections.abc import Callable

from fake_engine import wait_until
from faults import Faults
from faulty import forever, harm, in_time, server, setting
from serve_setup import MODEL, Served, post_bytes
from test_serve_deadlines import SHORT, small_buffers, unread

from duetjax.serve import endpoint
from duetjax.serve.limits import Limits

FAULTS = Faults("Slow clients, and clients that leave", server, harm)
BODY = {"model": MODEL, "prompt": "a", "max_tokens": 100, "ignore_eos": True}
WAIT = 2.0  # seconds, for what would have happened long ago
COUNT = 500


def connections(served: Served) -> int:
    """How many the server has open."""
    return len(served.server._uvicorn.server_state.connections)


@FAULTS.attack(
    f"{COUNT} heads that come too slowly",
    expected=f"all {COUNT} closed, and another answered meanwhile",
    guard="--header-timeout-s, in our connections",
    off=forever("header_timeout_s"),
    settings={"limits": Limits(header_timeout_s=SHORT)},
)
def slow_heads(served: Served) -> str:
    opened = []
    try:
        for _ in range(COUNT):
            opened.append(served.connect())
            opened[-1].sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX-Sl")
        with served.http() as http:
            assert http.get("/health").status_code == 200
        in_time(lambda: connections(served) == 0, WAIT)
        closed = COUNT - connections(served)
    finally:
        for connection in opened:
            connection.close()
    all_closed = "all" if closed == COUNT else f"{closed} of"
    return f"{all_closed} {COUNT} closed, and another answered meanwhile"


@FAULTS.attack(
    "a connection that never asks",
    expected="closed",
    guard="--header-timeout-s, in our connections",
    off=forever("header_timeout_s"),
    settings={"limits": Limits(header_timeout_s=SHORT)},
)
def silent(served: Served) -> str:
    with served.connect() as connection:
        connection.settimeout(WAIT)
        return "closed" if connection.recv(1) == b"" else "an answer"


@FAULTS.attack(
    "a short body, then silence",
    expected="408",
    guard="--body-timeout-s, where bodies are read",
    off=forever("body_timeout_s"),
    settings={"limits": Limits(body_timeout_s=SHORT)},
)
def short_body(served: Served) -> str:
    with served.connect() as connection:
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{"
        connection.sendall(head.encode())
        connection.settimeout(WAIT)
        return connection.recv(4096).split(b" ")[1].decode()


@FAULTS.attack(
    "the body of a request that was refused already, and never ends",
    expected="closed",
    guard="--body-timeout-s, in our connections",
    off=forever("body_timeout_s"),
    settings={"limits": Limits(body_timeout_s=SHORT, max_body_bytes=500)},
)
def endless_body(served: Served) -> str:
    with served.connect() as connection:
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 999999\r\n\r\n"
        connection.sendall(head.encode())
        deadline = time.monotonic() + WAIT
        while time.monotonic() < deadline:
            try:
                connection.sendall(b" ")
            except OSError:
                return "closed"
            time.sleep(0.02)
    return "open, and read from"


@FAULTS.attack(
    "a stream that is not read",
    expected="the connection cut, and its work ended",
    guard="--slow-reader-timeout-s, in our connections",
    off=forever("slow_reader_timeout_s"),
    settings={"limits": Limits(slow_reader_timeout_s=SHORT)},
)
def slow_reader(served: Served) -> str:
    served.engine.executor.hold()
    small_buffers(served)
    with unread(served, stream=True, prompt=["b" * 200] * 8, max_tokens=56, logprobs=5):
        served.engine.executor.release()
        wait_until(lambda: len(served.engine.submitted) == 64, "submission")
        cut = in_time(lambda: connections(served) == 0, WAIT)
    return "the connection cut, and its work ended" if cut else "the connection kept"


@FAULTS.attack(
    "a whole answer that is not read",
    expected="the connection cut",
    guard="--slow-reader-timeout-s, in our connections",
    off=forever("slow_reader_timeout_s"),
    settings={"limits": Limits(slow_reader_timeout_s=SHORT, keep_alive_s=SHORT)},
)
def unread_answer(served: Served) -> str:
    small_buffers(served)
    with unread(served, n=1, prompt=["b" * 200] * 30, max_tokens=20, logprobs=5):
        wait_until(lambda: len(served.engine.submitted) == 30, "submission")
        served.engine.wait_idle()
        cut = in_time(lambda: connections(served) == 0, WAIT)
    return "the connection cut" if cut else "the connection kept"


@FAULTS.attack(
    "an answered client that asks no more",
    expected="closed",
    guard="--keep-alive-s, by uvicorn",
    off=forever("keep_alive_s"),
    settings={"limits": Limits(keep_alive_s=SHORT)},
)
def idle_client(served: Served) -> str:
    with served.connect() as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        connection.settimeout(WAIT)
        while connection.recv(4096):
            pass
        return "closed"


# Leaving.


async def answer_alone(receive: object, answer: object) -> None:
    """In place of `endpoint._while_connected`: nobody looks whether the client is there."""
    await answer  # type: ignore[misc]


def leaving(state: Callable[[Served], object], **body: object) -> Callable[[Served], str]:
    """An attack: a client that leaves once `state` has come."""

    def attack(served: Served) -> str:
        served.engine.executor.hold()
        with served.connect() as connection:
            connection.sendall(post_bytes("/v1/completions", BODY | body))
            state(served)
        ended = in_time(lambda: set(served.engine.submitted) <= set(served.engine.aborted), WAIT)
        return "its work ends" if ended else "its work goes on"

    return attack


def queued(served: Served) -> None:
    """It is the second, and there is one slot."""
    wait_until(lambda: len(served.engine.submitted) == 1, "submission")


def in_prefill(served: Served) -> None:
    served.engine.executor.step(1)
    wait_until(lambda: served.engine.stats().steps >= 1, "a step")


def in_decode(served: Served) -> None:
    served.engine.executor.step(4)
    wait_until(lambda: served.engine.stats().generation_tokens >= 3, "tokens")


for when, state, body in (
    ("before its first step", queued, {}),
    ("in prefill", in_prefill, {"prompt": "a" * 150}),
    ("in decode", in_decode, {}),
    ("in decode of 8 completions", in_decode, {"n": 8}),
):
    for stream in (False, True):
        FAULTS.add(
            f"a client that leaves {when}, {'streaming' if stream else 'waiting for the whole'}",
            leaving(state, stream=stream, **body),
            expected="its work ends",
            guard="every call watches its client",
            off=setting(endpoint, "_while_connected", answer_alone),
            settings={"engine": {"num_slots": 2} if "prefill" in when else {}},
        )


@FAULTS.attack(
    "a client that waits longer than it may in the queue",
    expected="503",
    guard="--queue-timeout-s",
    off=forever("queue_timeout_s"),
    settings={"engine": {"num_slots": 1}, "limits": Limits(queue_timeout_s=SHORT)},
)
def waits(served: Served) -> str:
    served.engine.executor.hold()
    with served.connect() as first, served.connect() as second:
        first.sendall(post_bytes("/v1/completions", BODY))
        wait_until(lambda: served.engine.executor.num_waiting == 1, "a launch")
        second.sendall(post_bytes("/v1/completions", BODY))
        wait_until(lambda: len(served.engine.submitted) == 2, "submission")
        second.settimeout(WAIT)
        if in_time(lambda: len(served.engine.expired) >= 2, WAIT):
            served.engine.executor.step(1)  # aborts are for between steps
        return second.recv(4096).split(b" ")[1].decode()


@FAULTS.attack(
    "a request that would take for ever",
    expected="504",
    guard="--request-timeout-s",
    off=forever("request_timeout_s"),
    settings={"limits": Limits(request_timeout_s=SHORT)},
)
def takes_for_ever(served: Served) -> str:
    served.engine.executor.hold()
    with served.connect() as connection:
        connection.sendall(post_bytes("/v1/completions", BODY))
        connection.settimeout(WAIT)
        return connection.recv(4096).split(b" ")[1].decode()


test_guarded, test_unguarded = FAULTS.tests()
