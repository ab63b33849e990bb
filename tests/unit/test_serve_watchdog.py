"""A server over a device that hangs: everybody is told, and it ends by itself."""

import json
import threading

import pytest
from fake_engine import PATIENCE, wait_until
from serve_setup import MODEL, events, post_bytes, read_all, serving, write_tokenizer

from duetjax.serve.dispatch import Dispatcher

SHORT = 0.2  # seconds until the engine counts as hanging
REASON = "nothing has come from the device"


@pytest.fixture
def hanging(tmp_path):
    """A server whose device stops answering after three steps."""
    write_tokenizer(tmp_path, template=None)
    with serving(tmp_path, watchdog_s=SHORT, shutdown_timeout=10 * PATIENCE) as served:
        served.engine.executor.hold()
        served.engine.executor.step(3)
        yield served
        served.engine.executor.release()
        wait_until(lambda: served.engine.shutdown(PATIENCE), "the engine's end")


def in_background(served, **body):
    """Sends a request on a socket of its own; returns what waits for the whole response."""
    connection, received = served.connect(), []
    given = {"model": MODEL, "prompt": "a", "max_tokens": 20} | body
    connection.sendall(post_bytes("/v1/completions", given, Connection="close"))

    def read():
        with connection:
            received.append(read_all(connection))

    thread = threading.Thread(target=read)
    thread.start()

    def finish():
        thread.join(PATIENCE)
        return received[0]

    return finish


def assert_error_ends(stream):
    *_, error, done = events(stream)
    error = json.loads(error)["error"]
    assert (error["code"], error["type"]) == ("engine_dead", "server_error")
    assert REASON in error["message"]
    assert done == "[DONE]"


def test_everybody_is_told_of_a_device_that_hangs_and_the_server_ends_by_itself(hanging):
    with hanging.http() as http:
        assert http.get("/health").status_code == 200
        stream, whole = in_background(hanging, stream=True), in_background(hanging)
        wait_until(lambda: http.get("/health").status_code != 200, "a health check that fails")
        health = http.get("/health")
        refused = http.post("/v1/completions", json={"model": MODEL, "prompt": "a"})
        metrics = http.get("/metrics").text
    for response, status in ((health, 503), (refused, 500)):
        assert response.status_code == status
        assert response.json()["error"]["code"] == "engine_dead"
        assert REASON in response.json()["error"]["message"]
        assert "--watchdog-s" in response.json()["error"]["message"]
    assert_error_ends(stream())
    assert whole().startswith(b"HTTP/1.1 500 ")
    assert "duetjax_engine_healthy 0.0" in metrics
    assert f'finished_reason="error",model_name="{MODEL}"}} 2.0' in metrics
    hanging.join()


def test_an_idle_server_outlives_its_watchdog(hanging):
    hanging.thread.join(3 * SHORT)
    with hanging.http() as http:
        assert http.get("/health").status_code == 200
        assert "duetjax_engine_healthy 1.0" in http.get("/metrics").text


def test_a_device_that_hangs_while_the_server_drains_does_not_hold_it_up(hanging):
    stream = in_background(hanging, stream=True)
    wait_until(lambda: hanging.engine.submitted, "submission")
    hanging.server.stop()
    assert_error_ends(stream())
    hanging.join()


def test_calls_end_even_if_the_engine_can_tell_them_nothing(hanging, monkeypatch):
    monkeypatch.setattr(Dispatcher, "_deliver", lambda *_: None)
    assert_error_ends(in_background(hanging, stream=True)())
