"""A client that leaves takes its work along, whatever phase the work is in."""

import asyncio
import random

import openai
import pytest
from fake_engine import FakeEngine, continuation, wait_until
from serve_setup import MODEL, post_bytes, serving

ROUTES = {
    "/v1/completions": {"prompt": "a"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
}


def request(route="/v1/completions", **body):
    return post_bytes(route, {"model": MODEL, "max_tokens": 100} | ROUTES[route] | body)


def gone(engine, num_submitted):
    """Waits until every submitted request was aborted, while the engine itself stands still."""
    wait_until(lambda: len(engine.submitted) == num_submitted, "submission")
    return lambda: wait_until(lambda: set(engine.submitted) <= set(engine.aborted), "an abort")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", ROUTES)
def test_a_client_that_leaves_in_decode_ends_its_request(folder, route, stream):
    with serving(folder) as served:
        executor = served.engine.executor
        executor.hold()
        with served.connect() as connection:
            connection.sendall(request(route, stream=stream))
            executor.step(5)
            wait_until(lambda: served.engine.stats().generation_tokens >= 4, "decoding")
            is_gone = gone(served.engine, 1)
        is_gone()
        executor.release()
        served.engine.wait_idle()
        assert served.engine.stats().generation_tokens < 100


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_in_prefill_ends_its_request(folder, stream):
    with serving(folder, FakeEngine(num_slots=2)) as served:
        executor = served.engine.executor
        executor.hold()
        with served.connect() as connection:
            connection.sendall(request(prompt="a" * 150, stream=stream))
            executor.step(1)  # of three: 66 tokens at a time
            wait_until(lambda: served.engine.stats().steps >= 1, "prefill")
            is_gone = gone(served.engine, 1)
        is_gone()
        executor.release()
        served.engine.wait_idle()
        assert served.engine.stats().generation_tokens == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_the_queue_is_never_computed(folder, stream):
    with serving(folder, FakeEngine(num_slots=1)) as served, served.http() as http:
        engine = served.engine
        engine.executor.hold()
        with served.connect() as first, served.connect() as second:
            first.sendall(request(max_tokens=3, stream=True))
            wait_until(lambda: len(engine.submitted) == 1, "the first request")
            second.sendall(request(prompt="b", n=2, stream=stream))
            wait_until(lambda: len(engine.submitted) == 3, "the second request")
            second.close()
            wait_until(lambda: set(engine.submitted[1:]) == set(engine.aborted), "its aborts")
            engine.executor.release()
            received = b""
            while b"[DONE]" not in received:
                received += first.recv(65536)
        engine.wait_idle()
        assert engine.stats().prompt_tokens == 1
        assert http.get("/health").status_code == 200


def test_a_client_that_leaves_ends_all_its_choices_but_those_that_have_finished(folder):
    with serving(folder, FakeEngine(num_slots=8)) as served:
        engine = served.engine
        engine.executor.hold()
        with served.connect() as connection:
            connection.sendall(request(prompt=["y", "a"], n=2))
            engine.executor.step(4)  # "y" has ended after two tokens
            wait_until(lambda: engine.stats().steps >= 4, "four steps")
            wait_until(lambda: served.context.metrics.finished["stop"].value == 2, "ends")
        wait_until(lambda: len(engine.aborted) >= 2, "aborts")
        assert set(engine.aborted) == set(engine.submitted[2:])
        engine.executor.release()
        engine.wait_idle()


class Plan:
    """One client of many: what it asks for, and whether it leaves before the end."""

    def __init__(self, dice):
        self.prompt = chr(dice.randrange(ord("a"), ord("z"))) * dice.randrange(1, 100)
        self.num_tokens = dice.randrange(1, 90)
        self.seed = dice.randrange(5)
        self.leaves = dice.random() < 0.5
        self.patience = dice.randrange(self.num_tokens)


def test_of_64_streams_those_whose_clients_stay_get_their_text_and_all_pages_return(folder):
    dice = random.Random(7)
    plans = [Plan(dice) for _ in range(64)]

    async def one(client, plan):
        stream = await client.completions.create(
            model=MODEL, prompt=plan.prompt, max_tokens=plan.num_tokens, temperature=1,
            seed=plan.seed, stream=True,
        )  # fmt: skip
        text = ""
        async for chunk in stream:
            text += chunk.choices[0].text
            if plan.leaves and len(text) > plan.patience:
                await stream.close()
                break
        whole = continuation(plan.prompt, plan.num_tokens, 1.0, plan.seed)
        assert text == (whole[: len(text)] if plan.leaves else whole)

    def start_when_all_are_there():
        wait_until(lambda: len(engine.submitted) == len(plans), "all requests")
        engine.executor.release()

    async def all_of_them(url):
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
            await asyncio.gather(
                asyncio.to_thread(start_when_all_are_there), *(one(client, plan) for plan in plans)
            )

    engine = FakeEngine(num_slots=16, num_pages=40)  # too few for 16 long rows: some are preempted
    engine.executor.hold()
    with serving(folder, engine) as served, served.http() as http:
        asyncio.run(all_of_them(served.url))
        engine.wait_idle()
        wait_until(lambda: not served.context.dispatcher.num_waiting, "no mailbox left")
        assert engine.stats().preemptions > 0
        body = {"model": MODEL, "prompt": "a", "max_tokens": 3}
        assert http.post("/v1/completions", json=body).json()["choices"][0]["text"] == "bcd"
