"""The life of a server: its address, its drain, its exit."""

import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import openai
import pytest
from fake_engine import PATIENCE, FakeEngine, wait_until
from serve_setup import MODEL, events, make_service, post_bytes, read_all, serving, write_tokenizer

from duetjax.cli import main
from duetjax.config import ConfigError
from duetjax.serve.server import HttpServer, bind

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_tokenizer(folder, template=None)
    return folder


def stream_in_background(served, **body):
    """A raw stream under way: returns what joins it and gives the whole response."""
    given = {"model": MODEL, "prompt": "a", "max_tokens": 5, "stream": True} | body
    received = []

    def read():
        with served.connect() as connection:
            connection.sendall(post_bytes("/v1/completions", given))
            received.append(read_all(connection))

    thread = threading.Thread(target=read)
    thread.start()

    def finish():
        thread.join(PATIENCE)
        return received[0]

    return finish


def test_a_port_in_use_is_one_line_that_names_the_flags(folder):
    with serving(folder) as served:
        port = int(served.url.rpartition(":")[2])
        with pytest.raises(ConfigError, match=f"--port {port}") as caught:
            bind("127.0.0.1", port)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("host", "port"), [("no.such.host.invalid", 0), ("127.0.0.1", 70_000)])
def test_an_address_that_is_none_is_one_line(host, port):
    with pytest.raises(ConfigError, match="--host") as caught:
        bind(host, port)
    assert "\n" not in str(caught.value)


def test_ipv6_loopback_is_served(folder):
    with bind("::1", 0) as listener:
        server = HttpServer(make_service(folder, FakeEngine()), listener)
        assert server.url.startswith("http://[::1]:")


def test_a_token_does_not_wait_until_the_one_before_has_been_acknowledged(folder):
    with serving(folder) as served, served.connect() as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(4096)
        [protocol] = served.server._uvicorn.server_state.connections
        accepted = protocol.transport.get_extra_info("socket")
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_an_address_reserved_for_a_loading_model_refuses_clients():
    with bind("127.0.0.1", 0) as listener, pytest.raises(ConnectionRefusedError):
        socket.create_connection(listener.getsockname(), timeout=PATIENCE)


def test_a_draining_server_refuses_new_work_and_finishes_the_old(folder):
    with serving(folder, shutdown_timeout=PATIENCE) as served, served.http() as http:
        served.engine.executor.hold()
        finish = stream_in_background(served)
        wait_until(lambda: served.engine.submitted, "submission")
        served.server.stop()
        wait_until(lambda: http.get("/health").status_code == 503, "the drain")
        refused = http.post("/v1/completions", json={"model": MODEL, "prompt": "a"})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "shutting_down"
        assert 1 <= int(refused.headers["retry-after"]) <= PATIENCE
        assert http.get("/metrics").status_code == 200
        served.engine.executor.release()
        *_, last, done = events(finish())
        assert '"finish_reason":"length"' in last
        assert done == "[DONE]"
        served.join()
        with pytest.raises(httpx.ConnectError):
            http.get("/health")


@pytest.mark.parametrize("stops", [1, 2])
def test_calls_that_outlast_the_drain_end_with_error_events_and_free_their_pages(folder, stops):
    timeout = 0.05 if stops == 1 else PATIENCE * 10
    with serving(folder, shutdown_timeout=timeout) as served:
        served.engine.executor.hold()
        finish = stream_in_background(served)
        whole = stream_in_background(served, stream=False)
        wait_until(lambda: len(served.engine.submitted) == 2, "submission")
        for _ in range(stops):
            served.server.stop()
        served.join()
        error, done = events(finish())
        assert '"code":"shutting_down"' in error
        assert done == "[DONE]"
        assert whole().startswith(b"HTTP/1.1 503 ")
        assert set(served.engine.aborted) == set(served.engine.submitted)
        served.engine.executor.release()
        served.engine.wait_idle()


def test_stop_after_the_end_is_of_no_effect(folder):
    with serving(folder) as served:
        served.server.stop()
        served.join()
        served.server.stop()


PROGRAM = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
from pathlib import Path
from fake_engine import FakeEngine
from serve_setup import make_service
from duetjax.serve.server import HttpServer, bind

engine = FakeEngine(max_len=100_000, num_pages=10_000)
service = make_service(Path(sys.argv[1]), engine, max_model_len=100_000)
server = HttpServer(service, bind('127.0.0.1', 0), shutdown_timeout=float(sys.argv[2]))
engine.executor.hold()
engine.executor.step(float(sys.argv[3]))
server.run(lambda line: print(line, flush=True))
engine.executor.release()
engine.shutdown(10)
print(engine.stats().pages_held == 0)
"""


@pytest.fixture
def program(folder):
    """Starts the server in a process of its own; gives the process and its address.

    steps: how many the engine takes before it waits; a client slower than the server would have
    more to read than a hurried shutdown leaves time for.
    """
    started = []

    def start(timeout, steps=float("inf")):
        arguments = [str(folder), str(timeout), str(steps)]
        process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", PROGRAM, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        line = process.stdout.readline()
        assert line.startswith(f"duetjax: serving {MODEL} on http://127.0.0.1:"), line
        return process, line.split()[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def end_of(process):
    out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, out, err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_an_idle_server_ends_it_with_0(program, number):
    process, url = program(30)
    assert httpx.get(f"{url}/health", trust_env=False, timeout=PATIENCE).status_code == 200
    process.send_signal(number)
    assert end_of(process) == (0, "True\n", "")


def test_a_signal_under_load_lets_the_stream_finish(program):
    process, url = program(30)
    with openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
        stream = client.completions.create(
            model=MODEL, prompt="a", max_tokens=500, stream=True, temperature=1, seed=0
        )
        next(stream)
        process.send_signal(signal.SIGTERM)
        *_, last = stream
        assert last.choices[0].finish_reason == "length"
    assert end_of(process)[:2] == (0, "True\n")


def test_a_second_signal_ends_the_stream_with_an_error_event(program):
    process, url = program(1000, steps=3)
    with openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
        stream = client.completions.create(
            model=MODEL, prompt="a", max_tokens=90_000, stream=True, temperature=1, seed=0
        )
        next(stream)
        process.send_signal(signal.SIGTERM)
        wait_until(
            lambda: (
                httpx.get(f"{url}/health", trust_env=False, timeout=PATIENCE).status_code == 503
            ),
            "the drain",
        )
        process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError) as caught:
            list(stream)
        assert caught.value.code == "shutting_down"
    assert end_of(process)[:2] == (0, "True\n")


@pytest.mark.parametrize("where", ["flag", "variable"])
def test_an_empty_key_is_refused_as_it_would_let_everybody_in(where, monkeypatch, capsys):
    if where == "variable":
        monkeypatch.setenv("DUETJAX_API_KEY", " ")
    assert main(["serve", *(["--api-key", ""] if where == "flag" else [])]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("duetjax: error: --api-key, or DUETJAX_API_KEY, is empty; give a key")
