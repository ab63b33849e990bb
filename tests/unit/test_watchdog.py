"""The engine's watchdog: its rule in made-up time, then with real threads and devices that hang."""

import math
import threading
import weakref

import pytest
from fake_executor import FakeExecutor
from test_engine import LIMITS, WAIT, Frontend, eventually, new_engine, request, running

from duetjax.engine import EngineDead
from duetjax.policy.launch import FinishedStep, Lane, Launch, Program, Split, StepResult
from duetjax.policy.request import FinishReason
from duetjax.watchdog import EngineStalled, Waits, Watch

SHORT = 0.2  # seconds until the engine counts as hanging
NO_RESULT = StepResult((), (), ())


def launch(ticket, lane=Lane.WHOLE, k=1, predicted_ms=None):
    split = None if lane is Lane.WHOLE else Split(1, 1)
    program = Program.PREFILL if lane is Lane.PREFILL else Program.DECODE
    return Launch(ticket, program, 2, (0,), lane, split, k, predicted_ms=predicted_ms)


def finished(ticket, step=0):
    return FinishedStep(ticket, step, NO_RESULT)


class Timeline:
    """A minute's watchdog that looks every second of made-up time."""

    def __init__(self, seconds=60):
        self.waits, self.watch, self.now = Waits(), Watch(seconds), 0.0

    def pass_time(self, seconds):
        """The first wait that is overdue meanwhile."""
        for _ in range(seconds):
            self.now += 1.0
            if wait := self.watch.overdue(self.waits.current.values(), self.now):
                return wait
        return None

    def begin(self, *args, **kwargs):
        self.waits.begun(launch(*args, **kwargs), self.now)

    def finish(self, *args):
        self.waits.finished(finished(*args), self.now)


# The rule.


def test_a_step_is_overdue_after_the_watchdog_s_seconds_and_not_before():
    time = Timeline()
    time.begin(0)
    assert time.pass_time(60) is None
    assert time.pass_time(1).what == "the device (lane whole)"


def test_every_step_of_a_launch_has_the_time_for_itself():
    time = Timeline()
    time.begin(0, k=3)
    for step in range(2):
        assert time.pass_time(50) is None
        time.finish(0, step)
    assert time.pass_time(60) is None
    assert time.pass_time(1) is not None


def test_the_second_launch_of_a_lane_is_waited_for_from_the_end_of_the_first():
    time = Timeline()
    time.begin(0)
    time.begin(1)
    assert time.pass_time(50) is None
    time.finish(0)
    assert time.pass_time(60) is None
    time.finish(1)
    assert time.pass_time(1000) is None


def test_a_lane_that_hangs_is_noticed_while_the_other_goes_on():
    time = Timeline()
    time.begin(0, Lane.PREFILL)
    for ticket in range(1, 12):
        time.begin(ticket, Lane.DECODE)
        wait = time.pass_time(10)
        time.finish(ticket)
        if wait is not None:
            break
    assert (wait.what, time.now) == ("the device (lane prefill)", 61)


def test_what_was_foretold_to_be_long_may_be_long():
    time = Timeline()
    time.begin(0, k=2, predicted_ms=10_000)
    assert time.pass_time(100) is None
    assert time.pass_time(1) is not None


@pytest.mark.parametrize("predicted_ms", [1e9, math.inf])
def test_a_prediction_gone_wild_does_not_switch_the_watchdog_off(predicted_ms):
    time = Timeline()
    time.begin(0, predicted_ms=predicted_ms)
    assert time.pass_time(601) is not None


def test_a_prediction_that_is_no_number_counts_as_none():
    time = Timeline()
    time.begin(0, predicted_ms=math.nan)
    assert time.pass_time(61) is not None


def test_a_process_that_was_stopped_does_not_blame_the_device():
    time = Timeline()
    time.begin(0)
    assert time.pass_time(50) is None
    time.now += 900
    assert time.pass_time(61) is None
    assert time.pass_time(1) is not None


def test_requests_without_a_launch_are_waited_for_from_the_first_round_that_left_them():
    time = Timeline()
    for _ in range(7):
        time.waits.round_began(time.now)
        time.waits.round_ended(time.now, has_requests=True)
        wait = time.pass_time(10)
    assert (wait.what, time.now) == ("a launch for the requests that wait", 61)


def test_an_idle_engine_is_never_overdue():
    time = Timeline()
    time.waits.round_began(time.now)
    time.begin(0)
    time.finish(0)
    time.waits.round_ended(time.now, has_requests=False)
    assert time.pass_time(10_000) is None
    assert time.waits.current == {}


# Threads that hang.


class HangingSubmit(FakeExecutor):
    """A device that never comes back from `submit`, until it is released."""

    def submit(self, launch):
        self._released.wait()
        return super().submit(launch)


