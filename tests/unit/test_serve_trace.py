"""/debug/trace and `--trace`: that they open, that they agree with /metrics, who may have them."""

import asyncio
import threading
from collections import Counter

import pytest
from fake_engine import PATIENCE, FakeEngine, wait_until
from perfetto_format import faults, read
from prometheus_client.parser import text_string_to_metric_families
from serve_setup import MODEL, serving
from test_serve_debug import TABLE, body, generate, generating, nobody_watches
from test_serve_debug import launch as completed_launch
from test_serve_errors import error_of

from duetjax.config import ConfigError
from duetjax.serve import tracing
from duetjax.serve.tracing import MAX_TRACES, Collector, TraceEndpoint, TraceFile

PATH = "/debug/trace"


class Tracing:
    """A trace on its way, and what came."""

    def __init__(self, served, query="?seconds=60", **options):
        self._served = served
        self._request = PATH + query, options
        self.response = None
        self._thread = threading.Thread(target=self._get)

    def __enter__(self):
        self._thread.start()
        wait_until(lambda: self._served.engine._watchers, "the window")
        return self

    def __exit__(self, *_):
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()

    def _get(self):
        path, options = self._request
        with self._served.http() as http:
            self.response = http.get(path, **options)

    @property
    def document(self):
        """Checked."""
        assert self.response.status_code == 200, self.response.text
        return checked(self.response.text)


def checked(text):
    document = read(text)
    assert faults(document) == []
    return document


def slices(document, category):
    found = (event for event in document["traceEvents"] if event["ph"] == "X")
    return [event for event in found if event["cat"] == category]


def metrics_of(served):
    """Values by name and the label that is not the model."""
    with served.http() as http:
        families = list(text_string_to_metric_families(http.get("/metrics").text))
    return {
        (sample.name, *[v for k, v in sorted(sample.labels.items()) if k != "model_name"]): (
            sample.value
        )
        for family in families
        for sample in family.samples
    }


def all_told(served, watched):
    """Launches come to watchers after their outputs."""
    return lambda: sum(count for _, count in served.engine.stats().decisions) == len(watched)


@pytest.fixture
def fresh(folder):
    """A server of the test's own, whose calls may end while it stops."""
    with serving(folder, FakeEngine(durations=TABLE), shutdown_timeout=PATIENCE) as served:
        yield served


# What it says.


def test_a_trace_of_everything_agrees_with_the_metrics(fresh):
    watched = []
    with Tracing(fresh) as trace:
        fresh.engine.watch_launches(watched.extend)
        with fresh.http() as http:
            for size in (1, 60, 130):
                asked = body("a" * size, 7, n=3, temperature=0.5)
                assert http.post("/v1/completions", json=asked).status_code == 200
            assert http.post("/v1/completions", json=body("xyz", 9)).status_code == 200
            assert http.post("/v1/completions", json=body("ab", 9, stop="f")).status_code == 200
        with generating(fresh):
            pass
        wait_until(lambda: not fresh.engine.num_live, "the end of whom the client has left")
        fresh.engine.executor.release()
        fresh.engine.wait_idle()
        wait_until(all_told(fresh, watched), "all launches, told to the one before as well")
        metrics = metrics_of(fresh)
        fresh.server.stop()
    launches, requests = (slices(trace.document, each) for each in ("launch", "request"))
    told = [event["args"] for event in launches]
    assert [each["ticket"] for each in told] == [*range(len(watched))]
    decided = {k[1]: v for k, v in metrics.items() if k[0] == "duetjax_decisions_total"}
    assert Counter(each["outcome"] for each in told) == decided
    generated = metrics["vllm:generation_tokens_total",]
    assert sum(each["generated"] for each in told) == generated
    finished = Counter(event["args"]["finish"] for event in requests)
    success = {k[1]: v for k, v in metrics.items() if k[0] == "vllm:request_success_total" and v}
    assert finished == success == {"length": 9, "stop": 2, "abort": 1}
    computed = sum(each["args"]["prompt_tokens"] for each in requests if each["args"]["ttft_ms"])
    assert computed == metrics["vllm:prompt_tokens_total",]


