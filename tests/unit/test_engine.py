"""The engine thread behind `EngineClient`, with real threads and a fake device.

Waits have a generous bound so that a hang fails; nothing depends on how long anything takes.
"""

import random
import threading
import time
import weakref
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from fake_executor import VOCAB_SIZE, DeviceFault, FakeExecutor, expected

from duetjax.config import InvalidRequest, SamplingParams
from duetjax.engine import EngineClient, EngineDead
from duetjax.policy.limits import SchedulerLimits
from duetjax.policy.request import FinishReason, NewRequest, StepOutputs
from duetjax.policy.scheduler import Scheduler
from duetjax.runtime.in_order import InOrder

WAIT = 120.0  # seconds until a hang is called one

LIMITS = SchedulerLimits(
    num_pages=33,
    page_size=4,
    num_slots=8,
    max_model_len=64,
    max_num_batched_tokens=24,
    decode_buckets=(2, 4, 8),
    prefill_buckets=(8, 24),
)


def request(request_id, prompt_len=6, max_tokens=4, *, prompt=None, seed=0):
    drawn = random.Random(request_id).choices(range(VOCAB_SIZE), k=prompt_len)
    params = SamplingParams(temperature=0, seed=seed)
    return NewRequest(request_id, tuple(drawn) if prompt is None else prompt, max_tokens, params)


class Frontend:
    """Keeps every output and lets a test wait for last ones."""

    def __init__(self):
        self.batches = []
        self._outputs = defaultdict(list)
        self._news = threading.Condition()

    def take(self, batch):
        with self._news:
            self.batches.append(batch)
            for output in batch:
                self._outputs[output.id].append(output)
            self._news.notify_all()

    def of(self, request_id):
        return list(self._outputs[request_id])

    def tokens(self, request_id):
        return tuple(token for output in self.of(request_id) for token in output.token_ids)

    def ends(self, request_id):
        return [o.finish for o in self.of(request_id) if o.finish is not None]

    def wait_until(self, condition):
        with self._news:
            assert self._news.wait_for(condition, WAIT), "the engine hangs"

    def wait_for_end(self, *request_ids):
        self.wait_until(lambda: all(self.ends(i) for i in request_ids))
        last = [self.of(i)[-1].finish for i in request_ids]
        assert all(last), "an output came after the last one"
        assert all(len(self.ends(i)) == 1 for i in request_ids), "two last outputs"
        return last


class Clock:
    """Stands still until told to move."""

    now = 100.0

    def __call__(self):
        return self.now


def new_engine(device=None, **options):
    device = device or FakeExecutor(LIMITS.page_size)
    scheduler, executor = Scheduler(LIMITS), InOrder(device)
    return EngineClient(scheduler, executor, vocab_size=VOCAB_SIZE, **options), device


@contextmanager
def running(device=None, **options):
    client, device = new_engine(device, **options)
    frontend = Frontend()
    client.start(frontend.take)
    try:
        yield client, device, frontend
    finally:
        device.release()
        assert client.shutdown(WAIT)


def assert_all_returned(client):
    stats = client.stats()
    assert (stats.running, stats.waiting, stats.pages_held) == (0, 0, 0)
    assert stats.pages_quarantined == 0


def eventually(condition):
    """Waits for what no output announces."""
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline, "the engine hangs"
        time.sleep(0.001)


def in_threads(work, items, num_threads=8):
    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(work, items))


# Serving.


def test_a_request_gets_its_tokens_in_order_and_one_end():
    with running() as (client, _, frontend):
        new = request("a", prompt_len=30, max_tokens=9)
        client.submit(new)
        assert frontend.wait_for_end("a") == [FinishReason.LENGTH]
        assert frontend.tokens("a") == expected(new.prompt, 9)


def test_all_outputs_of_a_step_come_in_one_batch():
    with running() as (client, executor, frontend):
        executor.hold()
        client.submit(request("a", max_tokens=9))
        assert executor.held.wait(WAIT)
        client.submit(request("b", max_tokens=9))
        executor.release()
        frontend.wait_for_end("a", "b")
        ids = [batch.ids for batch in frontend.batches]
        assert ids == 2 * [("a",)] + 7 * [("a", "b")] + 2 * [("b",)]  # two launches were in flight


def test_two_hundred_requests_from_several_threads_all_get_their_own_tokens():
    draw = random.Random(1)
    news = [request(str(i), draw.randint(1, 50), draw.randint(1, 14), seed=i) for i in range(200)]
    with running() as (client, _, frontend):
        in_threads(client.submit, news)
        frontend.wait_for_end(*(new.id for new in news))
        for new in news:
            assert frontend.tokens(new.id) == expected(
                new.prompt, new.max_tokens, seed=new.sampling.seed
            )
        assert client.stats().preemptions > 0
        assert_all_returned(client)


