"""/debug/steps: what watchers are told of the scheduler, and what becomes of them."""

import asyncio
import json
from contextlib import ExitStack, contextmanager, suppress

import pytest
from fake_engine import PATIENCE, FakeEngine, wait_until
from serve_setup import MODEL, events, serving
from test_serve_errors import error_of

from duetjax.policy.completed_launch import CompletedLaunch
from duetjax.policy.durations import DurationTable
from duetjax.policy.launch import Lane, Program, Split
from duetjax.serve import debug
from duetjax.serve.debug import MAX_WATCHERS, Backlog, StepsEndpoint

PATH = "/debug/steps"
TABLE = DurationTable(
    {(None, Program.PREFILL, 96): 3.5} | {(None, Program.DECODE, 2**i): 1.25 for i in range(1, 6)}
)


class Watcher:
    """A client whose response has begun."""

    def __init__(self, response):
        self.response = response
        self.lines = response.iter_lines()

    def launches(self, count):
        """The next ones."""
        data = (line[6:] for line in self.lines if line.startswith("data: "))
        return [json.loads(next(data)) for _ in range(count)]

    def rest(self):
        """Data of all events until the stream ends."""
        return [line[6:] for line in self.lines if line.startswith("data: ")]


@contextmanager
def watching(served, **options):
    with served.http() as http, http.stream("GET", PATH, **options) as response:
        assert response.status_code == 200, response.read()
        yield Watcher(response)


def body(prompt="abc", max_tokens=3, **fields):
    return {"model": MODEL, "prompt": prompt, "max_tokens": max_tokens} | fields


def generate(served, *args):
    with served.http() as http:
        assert http.post("/v1/completions", json=body(*args)).status_code == 200


@contextmanager
def generating(served):
    """A stream that waits for its first token."""
    served.engine.executor.hold()
    with (
        served.http() as http,
        http.stream("POST", "/v1/completions", json=body(stream=True)) as response,
    ):
        wait_until(lambda: served.engine.executor.num_waiting, "a step")
        yield response


def tickets(launches):
    return [each["ticket"] for each in launches]


def nobody_watches(served):
    return lambda: not served.engine._watchers


@pytest.fixture
def fresh(folder):
    """A server of the test's own, whose launches count from 0."""
    with serving(folder) as served:
        yield served


# What is told.


def test_a_prompt_and_its_decode_steps_are_events_with_their_numbers(folder):
    with serving(folder, FakeEngine(durations=TABLE)) as served, watching(served) as watcher:
        assert watcher.response.headers["content-type"] == "text/event-stream; charset=utf-8"
        generate(served, "a" * 100, 2)
        first, second, decode = watcher.launches(3)
    took = {name: first.pop(name) for name in ("measured_ms", "began", "ended")}
    assert took["measured_ms"] == pytest.approx(1e3 * (took["ended"] - took["began"]))
    assert took["began"] < took["ended"] <= second["ended"] <= decode["ended"]
    assert first == {
        "ticket": 0,
        "lane": "whole",
        "split": None,
        "program": "prefill",
        "bucket": 96,
        "k": 1,
        "decode_rows": 0,
        "prompt_chunks": 1,
        "prompt_tokens": 96,
        "why": "aggregated",
        "predicted_ms": 3.5,
        "running": 1,
        "waiting": 0,
        "pages_free": 512 - 7,  # 100 tokens, 16 a page
    }
    assert (second["program"], second["prompt_tokens"]) == ("prefill", 4)
    assert (decode["program"], decode["bucket"], decode["decode_rows"]) == ("decode", 2, 1)
    assert (decode["prompt_chunks"], decode["prompt_tokens"]) == (0, 0)
    assert (decode["predicted_ms"], decode["running"]) == (1.25, 0)


def test_an_event_comes_while_its_generation_is_under_way(fresh):
    with watching(fresh) as watcher, generating(fresh):
        fresh.engine.executor.step(1)
        assert tickets(watcher.launches(1)) == [0]
        assert fresh.engine.stats().running == 1


