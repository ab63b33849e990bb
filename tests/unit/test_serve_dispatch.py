"""From the engine's thread to the tasks that wait: one call per step, to the right queue."""

import asyncio
import threading
import time

import pytest

from duetjax.policy.request import FinishReason, RequestOutput
from duetjax.serve.dispatch import Dispatcher, Mailbox
from duetjax.serve.errors import HttpError

MAIL = RequestOutput("a", (1,)), 0.0
SHORT = 0.02  # seconds


def step(*ids):
    return tuple(RequestOutput(i, (n,)) for n, i in enumerate(ids))


def from_engine_thread(work):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def soon(seconds=60.0):
    return time.perf_counter() + seconds


class CountingLoop:
    """Stands for a loop that is asked to run something."""

    def __init__(self):
        self.calls = []

    def call_soon_threadsafe(self, *call):
        self.calls.append(call)


def test_a_step_is_one_call_into_the_loop_however_many_requests_it_has():
    loop, dispatcher = CountingLoop(), Dispatcher()
    dispatcher.bind(loop)
    dispatcher.on_outputs(step(*map(str, range(500))))
    assert len(loop.calls) == 1


def test_outputs_go_to_the_mailbox_of_their_call_in_order():
    async def run():
        dispatcher = Dispatcher()
        dispatcher.bind(asyncio.get_running_loop())
        one, two = dispatcher.subscribe(["a", "b"]), dispatcher.subscribe(["c"])
        from_engine_thread(lambda: dispatcher.on_outputs(step("a", "c", "nobody", "b")))
        from_engine_thread(lambda: dispatcher.on_outputs(step("b")))
        while len(one.mail) < 3:
            await one.wait(soon())
        (first, at), (second, also_at), (third, later) = (one.mail.popleft() for _ in range(3))
        assert [(m.id, m.token_ids) for m in (first, second, third)] == [
            ("a", (0,)),
            ("b", (3,)),
            ("b", (0,)),
        ]
        assert at == also_at <= later
        assert two.mail.popleft()[0].id == "c"
        assert not one.mail
        assert not two.mail

    asyncio.run(run())


def test_outputs_after_the_end_of_a_subscription_are_dropped():
    async def run():
        dispatcher = Dispatcher()
        dispatcher.bind(asyncio.get_running_loop())
        mailbox = dispatcher.subscribe(["a"])
        dispatcher.unsubscribe(["a"])
        dispatcher.on_outputs((RequestOutput("a", (), FinishReason.ABORT),))
        await asyncio.sleep(0)
        assert not mailbox.mail

    asyncio.run(run())


def test_giving_up_reaches_every_call_once_and_every_later_one():
    async def run():
        dispatcher, failure = Dispatcher(), HttpError(503, "shutting_down", "bye")
        mailbox = dispatcher.subscribe(["a", "b"])
        dispatcher.give_up(failure)
        assert mailbox.mail.popleft() is failure
        assert not mailbox.mail
        with pytest.raises(HttpError, match="bye"):
            dispatcher.subscribe(["c"])

    asyncio.run(run())


def test_an_engine_that_outlives_the_loop_is_not_disturbed():
    dispatcher = Dispatcher()
    loop = asyncio.new_event_loop()
    dispatcher.bind(loop)
    loop.close()
    dispatcher.on_outputs(step("a"))


# Waiting.


def test_a_wait_ends_when_something_comes_or_at_its_time():
    async def run():
        mailbox = Mailbox()
        asyncio.get_running_loop().call_soon(mailbox.put, MAIL)
        await mailbox.wait(soon())
        assert mailbox.mail.popleft() is MAIL
        until = soon(SHORT)
        await mailbox.wait(until)
        assert time.perf_counter() >= until
        assert not mailbox.mail

    asyncio.run(run())


def test_waits_that_something_ends_share_one_timer(monkeypatch):
    async def run():
        mailbox, loop = Mailbox(), asyncio.get_running_loop()
        timers = []
        call_later = loop.call_later
        monkeypatch.setattr(
            loop, "call_later", lambda *a: timers.append(call_later(*a)) or timers[-1]
        )
        for _ in range(100):
            loop.call_soon(mailbox.put, MAIL)
            await mailbox.wait(soon())
        assert len(timers) == 1
        mailbox.close()
        assert timers[0].cancelled()

    asyncio.run(run())


def test_a_timer_that_rings_before_the_wait_s_end_is_set_again():
    async def run():
        mailbox = Mailbox()
        asyncio.get_running_loop().call_soon(mailbox.put, MAIL)
        await mailbox.wait(soon(SHORT))
        until = soon(2 * SHORT)
        await mailbox.wait(until)
        assert time.perf_counter() >= until

    asyncio.run(run())


def test_a_timer_that_rings_while_nobody_waits_leaves_the_next_wait_its_own():
    async def run():
        mailbox = Mailbox()
        asyncio.get_running_loop().call_soon(mailbox.put, MAIL)
        await mailbox.wait(soon(SHORT))
        await asyncio.sleep(2 * SHORT)
        until = soon(SHORT)
        await mailbox.wait(until)
        assert time.perf_counter() >= until

    asyncio.run(run())


def test_mail_for_a_wait_that_was_cancelled_stays():
    async def run():
        mailbox = Mailbox()
        waiting = asyncio.create_task(mailbox.wait(soon()))
        await asyncio.sleep(0)
        waiting.cancel()
        mailbox.put(MAIL)
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert mailbox.mail.popleft() is MAIL

    asyncio.run(run())
