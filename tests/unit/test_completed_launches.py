"""What is told of launches as they complete: by the scheduler, and by the engine that runs it."""

import random
import threading
from collections import Counter
from dataclasses import replace

import pytest
from foresight_run import AS_FORESEEN, SLO_MS, Truth, arrivals, foresight, policy
from foresight_run import Run as ForeseenRun
from scheduler_run import Run, limits, request
from test_engine import eventually, running
from test_engine import request as engine_request

from duetjax.policy.completed_launch import CompletedLaunch
from duetjax.policy.durations import DurationTable
from duetjax.policy.flights import Pace
from duetjax.policy.launch import Lane, Program, Split
from duetjax.policy.policies import PrefillFirst, StaticSplit

SPLIT = Split(decode=40, prefill=92)


def watched(run):
    """All that a run's scheduler tells from now on."""
    told = []
    run.scheduler.watcher = told.append
    return told


def at(run, now):
    """Moves a run's clock."""
    run.now = now
    return run


# The scheduler.


def test_a_prefill_and_the_decodes_after_it_are_told_with_their_numbers():
    run = Run(limits()).add(request("a", 6, max_tokens=3))
    told = watched(run)
    for now in (1.0, 2.5, 2.75):
        run.plan()
        at(run, now).finish_launch()
    prefill = CompletedLaunch(
        ticket=0,
        lane=Lane.WHOLE,
        split=None,
        program=Program.PREFILL,
        bucket=8,
        k=1,
        decode_rows=0,
        prompt_chunks=1,
        prompt_tokens=6,
        why="aggregated",
        predicted_ms=None,
        measured_ms=1000.0,
        began=0.0,
        ended=1.0,
        running=1,
        waiting=0,
        pages_free=14,
        ids=("a",),
        generated=1,
        step_ends=(1.0,),
    )
    decode = replace(
        prefill,
        ticket=1,
        program=Program.DECODE,
        bucket=2,
        decode_rows=1,
        prompt_chunks=0,
        prompt_tokens=0,
        measured_ms=1500.0,
        began=1.0,
        ended=2.5,
        step_ends=(2.5,),
    )
    last = replace(decode, ticket=2, measured_ms=250.0, began=2.5, ended=2.75, running=0)
    last = replace(last, step_ends=(2.75,))
    assert told[:2] == [prefill, decode]
    assert told[2:] == [replace(last, pages_free=run.stats.pages_free)]
    run.check_end()


def test_a_mixed_launch_is_told_with_both_its_kinds_of_rows():
    run = Run(limits(max_num_batched_tokens=8)).add(request("a", 1, 9), request("b", 1, 9))
    run.turn()
    told = watched(run.add(request("c", 2), request("d", 9), request("e", 3)))
    run.turn()
    [mixed] = told
    assert (mixed.program, mixed.decode_rows) == (Program.PREFILL, 2)
    assert (mixed.prompt_chunks, mixed.prompt_tokens) == (2, 6)
    assert (mixed.running, mixed.waiting) == (4, 1)
    assert (mixed.ids, mixed.generated) == (("a", "b", "c", "d"), 3)


def test_a_launch_planned_ahead_is_measured_from_when_its_lane_was_free():
    run = Run(limits(launches_per_lane=2)).add(request("a", 6, max_tokens=3))
    told = watched(run)
    assert [launch.ticket for launch in at(run, 1.0).plan()] == [0, 1]
    at(run, 1.25).finish_launch()
    at(run, 1.5).finish_launch()
    run.plan()
    at(run, 3.0).finish_launch()
    assert [(each.began, each.measured_ms) for each in told] == [
        (1.0, 250.0),
        (1.25, 250.0),
        (1.5, 1500.0),
    ]


