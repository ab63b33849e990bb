"""Requests that are no HTTP, too much of it, or meant for somebody else's parser."""

import asyncio
import re
import socket
import uuid
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

from fake_engine import wait_until
from faults import Faults
from faulty import code, harm, in_time, lifted, server, setting
from serve_setup import MODEL, post_bytes

from duetjax.serve import completions, endpoint, request_ids
from duetjax.serve.auth import BearerAuth

FAULTS = Faults("HTTP", server, harm)
GET = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
LAST = b"Connection: close\r\n\r\n"


def sending(*parts: bytes):
    """An attack: these bytes, and what comes back until the server closes."""

    def attack(served):
        with served.connect() as connection:
            try:
                for part in parts:
                    connection.sendall(part)
            except ConnectionError:
                pass  # it had heard enough
            return answers(connection)

    return attack


def answers(connection: socket.socket) -> str:
    """All responses on a connection, in words."""
    received = b""
    try:
        while chunk := connection.recv(65536):
            received += chunk
    except ConnectionError:
        pass
    return ", ".join(map(_words, received.split(b"HTTP/1.1 ")[1:])) or "nothing"


def _words(response: bytes) -> str:
    told = re.search(rb'"code":"(\w+)"', response)
    return " ".join([response[:3].decode(), *([told[1].decode()] if told else [])])


