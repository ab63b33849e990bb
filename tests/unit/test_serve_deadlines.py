"""Whatever takes too long ends: waiting, computing, sending and reading."""

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from fake_engine import FakeEngine, wait_until
from serve_setup import MODEL, events, post_bytes, read_all, serving
from test_serve_errors import error_of
from test_serve_metrics import scrape

from duetjax.serve.limits import Limits

BODY = {"model": MODEL, "prompt": "a", "max_tokens": 3}
SHORT = 0.2  # seconds that are soon over
REFUSED = "duetjax_refused_requests_total"


def limited(folder, engine=None, **limits):
    return serving(folder, engine, limits=Limits(**limits))


def closed(connection):
    """What came until the server closed the connection, however it did."""
    try:
        return read_all(connection)
    except ConnectionResetError:
        return b""


# In the queue, and in the engine.


@pytest.mark.parametrize("stream", [False, True])
def test_who_waits_too_long_is_told_and_who_runs_goes_on(folder, stream):
    engine = FakeEngine(num_slots=1)
    with (
        limited(folder, engine, queue_timeout_s=SHORT) as served,
        served.http() as http,
        ThreadPoolExecutor(1) as pool,
    ):
        engine.executor.hold()
        first = pool.submit(http.post, "/v1/completions", json=BODY)
        wait_until(lambda: engine.executor.num_waiting == 1, "a launch")
        waiting = pool_answer(served, BODY | {"stream": stream})
        wait_until(lambda: len(engine.submitted) == 2, "another request")
        wait_until(lambda: set(engine.expired) == set(engine.submitted), "the deadline")
        engine.executor.release()
        status, error = waiting()
        assert (status, error["code"]) == (200 if stream else 503, "deadline_exceeded")
        assert first.result(60).json()["choices"][0]["text"] == "bcd"
        engine.wait_idle()
        assert scrape(http)[REFUSED, "queue_timeout_s"] == 1


def pool_answer(served, body):
    """Sends a request; what is returned waits for its status and error."""
    connection = served.connect()
    connection.sendall(post_bytes("/v1/completions", body, Connection="close"))

    def wait():
        with connection:
            answer = read_all(connection)
        status = int(answer.split(b" ", 2)[1])
        if body.get("stream"):
            return status, json.loads(events(answer)[-2])["error"]
        assert b"retry-after" in answer or status != 503
        return status, json.loads(answer.partition(b"\r\n\r\n")[2])["error"]

    return wait


def test_a_choice_that_has_begun_does_not_wait_any_more(folder):
    with limited(folder, queue_timeout_s=SHORT, request_timeout_s=0.0) as served:
        served.engine.executor.hold()
        with served.http() as http, ThreadPoolExecutor(1) as pool:
            answer = pool.submit(http.post, "/v1/completions", json=BODY)
            wait_until(lambda: served.engine.executor.num_waiting == 1, "a launch")
            wait_until(lambda: served.engine.expired == served.engine.submitted, "the deadline")
            served.engine.executor.release()
            assert answer.result(60).status_code == 200


@pytest.mark.parametrize("held", [False, True])
def test_a_request_that_takes_too_long_ends(folder, held):
    """Also while tokens come: then the deadline is seen on their arrival."""
    with limited(folder, request_timeout_s=SHORT) as served, served.http() as http:
        executor = served.engine.executor
        executor.hold()
        with ThreadPoolExecutor(1) as pool:
            long = BODY | {"max_tokens": 200, "ignore_eos": True}
            answer = pool.submit(http.post, "/v1/completions", json=long)
            while not (held or answer.done()):
                executor.step(1)
                time.sleep(0.005)
            response = answer.result(60)
        assert error_of(response, 504)["code"] == "deadline_exceeded"
        assert response.headers["x-should-retry"] == "false"
        assert scrape(http)[REFUSED, "request_timeout_s"] == 1
        executor.release()
        served.engine.wait_idle()


def test_a_stream_that_takes_too_long_ends_with_an_error_event(folder):
    with limited(folder, request_timeout_s=SHORT) as served:
        served.engine.executor.hold()
        _, error = pool_answer(served, BODY | {"stream": True})()
        assert error["code"] == "deadline_exceeded"
        served.engine.executor.release()
        served.engine.wait_idle()