def test_both_lanes_of_a_split_are_told_with_all_steps_of_a_launch_at_once():
    table = DurationTable(
        {(None, Program.PREFILL, 8): 3.0, (None, Program.DECODE, 2): 2.0}
        | {(SPLIT, Program.PREFILL, 64): 90.0, (SPLIT, Program.DECODE, 2): 5.0}
    )
    bounds = limits(
        num_pages=65, max_model_len=128, max_num_batched_tokens=64, prefill_buckets=(8, 64)
    )
    run = Run(bounds, StaticSplit(64, SPLIT, 4), Pace(table, max_prefill_launch_ms=100.0))
    run.add(request("a", 5, 60)).turn()
    run.add(request("long", 60, 3))
    told = watched(run)
    at(run, 2.0).plan()
    for now in (2.25, 2.5, 2.75):
        at(run, now).finish_step(Lane.DECODE)
        assert told == []
    at(run, 3.0).finish_step(Lane.DECODE)
    at(run, 3.5).finish_launch(Lane.PREFILL)
    decode, prefill = told
    assert (decode.lane, decode.split, decode.program) == (Lane.DECODE, SPLIT, Program.DECODE)
    assert (decode.k, decode.decode_rows, decode.prompt_chunks) == (4, 1, 0)
    assert (decode.predicted_ms, decode.measured_ms) == (20.0, 1000.0)
    assert (decode.ids, decode.generated) == (("a",), 4)
    assert decode.step_ends == (2.25, 2.5, 2.75, 3.0)
    assert (prefill.lane, prefill.split, prefill.program) == (Lane.PREFILL, SPLIT, Program.PREFILL)
    assert (prefill.k, prefill.decode_rows, prefill.prompt_tokens) == (1, 0, 60)
    assert (prefill.predicted_ms, prefill.measured_ms) == (90.0, 1500.0)
    assert (prefill.ids, prefill.generated, prefill.step_ends) == (("long",), 1, (3.5,))
    assert {each.why for each in told} == {"split"}


def test_all_launches_of_a_duet_are_told_once_as_planned_foretold_and_measured():
    foresees = foresight()
    pace = Pace(foresees, tbt_slo_ms=SLO_MS)
    run = ForeseenRun(policy("duet", foresees), Truth(AS_FORESEEN), pace)
    told = watched(run)
    run.run(arrivals(15))
    assert [each.ended for each in told] == sorted(each.ended for each in told)
    by_ticket = sorted(told, key=lambda each: each.ticket)
    assert [each.ticket for each in by_ticket] == [launch.ticket for launch in run.launches]
    for each, launch, took_ms in zip(by_ticket, run.launches, run.took_ms, strict=True):
        planned = (launch.lane, launch.split, launch.program, launch.bucket, launch.k)
        assert (each.lane, each.split, each.program, each.bucket, each.k) == planned
        assert each.decode_rows + each.prompt_chunks == len(launch.slots)
        assert each.prompt_tokens == len(launch.tokens)
        assert each.predicted_ms == launch.predicted_ms
        assert each.measured_ms == pytest.approx(took_ms)
        assert each.measured_ms == 1e3 * (each.ended - each.began)
    assert {each.lane for each in told} == set(Lane)
    assert Counter(str(each.why) for each in told) == run.decisions


@pytest.mark.parametrize("seed", range(8))
def test_the_rest_is_what_the_statistics_say_at_its_end(seed):
    draw = random.Random(seed)
    kind = draw.choice([None, PrefillFirst(8), StaticSplit(8, SPLIT, 3)])
    run = Run(limits(num_pages=draw.randint(9, 17), launches_per_lane=2), kind)
    for number in range(12):
        run.add(request(f"r{number}", draw.randint(1, 12), draw.randint(1, 12)))
    told, seen = watched(run), 0
    while run.scheduler.has_work or run.lanes_in_flight():
        run.plan()
        if draw.random() < 0.05:
            run.abort(f"r{draw.randrange(12)}")
        run.now += 1.0
        run.finish_step(draw.choice(run.lanes_in_flight()))
        if len(told) > seen:
            [last], stats = told[seen:], run.stats
            seen += 1
            now = (stats.running, stats.waiting, stats.pages_free)
            assert (last.running, last.waiting, last.pages_free, last.ended) == (*now, run.now)
    run.check_end()
    assert [each.ticket for each in sorted(told, key=lambda each: each.ticket)] == [*range(seen)]
    assert seen == len(run.launches)
    assert Counter(each.why for each in told) == dict(run.stats.decisions)
    assert sum(each.generated for each in told) == run.stats.generation_tokens