def test_stats_are_as_new_as_the_outputs_they_come_with():
    client, _ = new_engine()
    frontend, seen = Frontend(), []

    def take(batch):
        frontend.take(batch)
        stats, told = client.stats(), len(frontend.tokens("a"))
        seen.append(told)
        assert stats.generation_tokens >= told
        assert stats.pages_held == (0 if stats.generation_tokens == 3 else 2)

    client.start(take)
    client.submit(request("a", max_tokens=3))
    frontend.wait_for_end("a")
    assert seen == [1, 2, 3]
    assert client.failure is None
    assert client.shutdown(WAIT)


def test_an_id_is_free_again_when_its_last_output_arrives():
    client, _ = new_engine()
    frontend = Frontend()

    def take(batch):
        if batch.finished and not frontend.ends("a"):
            client.submit(request("a", max_tokens=2))
        frontend.take(batch)

    client.start(take)
    client.submit(request("a", max_tokens=1))
    frontend.wait_until(lambda: len(frontend.ends("a")) == 2)
    assert client.shutdown(WAIT)


# What submit refuses, in the caller's thread.


@pytest.mark.parametrize("token", [-1, VOCAB_SIZE, 2**31, 1.5, True, "5", None])
def test_a_token_id_outside_the_vocabulary_is_refused(token):
    with running() as (client, executor, _):
        with pytest.raises(InvalidRequest, match=f"prompt token 2 is {token!r}") as refused:
            client.submit(request("a", prompt=(1, 2, token)))
        assert refused.value.param == "prompt"
        assert executor.launches == []


def test_the_largest_and_the_smallest_token_id_are_served():
    with running() as (client, _, frontend):
        client.submit(request("a", prompt=(0, VOCAB_SIZE - 1)))
        frontend.wait_for_end("a")
        assert frontend.tokens("a") == expected((0, VOCAB_SIZE - 1), 4)


def test_a_prompt_that_is_too_long_is_refused_at_once():
    with running() as (client, _, _), pytest.raises(InvalidRequest) as refused:
        client.submit(request("a", prompt_len=64))
    assert refused.value.code == "context_length_exceeded"


def test_an_id_that_is_live_is_refused_and_its_owner_is_not_disturbed():
    with running() as (client, executor, frontend):
        executor.hold()
        client.submit(request("a"))
        with pytest.raises(InvalidRequest, match="'a' is already in use"):
            client.submit(request("a", prompt_len=3))
        executor.release()
        frontend.wait_for_end("a")
        assert frontend.tokens("a") == expected(request("a").prompt, 4)


# Aborts.


def test_a_request_aborted_before_its_first_step_ends_without_a_token():
    with running() as (client, executor, frontend):
        executor.hold()
        client.submit(request("a"))
        assert executor.held.wait(WAIT)
        client.submit(request("b"))
        client.abort("b")
        executor.release()
        assert frontend.wait_for_end("a", "b") == [FinishReason.LENGTH, FinishReason.ABORT]
        assert frontend.tokens("b") == ()


def test_an_abort_from_within_on_outputs_takes_effect():
    client, device = new_engine()
    frontend = Frontend()

    def take(batch):
        frontend.take(batch)
        if len(frontend.tokens("a")) == 2:
            client.abort("a")

    client.start(take)
    client.submit(request("a", max_tokens=50))
    assert frontend.wait_for_end("a") == [FinishReason.ABORT]
    assert client.shutdown(WAIT)
    assert len(device.launches) < 20
    assert_all_returned(client)


def test_an_abort_does_not_wait_for_the_launch_in_flight():
    with running() as (client, executor, frontend):
        executor.hold()
        client.submit(request("a", max_tokens=1))
        assert executor.held.wait(WAIT)
        client.abort("a")
        assert frontend.wait_for_end("a") == [FinishReason.ABORT]
        assert client.stats().pages_quarantined == 2
        executor.release()
        eventually(lambda: client.stats().pages_quarantined == 0)
        assert frontend.tokens("a") == ()


def test_an_abort_that_comes_after_the_last_token_says_nothing():
    with running() as (client, _, frontend):
        client.submit(request("a", max_tokens=1))
        assert frontend.wait_for_end("a") == [FinishReason.LENGTH]
        client.abort("a")
        client.submit(request("b"))
        frontend.wait_for_end("b")
        assert frontend.ends("a") == [FinishReason.LENGTH]