def test_launches_of_a_request_are_where_its_flow_leads(fresh):
    with Tracing(fresh) as trace:
        watched = []
        fresh.engine.watch_launches(watched.extend)
        generate(fresh, "a" * 100, 3)
        wait_until(all_told(fresh, watched), "all launches")
        fresh.server.stop()
    document = trace.document
    launches = slices(document, "launch")
    assert [(each["name"], each["args"]["predicted_ms"]) for each in launches] == [
        ("prefill", 3.5),
        ("prefill", 3.5),
        ("decode", 1.25),
        ("decode", 1.25),
    ]
    led = [event["ts"] for event in document["traceEvents"] if event["ph"] in "tf"]
    assert led == [each["ts"] for each in launches]
    [request], [queue, prefill, decode] = slices(document, "request"), slices(document, "phase")
    assert [queue["name"], prefill["name"], decode["name"]] == ["queue", "prefill", "decode"]
    assert prefill["ts"] == launches[0]["ts"]
    last = launches[-1]
    assert request["ts"] + request["dur"] >= last["ts"] + last["dur"] - 1e-3
    assert (request["args"]["prompt_tokens"], request["args"]["generated"]) == (100, 3)
    told = document["otherData"]
    assert (told["model"], told["launches"], told["requests"]) == (MODEL, 4, 1)


def test_what_runs_at_both_ends_of_a_window_is_cut_and_told_as_unfinished(fresh):
    with generating(fresh):
        fresh.engine.executor.step(1)
        wait_until(lambda: fresh.engine.stats().steps == 1, "a step")
        with fresh.http() as http:
            document = checked(http.get(PATH, params={"seconds": 0.01}).text)
        fresh.engine.executor.release()
    [request] = slices(document, "request")
    assert (request["ts"], request["args"]["finish"]) == (0.0, None)
    assert request["dur"] == pytest.approx(1e6 * document["otherData"]["seconds"], rel=0.9)


def test_it_is_a_file_to_keep(fresh):
    with fresh.http() as http:
        response = http.get(PATH, params={"seconds": 0.01})
        head = http.head(PATH)
    for each in (response, head):
        assert each.headers["content-type"] == "application/json"
        name = each.headers["content-disposition"]
        assert name.startswith('attachment; filename="duetjax-trace-')
    assert checked(response.text)["otherData"]["seconds"] < PATIENCE
    assert head.content == b""


# Who has it, and for how long.


@pytest.mark.parametrize("seconds", ["0", "-1", "60.1", "nan", "inf", "five", ""])
def test_a_window_has_bounds(http, served, seconds):
    error = error_of(http.get(PATH, params={"seconds": seconds}), 400)
    assert (error["code"], error["param"]) == ("invalid_value", "seconds")
    assert nobody_watches(served)()


def test_a_misspelt_parameter_is_told(http):
    error = error_of(http.get(PATH, params={"second": "9"}), 400)
    assert error["message"] == "'second' means nothing here; seconds does"
    assert (error["code"], error["param"]) == ("invalid_value", "second")


def test_the_key_is_needed_where_there_is_one(folder):
    with serving(folder, api_key="secret") as served, served.http() as http:
        assert error_of(http.get(PATH), 401)["code"] == "invalid_api_key"
        assert nobody_watches(served)()


def test_only_so_many_are_made_at_once(fresh):
    with Tracing(fresh), Tracing(fresh), fresh.http() as http:
        wait_until(lambda: len(fresh.engine._watchers) == MAX_TRACES, "both windows")
        assert error_of(http.get(PATH), 429)["code"] == "too_many_watchers"
        fresh.server.stop()
    assert nobody_watches(fresh)()


def test_a_client_that_leaves_ends_the_window(fresh):
    with fresh.connect() as connection:
        connection.sendall(f"GET {PATH}?seconds=60 HTTP/1.1\r\nHost: test\r\n\r\n".encode())
        wait_until(lambda: not nobody_watches(fresh)(), "the window")
    wait_until(nobody_watches(fresh), "its end")
    generate(fresh)
    assert fresh.engine._scheduler.watcher is None
    assert not fresh.context.lives._watchers


def test_a_drain_ends_the_window_and_lets_nobody_in(fresh):
    with Tracing(fresh) as trace, fresh.http() as http, generating(fresh) as stream:
        fresh.server.stop()
        wait_until(nobody_watches(fresh), "the end of the window")
        assert error_of(http.get(PATH), 503)["code"] == "shutting_down"
        fresh.engine.executor.release()
        stream.read()
    [request] = slices(trace.document, "request")
    assert request["args"]["finish"] is None


def test_an_engine_that_dies_leaves_its_trace(fresh):
    with Tracing(fresh) as trace, fresh.http() as http:
        fresh.engine.executor.break_down()
        http.post("/v1/completions", json=body())
    [request] = slices(trace.document, "request")
    assert request["args"]["finish"] == "error"


def test_nothing_is_kept_while_nobody_asks(fresh, monkeypatch):
    monkeypatch.setattr("duetjax.serve.generation.RequestLife", lambda **_: 1 / 0)
    monkeypatch.setattr("duetjax.policy.scheduler.completed", lambda *_: 1 / 0)
    generate(fresh)
    assert fresh.context.lives._tellers == {}
    assert fresh.engine.is_healthy