def test_two_watchers_see_the_same_and_who_comes_later_sees_what_comes_later(fresh):
    with watching(fresh) as one, watching(fresh) as two:
        generate(fresh)
        seen = one.launches(3)
        assert two.launches(3) == seen
        with watching(fresh) as late:
            generate(fresh)
            assert one.launches(3) == two.launches(3) == late.launches(3)
    assert tickets(seen) == [0, 1, 2]


def test_silence_is_filled_with_comments(folder):
    with serving(folder, ping_seconds=0.01) as served, watching(served) as watcher:
        assert [next(watcher.lines) for _ in range(4)] == [": still watching", ""] * 2


def test_head_and_other_methods_are_answered_at_once(http):
    head = http.head(PATH)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert error_of(http.post(PATH), 405)["code"] == "method_not_allowed"


def test_the_key_is_needed_where_there_is_one(folder):
    with serving(folder, api_key="secret") as served, served.http() as http:
        assert error_of(http.get(PATH), 401)["code"] == "invalid_api_key"
        assert nobody_watches(served)()
        with watching(served, headers={"authorization": "Bearer secret"}):
            assert not nobody_watches(served)()


# Who watches, and for how long.


def test_a_watcher_that_leaves_is_told_no_more(fresh):
    with watching(fresh) as watcher:
        assert len(fresh.engine._watchers) == 1
        generate(fresh)
        watcher.launches(3)
    wait_until(nobody_watches(fresh), "the watcher is forgotten")
    generate(fresh)
    assert fresh.engine._scheduler.watcher is None


def test_a_watcher_that_leaves_in_silence_is_noticed(fresh):
    with watching(fresh):
        pass
    wait_until(nobody_watches(fresh), "the watcher is forgotten")


def test_only_so_many_may_watch_at_once(fresh):
    with ExitStack() as stack:
        for _ in range(MAX_WATCHERS - 1):
            stack.enter_context(watching(fresh))
        http = stack.enter_context(fresh.http())
        with watching(fresh):
            error = error_of(http.get(PATH), 429)
            assert error["code"] == "too_many_watchers"
            assert len(fresh.engine._watchers) == MAX_WATCHERS
        wait_until(lambda: len(fresh.engine._watchers) == MAX_WATCHERS - 1, "a place")
        with watching(fresh) as watcher:
            generate(fresh)
            assert tickets(watcher.launches(3)) == [0, 1, 2]


def test_a_drain_ends_watching_and_does_not_wait_for_it(folder):
    with serving(folder, shutdown_timeout=10 * PATIENCE) as served, watching(served) as watcher:
        told = []
        leave = served.engine.watch_launches(told.extend)
        generate(served)
        wait_until(lambda: len(told) == 3, "all launches, told to the one before as well")
        leave()
        served.server.stop()
        *launches, done = watcher.rest()
        assert tickets(map(json.loads, launches)) == [0, 1, 2]
        assert done == "[DONE]"
        served.join()
        assert nobody_watches(served)()


def test_a_drain_ends_watching_though_work_goes_on_and_lets_nobody_in(folder):
    with (
        serving(folder, shutdown_timeout=PATIENCE) as served,
        served.http() as http,
        watching(served) as watcher,
        generating(served) as stream,
    ):
        served.server.stop()
        assert watcher.rest() == ["[DONE]"]
        assert error_of(http.get(PATH), 503)["code"] == "shutting_down"
        served.engine.executor.release()
        assert events(stream.read())[-1] == "[DONE]"
        served.join()


def test_an_engine_that_dies_ends_watching_with_an_error_event(fresh):
    with watching(fresh) as watcher, generating(fresh):
        fresh.engine.executor.step(1)
        wait_until(lambda: fresh.engine.stats().steps == 1, "a step")
        fresh.engine.executor.break_down()
        launch, error, done = watcher.rest()
    assert json.loads(launch)["ticket"] == 0
    assert json.loads(error)["error"]["code"] == "engine_dead"
    assert done == "[DONE]"
    wait_until(nobody_watches(fresh), "the watcher is forgotten")