def assert_stalled(client, frontend, *ids, names):
    assert frontend.wait_for_end(*ids) == [FinishReason.ERROR] * len(ids)
    assert isinstance(client.failure, EngineStalled)
    assert names in str(client.failure)
    assert "--watchdog-s" in str(client.failure)
    assert "\n" not in str(client.failure)
    assert not client.is_healthy
    with pytest.raises(EngineDead, match="EngineStalled"):
        client.submit(request("late"))
    assert not client.shutdown(WAIT), "its thread hangs"


def end(client, device):
    device.release()
    eventually(lambda: client.shutdown(WAIT))


@pytest.mark.parametrize(
    ("kind", "names"),
    [(FakeExecutor, "the device (lane whole)"), (HangingSubmit, "the engine's own thread")],
)
def test_a_device_that_never_answers_ends_every_request_with_an_error(kind, names, caplog):
    client, device = new_engine(kind(LIMITS.page_size))
    frontend = Frontend()
    device.hold()
    client.start(frontend.take)
    news = [request(str(i), max_tokens=20) for i in range(20)]  # more than have slots
    for new in news:
        client.submit(new)
    client.watch(SHORT)
    assert_stalled(client, frontend, *(new.id for new in news), names=names)
    assert "thread duetjax-engine:" in caplog.text
    assert "_released.wait()" in caplog.text, "where it hangs"

    end(client, device)  # what the step brings after all is dropped
    assert all(len(frontend.of(new.id)) == 1 for new in news)
    assert isinstance(client.failure, EngineStalled)


def test_a_device_that_stops_answering_in_the_middle_is_noticed():
    client, device = new_engine()
    frontend = Frontend()

    def take(batch):
        if len(frontend.batches) == 3:
            device.hold()
        frontend.take(batch)

    client.start(take)
    client.submit(request("a", max_tokens=50))
    assert device.held.wait(WAIT)
    client.watch(SHORT)
    assert_stalled(client, frontend, "a", names="the device")
    assert len(frontend.tokens("a")) >= 3
    end(client, device)


def test_a_scheduler_that_plans_nothing_for_its_requests_is_noticed(monkeypatch):
    client, device = new_engine()
    frontend = Frontend()
    monkeypatch.setattr(client._scheduler, "plan", lambda now: ())
    client.start(frontend.take)
    client.watch(SHORT)
    client.submit(request("a"))
    frontend.wait_for_end("a")
    assert "a launch for the requests that wait" in str(client.failure)
    end(client, device)


def test_outputs_that_are_never_taken_end_every_request_those_of_the_lost_batch_included():
    client, device = new_engine()
    frontend, gate = Frontend(), threading.Event()

    def take(batch):
        if threading.current_thread().name == "duetjax-engine" and batch.finished:
            gate.wait()
            return
        frontend.take(batch)

    client.start(take)
    client.watch(SHORT)
    client.submit(request("short", max_tokens=3))  # its end is in the batch that hangs
    client.submit(request("long", max_tokens=50))
    assert_stalled(client, frontend, "short", "long", names="the engine's own thread")
    gate.set()
    end(client, device)


def test_a_device_that_fails_after_it_hung_changes_nothing():
    client, device = new_engine(FakeExecutor(LIMITS.page_size, fail_at=0))
    frontend = Frontend()
    device.hold()
    client.start(frontend.take)
    client.watch(SHORT)
    client.submit(request("a"))
    frontend.wait_for_end("a")
    end(client, device)
    assert isinstance(client.failure, EngineStalled)
    assert len(frontend.of("a")) == 1


def test_a_shutdown_under_way_waits_no_longer_for_a_device_that_hangs():
    client, device = new_engine()
    frontend = Frontend()
    device.hold()
    client.start(frontend.take)
    client.submit(request("a"))
    assert device.held.wait(WAIT)
    ended = []
    stopping = threading.Thread(target=lambda: ended.append(client.shutdown(100 * WAIT)))
    stopping.start()
    client.watch(SHORT)
    stopping.join(WAIT)
    assert ended == [False]
    assert frontend.wait_for_end("a") == [FinishReason.ERROR]
    end(client, device)


def test_an_engine_that_is_watched_serves_as_ever_and_its_watchdog_ends_with_it():
    with running() as (client, _, frontend):
        client.watch(WAIT)
        [dog] = [weakref.ref(t) for t in threading.enumerate() if t.name == "duetjax-watchdog"]
        client.submit(request("a"))
        assert frontend.wait_for_end("a") == [FinishReason.LENGTH]
    assert client.failure is None
    eventually(lambda: dog() is None or not dog().is_alive())


def test_zero_seconds_watch_nothing():
    with running() as (client, _, _):
        client.watch(0)
        assert "duetjax-watchdog" not in [thread.name for thread in threading.enumerate()]