for name, content in (
    ("what is not HTTP", b"garbage\r\n\r\n"),
    ("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64)),
    ("no Host", b"GET /v1/models HTTP/1.1\r\n\r\n"),
    ("two Hosts", GET + b"Host: y\r\n\r\n"),
    ("a NUL in the path", b"GET /v1\0/models HTTP/1.1\r\nHost: x\r\n\r\n"),
    ("a space before a header's colon", GET + b"Content-Length : 5\r\n\r\n"),
    ("Content-Length -5", POST + b"Content-Length: -5\r\n\r\n"),
    ("Content-Length +5", POST + b"Content-Length: +5\r\n\r\nabcde"),
    ("Content-Length of 30 digits", POST + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n"),
    ("two Content-Lengths", POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef"),
    ("a chunk of negative length", POST + b"Transfer-Encoding: chunked\r\n\r\n-5\r\nabcde\r\n"),
    ("a chunk of 2^100 bytes", POST + b"Transfer-Encoding: chunked\r\n\r\n1" + b"0" * 25 + b"\r\n"),
    ("Transfer-Encoding gzip", POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"),
):
    FAULTS.add(name, sending(content), expected="400 malformed_http", guard="h11")
for size, times in (("1 MB", 1), ("20 MB", 20)):
    FAULTS.add(
        f"a header of {size}",
        sending(GET, b"X: ", *[b"x" * 10**6] * times, b"\r\n", LAST),
        expected="400 malformed_http",
        guard="max_header_bytes, in h11",
        off=lifted("max_header_bytes"),
    )
FAULTS.add(
    "a URL of 200 KB",
    sending(b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: x\r\n" + LAST),
    expected="400 malformed_http",
    guard="max_header_bytes, in h11",
    off=lifted("max_header_bytes"),
)
FAULTS.add(
    "10,000 headers",
    sending(GET, b"a:b\r\n" * 10_000, LAST),
    expected="400 too_many_headers",
    guard="max_headers",
    off=lifted("max_headers"),
)
BODY = post_bytes("/v1/completions", {"model": MODEL, "prompt": "a"}).partition(b"\r\n\r\n")[2]
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
FAULTS.add(
    "Content-Length and chunks, and a request hidden behind",
    sending(POST + b"Content-Length: %d\r\n" % (len(CHUNKED) + 30) + CHUNKED + GET + LAST),
    expected="400 malformed_http",
    guard="two ways to tell a body's length end the connection",
    off=setting(request_ids, "_fault", lambda *_: None),
)
for method in ("GET", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "BREW"):
    FAULTS.add(
        f"{method} of a route for POST",
        sending(POST.replace(b"POST", method.encode()) + LAST),
        expected="405 method_not_allowed",
        guard="Starlette's routes",
    )


for name, target in (
    ("a private path", b"/v1/models"),
    ("//", b"//v1/models"),
    ("/./", b"/v1/./models"),
    ("..", b"/livez/../v1/models"),
    ("%2e%2e", b"/livez/%2e%2e/v1/models"),
    ("an encoded letter", b"/v1/%6dodels"),
    ("a letter encoded twice", b"/v1/%256dodels"),
    ("capital letters", b"/V1/Models"),
    ("a trailing slash", b"/v1/models/"),
    ("a query", b"/v1/models?/livez"),
    ("a parameter", b"/v1/models;/livez"),
    ("a NUL, encoded", b"/livez%00/v1/models"),
    ("a public path and a slash", b"/livez/"),
    ("an absolute target", b"http://x/v1/models"),
    ("a public host", b"http://livez/v1/models"),
):
    FAULTS.add(
        f"without the key: {name}",
        sending(b"GET " + target + b" HTTP/1.1\r\nHost: x\r\n" + LAST),
        expected="401 invalid_api_key",
        guard="all paths need the key but those listed, compared whole",
        off=setting(BearerAuth, "_is_allowed", lambda *_: True),
        settings={"api_key": "secret"},
    )


def large(size: int, *, chunked: bool):
    """An attack: a body that would be right if it were not so large."""

    def attack(served):
        text = BODY.replace(b'"a"', b'"%s"' % (b"a" * size))
        pieces = (text[i : i + 2**20] for i in range(0, len(text), 2**20))
        with served.http() as http:
            return code(http.post("/v1/completions", content=pieces if chunked else text))

    return attack


for name, chunked in (("with its length", False), ("in chunks", True)):
    FAULTS.add(
        f"60 MB of body, {name}",
        large(60 * 10**6, chunked=chunked),
        expected="413 body_too_large",
        guard="max_body_bytes, before or while it comes",
        off=lifted("max_body_bytes"),
    )


@FAULTS.attack(
    "a client that has shut its side of the connection",
    expected="nothing, and its work has ended",
    guard="whoever sends no more is taken to be gone: its work is aborted",
    off=setting(endpoint, "_disconnected", lambda _: asyncio.Event().wait()),
)
def half_closed(served):
    served.engine.executor.hold()
    with served.connect() as connection:
        connection.sendall(post_bytes("/v1/completions", {"model": MODEL, "prompt": "a"}))
        wait_until(lambda: served.engine.num_live == 1, "a request at work")
        connection.shutdown(socket.SHUT_WR)
        seen = answers(connection)
    work = "has ended" if in_time(lambda: served.engine.aborted, 2.0) else "goes on"
    return f"{seen}, and its work {work}"


@FAULTS.attack(
    "two requests with one x-request-id at once",
    expected="200 bcd, 200 nop",
    guard="the engine's ids are drawn, not the client's",
    off=setting(completions, "uuid", SimpleNamespace(uuid4=lambda: uuid.UUID(int=7))),
)
def one_id(served):
    def ask(prompt: str) -> str:
        asked = {"model": MODEL, "prompt": prompt, "max_tokens": 3}
        with served.http(headers={"x-request-id": "me"}) as http:
            http.timeout = 3.0
            response = http.post("/v1/completions", json=asked)
        assert response.headers["x-request-id"] == "me"
        if response.status_code != 200:
            return code(response)
        return f"200 {response.json()['choices'][0]['text']}"

    served.engine.executor.hold()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, "a")
        wait_until(lambda: served.engine.num_live == 1, "a request at work")
        second = pool.submit(ask, "m")
        wait_until(lambda: served.engine.num_live == 2 or second.done(), "both")
        served.engine.executor.release()
        return f"{first.result()}, {second.result()}"


test_guarded, test_unguarded = FAULTS.tests()