def test_a_dead_engine_is_not_watched(fresh):
    with fresh.http() as http:
        fresh.engine.executor.break_down()
        http.post("/v1/completions", json=body())
        assert error_of(http.get(PATH), 500)["code"] == "engine_dead"


# Backlogs.


def launch(ticket):
    return CompletedLaunch(
        ticket=ticket,
        lane=Lane.DECODE,
        split=Split(decode=40, prefill=92),
        program=Program.DECODE,
        bucket=8,
        k=4,
        decode_rows=5,
        prompt_chunks=0,
        prompt_tokens=0,
        why="split",
        predicted_ms=20.0,
        measured_ms=21.5,
        began=1.0,
        ended=1.0215,
        running=6,
        waiting=7,
        pages_free=8,
        ids=("a",) * 5,
        generated=20,
        step_ends=(1.005, 1.01, 1.015, 1.0215),
    )


def taken(backlog):
    return [json.loads(data) for data in events(backlog.take())]


def test_a_launch_on_a_split_is_told_with_its_sides():
    backlog = Backlog()
    backlog.put((launch(3),))
    [event] = taken(backlog)
    assert event["split"] == {"decode": 40, "prefill": 92}
    assert (event["lane"], event["k"], event["measured_ms"]) == ("decode", 4, 21.5)


def test_a_full_backlog_loses_its_oldest_rounds_and_says_so_once(monkeypatch):
    monkeypatch.setattr(debug, "MAX_BACKLOG", 3)
    backlog = Backlog()
    for first in (0, 2, 4):
        backlog.put((launch(first), launch(first + 1)))
    whole = taken(backlog)
    assert tickets(whole) == [*range(6)]
    assert not any("dropped" in event for event in whole)
    assert taken(backlog) == []
    for first in range(6, 16, 2):
        backlog.put((launch(first), launch(first + 1)))
    late = taken(backlog)
    assert tickets(late) == [*range(10, 16)]
    assert [event.get("dropped") for event in late] == [4] + [None] * 5
    assert late[0].keys() == whole[0].keys() | {"dropped"}
    backlog.put((launch(16),))
    assert [event.get("dropped") for event in taken(backlog)] == [None]


def test_a_watcher_that_does_not_read_loses_the_oldest_and_is_told(fresh, monkeypatch):
    monkeypatch.setattr(debug, "MAX_BACKLOG", 4)
    sent, endpoint = [], StepsEndpoint(fresh.context)

    async def watch():
        reads, stuck = asyncio.Event(), asyncio.Event()

        async def send(message):
            sent.extend(json.loads(data) for data in events(message.get("body", b"")))
            if message["type"] == "http.response.body":
                stuck.set()
                await reads.wait()

        scope = {"type": "http", "method": "GET", "path": PATH, "headers": []}
        watcher = asyncio.create_task(endpoint(scope, asyncio.Event().wait, send))
        while nobody_watches(fresh)():
            await asyncio.sleep(0)
        await asyncio.to_thread(generate, fresh)
        await stuck.wait()
        await asyncio.to_thread(generate, fresh, "abc", 20)
        await asyncio.to_thread(generate, fresh, "abc", 1)
        reads.set()
        while tickets(sent)[-1] < 23:
            await asyncio.sleep(0)
        watcher.cancel()
        with suppress(asyncio.CancelledError):
            await watcher

    asyncio.run(asyncio.wait_for(watch(), PATIENCE))
    [at] = [i for i, event in enumerate(sent) if "dropped" in event]
    assert 0 < at < 4
    assert len(sent) - at >= 4
    told = tickets(sent)
    assert told[:at] == [*range(at)]
    assert told[at:] == [*range(at + sent[at]["dropped"], 24)]
    assert nobody_watches(fresh)()