# Bounds.


def test_beyond_its_bounds_a_window_counts_what_it_leaves_out(fresh, monkeypatch):
    for name, most in (("MAX_LAUNCHES", 4), ("MAX_ROWS", 12), ("MAX_LIVES", 2)):
        monkeypatch.setattr(tracing, name, most)
    with Tracing(fresh) as trace:
        for _ in range(3):
            generate(fresh, "abc", 1)
        fresh.engine.wait_idle()
        for watcher in fresh.engine._watchers.values():
            watcher(tuple(completed_launch(100 + n) for n in range(5)))
        fresh.server.stop()
    told = trace.document["otherData"]
    assert (told["launches"], told["requests"]) == (4, 2)
    assert (told["dropped_launches"], told["dropped_rows"], told["dropped_requests"]) == (4, 0, 1)


def test_rows_beyond_the_bound_are_counted_and_their_launches_stay(fresh, monkeypatch):
    monkeypatch.setattr(tracing, "MAX_ROWS", 12)
    collector = Collector(fresh.context)
    collector._put(tuple(completed_launch(n) for n in range(4)))
    window = collector.close()
    assert [len(each.ids) for each in window.launches] == [5, 5, 0, 0]
    assert window.dropped == {"launches": 0, "rows": 10, "requests": 0}


def test_a_client_that_does_not_read_is_sent_no_more_than_a_piece(fresh, monkeypatch):
    """The engine goes on meanwhile, and is told nothing of it."""
    monkeypatch.setattr(tracing, "_LOOK_SECONDS", 0.0)
    monkeypatch.setattr("duetjax.trace_events._EVENTS_A_PIECE", 3)
    sent, endpoint = [], TraceEndpoint(fresh.context)

    async def trace():
        reads, stuck = asyncio.Event(), asyncio.Event()

        async def send(message):
            sent.append(message.get("body", b""))
            if message["type"] == "http.response.body":
                stuck.set()
                await reads.wait()

        query = b"seconds=0.01"
        scope = {"type": "http", "method": "GET", "path": PATH, "headers": []}
        answer = endpoint(scope | {"query_string": query}, asyncio.Event().wait, send)
        reader = asyncio.create_task(answer)
        await stuck.wait()
        assert nobody_watches(fresh)()
        await asyncio.to_thread(generate, fresh)
        pieces = len(sent)
        reads.set()
        await reader
        return pieces

    assert asyncio.run(asyncio.wait_for(trace(), PATIENCE)) == 2  # with the start of the response
    assert len(sent) > 6
    checked(b"".join(sent).decode())


# Files.


def test_a_server_writes_the_trace_of_its_life(folder, tmp_path):
    trace = TraceFile(tmp_path / "trace.json")
    with serving(folder, shutdown_timeout=PATIENCE, trace=trace) as served:
        generate(served, "abc", 5)
        served.engine.wait_idle()
        generated = served.engine.stats().generation_tokens
        served.server.stop()
        served.join()
    document = checked(trace.path.read_text())
    assert sum(each["args"]["generated"] for each in slices(document, "launch")) == generated == 5
    assert [each["args"]["finish"] for each in slices(document, "request")] == ["length"]


def test_a_file_is_written_as_soon_as_its_time_is_over(folder, tmp_path):
    trace = TraceFile(tmp_path / "trace.json", seconds=0.01)
    with serving(folder, trace=trace) as served:
        wait_until(trace.path.exists, "the file")
        checked(trace.path.read_text())
        assert nobody_watches(served)()


def test_a_disk_that_takes_no_file_stops_no_server(folder, tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tracing, "write_whole", full)
    with serving(folder, trace=TraceFile(tmp_path / "trace.json", seconds=0.01)) as served:
        wait_until(lambda: "the trace is lost" in caplog.text, "the log")
        generate(served)
    assert "No space left on device" in caplog.text


@pytest.mark.parametrize(
    ("path", "seconds", "fault"),
    [
        ("absent/trace.json", 60, "a folder that exists"),
        ("", 60, "a folder that exists"),
        ("trace.json", 0, "--trace-seconds 0"),
        ("trace.json", 3601, "--trace-seconds 3601"),
        ("trace.json", float("nan"), "--trace-seconds nan"),
    ],
)
def test_a_file_that_could_not_be_written_is_refused_before_the_start(
    tmp_path, path, seconds, fault
):
    with pytest.raises(ConfigError, match=fault):
        TraceFile(tmp_path / path, seconds)
