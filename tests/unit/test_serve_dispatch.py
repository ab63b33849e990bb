"""From the engine's thread to the tasks that wait: one call per step, to the right queue."""

import asyncio
import threading

import pytest

from duetjax.policy.request import FinishReason, RequestOutput
from duetjax.serve.dispatch import Dispatcher
from duetjax.serve.errors import HttpError


def step(*ids):
    return tuple(RequestOutput(i, (n,)) for n, i in enumerate(ids))


def from_engine_thread(work):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


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


def test_outputs_go_to_the_queue_of_their_call_in_order():
    async def run():
        dispatcher = Dispatcher()
        dispatcher.bind(asyncio.get_running_loop())
        one, two = dispatcher.subscribe(["a", "b"]), dispatcher.subscribe(["c"])
        from_engine_thread(lambda: dispatcher.on_outputs(step("a", "c", "nobody", "b")))
        from_engine_thread(lambda: dispatcher.on_outputs(step("b")))
        first = [(await one.get()) for _ in range(3)]
        assert [(m.output.id, m.output.token_ids) for m in first] == [
            ("a", (0,)),
            ("b", (3,)),
            ("b", (0,)),
        ]
        assert first[0].at == first[1].at <= first[2].at
        assert (await two.get()).output.id == "c"
        assert one.empty()
        assert two.empty()

    asyncio.run(run())


def test_outputs_after_the_end_of_a_subscription_are_dropped():
    async def run():
        dispatcher = Dispatcher()
        dispatcher.bind(asyncio.get_running_loop())
        queue = dispatcher.subscribe(["a"])
        dispatcher.unsubscribe(["a"])
        dispatcher.on_outputs((RequestOutput("a", (), FinishReason.ABORT),))
        await asyncio.sleep(0)
        assert queue.empty()

    asyncio.run(run())


def test_giving_up_reaches_every_call_once_and_every_later_one():
    async def run():
        dispatcher, failure = Dispatcher(), HttpError(503, "shutting_down", "bye")
        queue = dispatcher.subscribe(["a", "b"])
        dispatcher.give_up(failure)
        assert queue.get_nowait() is failure
        assert queue.empty()
        with pytest.raises(HttpError, match="bye"):
            dispatcher.subscribe(["c"])

    asyncio.run(run())


def test_an_engine_that_outlives_the_loop_is_not_disturbed():
    dispatcher = Dispatcher()
    loop = asyncio.new_event_loop()
    dispatcher.bind(loop)
    loop.close()
    dispatcher.on_outputs(step("a"))