def test_aborts_of_unknown_and_finished_requests_say_nothing():
    with running() as (client, _, frontend):
        client.abort("never")
        client.submit(request("a"))
        frontend.wait_for_end("a")
        client.abort("a")
        client.submit(request("b"))
        frontend.wait_for_end("b")
        assert {o.finish for batch in frontend.batches for o in batch} == {
            None,
            FinishReason.LENGTH,
        }


def test_an_abort_storm_ends_each_request_once_and_leaks_nothing():
    draw = random.Random(2)
    news = [request(str(i), draw.randint(1, 50), 14) for i in range(200)]
    aborts = [str(draw.randrange(200)) for _ in range(2000)]
    with running() as (client, _, frontend):

        def submit_and_abort(i):
            client.submit(news[i])
            for request_id in aborts[10 * i : 10 * i + 10]:
                client.abort(request_id)

        in_threads(submit_and_abort, range(200))
        ends = frontend.wait_for_end(*(new.id for new in news))
        assert FinishReason.ABORT in ends
        assert set(ends) <= {FinishReason.ABORT, FinishReason.LENGTH}
        for new in news:
            tokens = frontend.tokens(new.id)
            assert tokens == expected(new.prompt, len(tokens))
        client.submit(request("control"))
        frontend.wait_for_end("control")
        assert frontend.tokens("control") == expected(request("control").prompt, 4)
        assert_all_returned(client)


# A device that fails.


class RefusingExecutor(FakeExecutor):
    """Fails when a launch is submitted instead of when its result is fetched."""

    def submit(self, launch):
        if len(self.launches) == self._fail_at:
            raise DeviceFault("refused")
        return super().submit(launch)


@pytest.mark.parametrize("kind", [FakeExecutor, RefusingExecutor])
def test_a_failing_device_ends_every_request_with_an_error(kind, caplog):
    with running(kind(LIMITS.page_size, fail_at=3)) as (client, executor, frontend):
        executor.hold()
        news = [request(str(i), max_tokens=20) for i in range(30)]  # more than have slots
        for new in news:
            client.submit(new)
        executor.release()
        assert set(frontend.wait_for_end(*(new.id for new in news))) == {FinishReason.ERROR}
        assert isinstance(client.failure, DeviceFault)
        assert not client.is_healthy
        assert "the engine failed" in caplog.text


def test_a_dead_engine_takes_no_more_requests_and_says_why():
    with running(FakeExecutor(LIMITS.page_size, fail_at=0)) as (client, _, frontend):
        client.submit(request("a"))
        frontend.wait_for_end("a")
        with pytest.raises(EngineDead, match=r"DeviceFault\('launch 0'\)"):
            client.submit(request("b"))
        client.abort("a")
        assert frontend.of("b") == []


def test_a_request_submitted_during_the_fatal_step_gets_its_error():
    with running(FakeExecutor(LIMITS.page_size, fail_at=0)) as (client, executor, frontend):
        executor.hold()
        client.submit(request("a"))
        assert executor.held.wait(WAIT)
        client.submit(request("b"))
        executor.release()
        assert frontend.wait_for_end("a", "b") == [FinishReason.ERROR, FinishReason.ERROR]


def test_outputs_that_nobody_could_take_end_the_engine_and_every_request():
    client, _ = new_engine()
    frontend = Frontend()

    def take(batch):
        if len(frontend.batches) == 2:
            frontend.batches.append(StepOutputs())
            raise ValueError("a bug of the frontend")
        frontend.take(batch)

    client.start(take)
    client.submit(request("short", max_tokens=3))  # its end is in the batch that is lost
    client.submit(request("long", max_tokens=20))
    assert frontend.wait_for_end("long", "short") == [FinishReason.ERROR, FinishReason.ERROR]
    assert isinstance(client.failure, ValueError)
    assert client.shutdown(WAIT)


def test_an_engine_whose_outputs_nobody_ever_takes_still_ends():
    client, _ = new_engine()
    called = threading.Event()

    def take(batch):
        called.set()
        raise ValueError("a bug of the frontend")

    client.start(take)
    client.submit(request("a"))
    assert called.wait(WAIT)
    assert client.shutdown(WAIT)
    assert isinstance(client.failure, ValueError)


# Health and shutdown.


def test_an_engine_that_was_never_asked_waits_for_nothing():
    clock = Clock()
    with running(clock=clock) as (client, _, _):
        clock.now = 900.0
        eventually(lambda: client.silence == 0.0)


def test_an_idle_engine_is_healthy_and_waits_for_nothing():
    clock = Clock()
    with running(clock=clock) as (client, _, frontend):
        client.submit(request("a"))
        frontend.wait_for_end("a")
        clock.now = 900.0
        eventually(lambda: client.silence == 0.0)
        assert client.is_healthy
    assert not client.is_healthy