# Sending.


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nHost: x\r\nX-Slow: "])
def test_a_head_that_does_not_come_ends_the_connection(folder, sent):
    with limited(folder, header_timeout_s=SHORT) as served, served.connect() as connection:
        connection.sendall(sent)
        answer = closed(connection)
        assert answer.startswith(b"HTTP/1.1 408 ") if sent else answer == b""
        with served.http() as http:
            assert scrape(http).get((REFUSED, "header_timeout_s"), 0) == bool(sent)


def test_the_head_of_a_second_request_has_its_own_time(folder):
    with limited(folder, header_timeout_s=SHORT) as served, served.connect() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        received = b""
        while not received.endswith(b"}"):
            received += connection.recv(4096)
        time.sleep(2 * SHORT)  # between requests it is the keep-alive that counts
        connection.sendall(b"GET /health HTTP/1.1\r\n")
        assert closed(connection).startswith(b"HTTP/1.1 408 Request Timeout\r\n")


def test_a_connection_without_a_second_request_ends(folder):
    with limited(folder, keep_alive_s=SHORT) as served, served.connect() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert closed(connection).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize"])
def test_a_body_that_does_not_come_is_408(folder, path):
    with limited(folder, body_timeout_s=SHORT) as served, served.connect() as connection:
        connection.sendall(
            f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{{".encode()
        )
        answer = closed(connection)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_timeout"
        assert served.context.admission.in_flight == 0


def test_a_body_that_nobody_reads_does_not_keep_the_connection(folder):
    with limited(folder, body_timeout_s=SHORT) as served, served.connect() as connection:
        connection.sendall(b"POST /nope HTTP/1.1\r\nHost: x\r\nContent-Length: 900\r\n\r\n{")
        assert closed(connection).startswith(b"HTTP/1.1 404 ")


# Reading.


def unread(served, **body):
    """A connection that asks for a stream and reads nothing of it."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    host, port = served.url.removeprefix("http://").split(":")
    connection.connect((host, int(port)))
    body = {"model": MODEL, "prompt": "b" * 200, "max_tokens": 50, "n": 8} | body
    connection.sendall(post_bytes("/v1/completions", body))
    return connection


def test_a_reader_that_does_not_read_loses_the_connection_and_its_pages(folder):
    limits = {"slow_reader_timeout_s": SHORT, "max_n": 64, "max_prompts": 64}
    with limited(folder, **limits) as served, served.http() as http:
        served.engine.executor.hold()
        stream = {"stream": True, "prompt": ["b" * 200] * 8, "max_tokens": 56, "logprobs": 5}
        small_buffers(served)
        with unread(served, **stream):
            served.engine.executor.release()
            wait_until(lambda: scrape(http).get((REFUSED, "slow_reader_timeout_s"), 0) == 1, "it")
            served.engine.wait_idle()
        assert http.post("/v1/completions", json=BODY).status_code == 200


def small_buffers(served):
    """The server's sockets hold little, or a test would have to send megabytes."""
    served.server._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)


def test_a_whole_answer_that_nobody_reads_does_not_stay(folder):
    limits = {"slow_reader_timeout_s": SHORT, "keep_alive_s": SHORT}
    with limited(folder, **limits) as served:
        small_buffers(served)
        before = len(served.server._uvicorn.server_state.connections)
        with unread(served, n=1, prompt=["b" * 200] * 30, max_tokens=20, logprobs=5):
            state = served.server._uvicorn.server_state
            wait_until(lambda: state.total_requests == 1, "the answer")
            wait_until(lambda: len(state.connections) == before, "the end of the connection")


def test_a_slow_reader_that_reads_gets_everything(folder):
    with limited(folder, slow_reader_timeout_s=5.0) as served:
        small_buffers(served)
        stream = {"stream": True, "prompt": ["b" * 200] * 8, "max_tokens": 20}
        with unread(served, **stream) as connection:
            connection.settimeout(60)
            received = b""
            while b"[DONE]" not in received:
                received += connection.recv(16384)
                time.sleep(0.001)
        finished = [e for e in events(received) if e != "[DONE]" and '"length"' in e]
        assert len(finished) == 64
