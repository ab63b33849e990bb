"""/livez, /readyz and /health: who should restart the server, send it work, or wait for it."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from fake_engine import FakeEngine, wait_until
from serve_setup import MODEL, serving
from test_serve_errors import error_of

from duetjax.serve.limits import Limits
from duetjax.serve.queue_bound import QueueBound

PROBES = ("/livez", "/readyz", "/health")
BODY = {"model": MODEL, "prompt": "a", "max_tokens": 3}


@pytest.mark.parametrize("path", PROBES)
def test_an_idle_server_is_well(http, path):
    answer = http.get(path)
    assert (answer.status_code, answer.json()["status"]) == (200, "ok")
    assert http.head(path).status_code == 200
    assert http.head(path).content == b""


def test_a_live_server_says_how_long_its_engine_has_been_waiting(folder):
    with serving(folder) as served, served.http() as http, ThreadPoolExecutor(1) as pool:
        assert http.get("/livez").json()["silence_s"] == 0
        served.engine.executor.hold()
        answer = pool.submit(http.post, "/v1/completions", json=BODY)
        wait_until(lambda: http.get("/livez").json()["silence_s"] > 0, "silence")
        served.engine.executor.release()
        assert answer.result(60).status_code == 200


@pytest.mark.parametrize("path", PROBES)
def test_a_dead_engine_is_told_to_all(folder, path):
    with serving(folder) as served, served.http() as http:
        served.engine.executor.break_down()
        http.post("/v1/completions", json=BODY)
        wait_until(lambda: served.engine.failure is not None, "a dead engine")
        assert error_of(http.get(path), 503)["code"] == "engine_dead"


def test_a_server_that_drains_lives_and_takes_no_more_work(folder):
    with serving(folder, shutdown_timeout=60.0) as served, served.http() as http:
        served.engine.executor.hold()
        with ThreadPoolExecutor(1) as pool, served.http() as other:
            old = pool.submit(other.post, "/v1/completions", json=BODY)
            wait_until(lambda: served.engine.submitted, "submission")
            served.server.stop()
            wait_until(lambda: http.get("/health").status_code == 503, "the drain")
            for path in ("/readyz", "/health"):
                answer = http.get(path)
                assert error_of(answer, 503)["code"] == "shutting_down"
                assert int(answer.headers["retry-after"]) >= 1
            assert http.get("/livez").status_code == 200
            served.engine.executor.release()
            assert old.result(60).status_code == 200


def test_a_full_queue_sends_work_elsewhere_and_stays_healthy(folder):
    with serving(folder, FakeEngine(num_slots=2), limits=Limits(max_num_queued_reqs=10)) as served:
        served.engine.executor.hold()
        with served.http() as http, ThreadPoolExecutor(11) as pool, served.http() as other:
            sent = [pool.submit(other.post, "/v1/completions", json=BODY) for _ in range(10)]
            wait_until(lambda: len(served.engine.submitted) == 10, "ten submissions")
            assert http.get("/readyz").status_code == 200
            sent.append(pool.submit(other.post, "/v1/completions", json=BODY))
            wait_until(lambda: len(served.engine.submitted) == 11, "one more")
            answer = http.get("/readyz")
            assert error_of(answer, 503)["code"] == "queue_full"
            assert "11 generations run or wait; ready again at 7" in answer.text
            assert 1 <= int(answer.headers["retry-after"]) <= 60
            assert http.get("/health").status_code == http.get("/livez").status_code == 200
            served.engine.executor.release()
            assert {each.result(60).status_code for each in sent} == {200}
            assert http.get("/readyz").status_code == 200


# High and low water.


class Engine(SimpleNamespace):
    """A client of which only numbers are known."""

    num_slots = 2
    num_live = 0


def looks(bound, engine, live):
    """Whether it is full, as the number of live requests changes."""
    seen = []
    for engine.num_live in live:
        seen.append(bound.why_full() is not None)
    return seen


def test_it_is_full_from_high_water_until_low_water():
    engine = Engine()
    bound = QueueBound(engine, Limits(max_num_queued_reqs=10))
    live = [0, 10, 11, 12, 8, 10, 8, 7, 8, 10, 11, 7]
    assert looks(bound, engine, live) == [n in (2, 3, 4, 5, 6, 10) for n in range(len(live))]


def test_without_a_queue_it_is_full_while_all_slots_are_taken():
    engine = Engine()
    assert looks(QueueBound(engine, Limits(max_num_queued_reqs=0)), engine, [1, 2, 1, 2, 0]) == [
        False,
        True,
    ] * 2 + [False]


def test_without_a_bound_it_is_never_full():
    engine = Engine()
    assert looks(QueueBound(engine, Limits(max_num_queued_reqs=None)), engine, [0, 10**6]) == [
        False,
        False,
    ]


def test_a_peak_between_two_looks_counts():
    engine = Engine()
    bound = QueueBound(engine, Limits(max_num_queued_reqs=10))
    engine.num_live = 11
    bound.check(1)
    assert looks(bound, engine, [9, 7]) == [True, False]