def test_a_step_that_hangs_shows_as_silence():
    clock = Clock()
    with running(clock=clock) as (client, executor, _):
        executor.hold()
        client.submit(request("a"))
        assert executor.held.wait(WAIT)
        clock.now = 900.0
        assert client.silence == 800.0
        assert client.is_healthy


def test_shutdown_aborts_what_is_running_and_waiting_and_frees_its_pages():
    client, executor = new_engine()
    frontend = Frontend()
    client.start(frontend.take)
    executor.hold()
    news = [request(str(i), max_tokens=50) for i in range(30)]
    for new in news:
        client.submit(new)
    assert executor.held.wait(WAIT)
    stopping = threading.Thread(target=client.shutdown, args=(WAIT,))
    stopping.start()
    eventually(lambda: not client.is_healthy)
    executor.release()
    stopping.join(WAIT)
    assert set(frontend.wait_for_end(*(new.id for new in news))) == {FinishReason.ABORT}
    assert client.failure is None
    assert_all_returned(client)


def test_after_shutdown_requests_are_refused_and_aborts_ignored():
    with running() as (client, _, _):
        pass
    with pytest.raises(EngineDead, match="shut down"):
        client.submit(request("a"))
    client.abort("a")
    assert client.shutdown(WAIT)


def test_an_engine_that_never_started_shuts_down():
    client, _ = new_engine()
    assert client.shutdown(WAIT)
    with pytest.raises(EngineDead):
        client.submit(request("a"))


@pytest.mark.parametrize("fail_at", [None, 0])
def test_shutdown_does_not_wait_longer_for_a_device_that_hangs(fail_at):
    client, executor = new_engine(FakeExecutor(LIMITS.page_size, fail_at=fail_at))
    frontend = Frontend()
    client.start(frontend.take)
    executor.hold()
    client.submit(request("a"))
    client.submit(request("b"))
    assert executor.held.wait(WAIT)
    assert not client.shutdown(0.01)
    assert frontend.wait_for_end("a", "b") == [FinishReason.ERROR, FinishReason.ERROR]

    executor.release()  # what the step brings after all, tokens or a fault, is dropped
    assert client.shutdown(WAIT)
    assert len(frontend.of("a")) == len(frontend.of("b")) == 1
    assert isinstance(client.failure, TimeoutError)


def test_an_engine_starts_once():
    with running() as (client, _, frontend), pytest.raises(AssertionError, match="running"):
        client.start(frontend.take)


def test_an_engine_that_has_ended_holds_its_executor_no_longer():
    executor = FakeExecutor(LIMITS.page_size)
    gone = weakref.ref(executor)
    client, frontend = new_engine(executor)[0], Frontend()
    client.start(frontend.take)
    client.submit(request("a"))
    frontend.wait_for_end("a")
    client.shutdown(WAIT)
    del executor
    assert gone() is None


def test_a_failure_is_kept_without_the_frames_that_hold_the_device():
    with running(FakeExecutor(LIMITS.page_size, fail_at=1)) as (client, _, frontend):
        client.submit(request("a"))
        frontend.wait_for_end("a")
        assert client.failure.__traceback__ is None


# What others go by.


def test_live_requests_are_counted_from_submission_to_their_last_output():
    with running() as (client, device, frontend):
        assert (client.num_live, client.num_slots) == (0, LIMITS.num_slots)
        device.hold()
        for name in "abc":
            client.submit(request(name, prompt_len=4, max_tokens=2))
        assert client.num_live == 3
        client.abort("b")
        frontend.wait_for_end("b")
        assert client.num_live == 2
        device.release()
        frontend.wait_for_end("a", "c")
        assert client.num_live == 0


def test_a_refused_request_is_not_live():
    with running() as (client, _, _):
        with pytest.raises(InvalidRequest):
            client.submit(request("a", prompt_len=0, max_tokens=2))
        assert client.num_live == 0


@pytest.mark.parametrize("fails", [False, True])
def test_who_waits_for_the_end_is_told_once_on_the_engine_s_thread(fails):
    told = []
    device = FakeExecutor(LIMITS.page_size, fail_at=0 if fails else None)
    on_close = lambda: told.append(threading.current_thread().name)  # noqa: E731
    with running(device, on_close=on_close) as (client, _, frontend):
        client.submit(request("a", prompt_len=4, max_tokens=2))
        frontend.wait_for_end("a")
        if fails:
            eventually(lambda: told)
        else:
            assert told == []
    assert client.shutdown(WAIT)
    assert told == ["duetjax-engine"]