def test_of_a_launch_under_way_only_steps_since_somebody_looked_are_told():
    run = Run(limits(), StaticSplit(8, SPLIT, 3)).add(request("a", 2, 20))
    run.turn()
    run.add(request("long", 8, 3))
    run.plan()
    at(run, 1.0).finish_step(Lane.DECODE)
    told = watched(run)
    at(run, 2.0).finish_step(Lane.DECODE)
    at(run, 3.0).finish_step(Lane.DECODE)
    [decode] = told
    assert (decode.k, decode.generated, decode.step_ends) == (3, 2, (2.0, 3.0))


def test_while_nobody_looks_nothing_is_made(monkeypatch):
    monkeypatch.setattr("duetjax.policy.scheduler.completed", lambda *_: 1 / 0)
    Run(limits()).add(request("a")).finish()
    run = Run(limits()).add(request("a"))
    watched(run)
    with pytest.raises(ZeroDivisionError):
        run.finish()


# The engine.


def generate(client, frontend, request_id, max_tokens=4):
    client.submit(engine_request(request_id, max_tokens=max_tokens))
    frontend.wait_for_end(request_id)


def tickets(told):
    return [each.ticket for each in told]


def test_all_watchers_are_told_the_same_on_the_engine_s_thread_until_they_leave():
    with running() as (client, _, frontend):
        one, two, threads = [], [], set()

        def keep(launches):
            threads.add(threading.current_thread().name)
            two.extend(launches)

        leave = client.watch_launches(one.extend)
        client.watch_launches(keep)
        generate(client, frontend, "a")
        eventually(lambda: len(two) == 4)
        leave()
        leave()
        generate(client, frontend, "b")
        eventually(lambda: len(two) == 8)
        assert tickets(one) == [0, 1, 2, 3]
        assert one == two[:4]
        assert tickets(two) == [*range(8)]
        assert threads == {"duetjax-engine"}


def test_a_watcher_that_watches_twice_leaves_twice():
    with running() as (client, _, frontend):
        told = []
        leave = client.watch_launches(told.extend)
        client.watch_launches(told.extend)
        leave()
        generate(client, frontend, "a")
        eventually(lambda: len(told) == 4)
        assert tickets(told) == [0, 1, 2, 3]


def test_outputs_are_handed_on_before_anybody_is_told_of_their_launch():
    with running() as (client, _, frontend):
        known = []
        client.watch_launches(
            lambda launches: known.append((launches[-1].ticket, len(frontend.tokens("a"))))
        )
        generate(client, frontend, "a", max_tokens=6)
        eventually(lambda: known and known[-1][0] == 5)
        assert all(tokens > ticket for ticket, tokens in known)


def test_a_watcher_that_raises_is_told_no_more_and_nobody_else_is_harmed(caplog):
    with running() as (client, _, frontend):
        calls, told = [], []

        def take(launches):
            calls.append(launches)
            raise ValueError("a bug of the watcher's")

        client.watch_launches(take)
        client.watch_launches(told.extend)
        generate(client, frontend, "a")
        generate(client, frontend, "b")
        eventually(lambda: len(told) == 8)
        assert len(calls) == 1
        assert client.is_healthy
        assert "a watcher of launches raised" in caplog.text
        assert "a bug of the watcher's" in caplog.text


def test_once_all_have_left_the_scheduler_is_watched_no_more():
    with running() as (client, _, frontend):
        leave = client.watch_launches(lambda launches: None)
        generate(client, frontend, "a")
        assert client._scheduler.watcher is not None
        leave()
        generate(client, frontend, "b")
        assert client._scheduler.watcher is None


def test_launches_that_end_after_a_shutdown_began_are_told():
    with running() as (client, device, _):
        told = []
        client.watch_launches(told.extend)
        device.hold()
        client.submit(engine_request("a", max_tokens=50))
        assert device.held.wait(60)
        stopping = threading.Thread(target=client.shutdown, args=(60,))
        stopping.start()
        eventually(lambda: not client.is_healthy)
        device.release()
        stopping.join(60)
        assert tickets(told) == [0, 1]
