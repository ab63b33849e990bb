"""Server-sent events: their shape, their end, and what happens while nothing comes."""

import asyncio
import json
import threading

import openai
import pytest
from fake_engine import FakeEngine, continuation, wait_until
from serve_setup import MODEL, events, post_bytes, read_all, serving

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(autouse=True)
def engine_is_idle_afterwards(served):
    yield
    served.engine.wait_idle()


def stream_chat(http, **body):
    """The events of a streamed chat, parsed, [DONE] checked and left out."""
    given = {"model": MODEL, "messages": HELLO, "max_tokens": 3, "stream": True} | body
    return parse(http.post("/v1/chat/completions", json=given))


def stream_completion(http, **body):
    given = {"model": MODEL, "prompt": "abc", "max_tokens": 3, "stream": True} | body
    return parse(http.post("/v1/completions", json=given))


def parse(response):
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *chunks, done = events(response.content)
    assert done == "[DONE]"
    return [json.loads(chunk) for chunk in chunks]


def test_a_chat_stream_has_role_then_text_then_finish_reason(http):
    chunks = stream_chat(http)
    [head] = {(c.pop("id"), c.pop("object"), c.pop("created"), c.pop("model")) for c in chunks}
    assert head[0].startswith("chatcmpl-")
    assert (head[1], head[3]) == ("chat.completion.chunk", MODEL)

    def choice(delta, finish=None):
        return {
            "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]
        }

    assert chunks == [
        choice({"role": "assistant", "content": ""}),
        choice({"content": "a"}),
        choice({"content": "b"}),
        choice({"content": "c"}),
        choice({}, "length"),
    ]


def test_a_completion_stream_has_a_chunk_per_token_and_ends_with_its_finish_reason(http):
    chunks = stream_completion(http)
    assert {c["object"] for c in chunks} == {"text_completion"}
    assert [c["choices"] for c in chunks] == [
        [{"index": 0, "text": text, "logprobs": None, "finish_reason": finish}]
        for text, finish in (("d", None), ("e", None), ("f", "length"))
    ]


@pytest.mark.parametrize("stream", [stream_chat, stream_completion])
def test_usage_comes_in_a_last_chunk_without_choices_if_asked_for(http, stream):
    *chunks, last = stream(http, stream_options={"include_usage": True})
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 3
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    assert all(c["choices"] and c["usage"] is None for c in chunks)


@pytest.mark.parametrize("stream", [stream_chat, stream_completion])
def test_usage_is_not_mentioned_if_not_asked_for(http, stream):
    assert not any("usage" in c for c in stream(http, stream_options={"include_usage": False}))


def test_stream_options_without_a_stream_are_refused(http):
    body = {"model": MODEL, "prompt": "a", "stream_options": {"include_usage": True}}
    response = http.post("/v1/completions", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "stream_options"


def test_text_that_a_stop_string_may_take_back_is_never_sent(http):
    chunks = stream_completion(http, stop=["gh", "efz"], max_tokens=9)
    assert [c["choices"][0]["text"] for c in chunks] == ["d", "ef", ""]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_each_choice_of_a_stream_begins_and_ends_on_its_own(http):
    chunks = stream_chat(http, n=3, seed=0, temperature=1.0, max_tokens=5)
    for index in range(3):
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert [c["finish_reason"] for c in own] == [None] * (len(own) - 1) + ["length"]
        text = "".join(c["delta"].get("content", "") for c in own)
        assert text == continuation(">", 5, 1.0, index)


def test_echo_is_streamed_before_the_text(http):
    chunks = stream_completion(http, echo=True, prompt=["ab", "x"], max_tokens=1)
    assert sorted(c["choices"][0]["text"] for c in chunks) == ["abc", "xy"]


@pytest.mark.parametrize("stop", [None, "ef"])
def test_token_ids_in_a_stream_are_all_there_once(http, stop):
    body = {"return_token_ids": True, "stop": stop, "max_tokens": 4}
    chunks = stream_completion(http, **body)
    ids = [t for c in chunks for t in c["choices"][0]["token_ids"]]
    assert bytes(ids) == (b"defg" if stop is None else b"def")
    prompts = [c["choices"][0].get("prompt_token_ids") for c in chunks]
    assert prompts == [[97, 98, 99]] + [None] * (len(chunks) - 1)
    chunks = stream_chat(http, messages=[{"role": "user", "content": "c"}], **body)
    ids = [t for c in chunks for t in c["choices"][0]["token_ids"]]
    assert bytes(ids) == b"abcd"
    prompts = [c.get("prompt_token_ids") for c in chunks]
    assert prompts == [list(b"[user]c>")] + [None] * (len(chunks) - 1)


def test_the_official_client_reads_a_stream(client):
    stream = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=8, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == "abcdefgh"
    assert chunks[-1].usage.total_tokens == len("[user]hello>") + 8


def test_the_official_asynchronous_client_reads_a_stream(served):
    async def read():
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
            stream = await client.completions.create(model=MODEL, prompt="a", stream=True)
            return "".join([chunk.choices[0].text async for chunk in stream])

    assert asyncio.run(read()) == continuation("a", 16)


def test_a_silent_stream_is_kept_alive_by_comments(folder):
    with serving(folder, ping_seconds=0.02) as served, served.connect() as connection:
        served.engine.executor.hold()
        connection.sendall(
            post_bytes(
                "/v1/chat/completions",
                {"model": MODEL, "messages": HELLO, "max_tokens": 2, "stream": True},
                Connection="close",
            )
        )
        received = b""
        while received.count(b": ") < 12:  # headers have a few of their own
            received += connection.recv(65536)
        served.engine.executor.release()
        received += read_all(connection)
        assert b": still working\n\n" in received
        assert b'"content":"b"' in received
        assert b"data: [DONE]" in received


def test_a_whole_response_waits_through_silence(folder):
    with serving(folder, ping_seconds=0.01) as served, served.http() as http:
        served.engine.executor.hold()
        timer = threading.Timer(0.2, served.engine.executor.release)
        timer.start()
        body = {"model": MODEL, "prompt": "a", "max_tokens": 2}
        assert http.post("/v1/completions", json=body).json()["choices"][0]["text"] == "bc"
        timer.join()


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_a_stream_that_the_engine_gives_up_ends_with_an_error_event(folder, num_tokens):
    with serving(folder) as served:
        executor = served.engine.executor
        executor.hold()
        executor.step(num_tokens)
        with openai.OpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0) as client:
            stream = client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
            if num_tokens:
                next(stream)
            wait_until(lambda: executor.num_waiting > 0, "the next step")
            executor.break_down()
            with pytest.raises(openai.APIError) as caught:
                list(stream)
            assert caught.value.code == "engine_dead"


def test_an_error_event_has_the_four_keys_and_is_followed_by_the_end(folder):
    with serving(folder) as served, served.http() as http:
        served.engine.executor.break_down()
        body = {"model": MODEL, "prompt": "a", "stream": True}
        error, done = events(http.post("/v1/completions", json=body).content)
        assert done == "[DONE]"
        assert json.loads(error)["error"].keys() == {"message", "type", "param", "code"}


def test_an_unexpected_fault_in_a_stream_is_logged_and_becomes_an_error_event(
    folder, monkeypatch, caplog
):
    with serving(folder) as served, served.http() as http:
        monkeypatch.setattr("duetjax.serve.generation.TextStream.push", lambda *_: 1 / 0)
        body = {"model": MODEL, "prompt": "a", "stream": True}
        error, done = events(http.post("/v1/completions", json=body).content)
        assert json.loads(error)["error"]["code"] == "internal_error"
        assert done == "[DONE]"
        assert "ZeroDivisionError" in caplog.text
        served.engine.wait_idle()


def test_a_stream_that_the_engines_shutdown_ends_says_so(folder):
    with serving(folder) as served:
        executor = served.engine.executor
        executor.hold()
        with openai.OpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0) as client:
            stream = client.completions.create(model=MODEL, prompt="a", stream=True)
            wait_until(lambda: executor.num_waiting > 0, "a step")
            stopping = threading.Thread(target=served.engine.shutdown, args=(10,))
            stopping.start()
            executor.release()
            with pytest.raises(openai.APIError) as caught:
                list(stream)
            stopping.join()
        assert caught.value.code == "shutting_down"


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_has_died_answers_new_requests_with_its_own_code(folder, stream):
    engine = FakeEngine()
    with serving(folder, engine) as served, served.http() as http:
        engine.executor.break_down()
        body = {"model": MODEL, "prompt": "a"}
        first = http.post("/v1/completions", json=body)
        wait_until(lambda: not engine.is_healthy, "a dead engine")
        second = http.post("/v1/completions", json=body | {"stream": stream})
        health = http.get("/health")
    for response, status in ((first, 500), (second, 500), (health, 503)):
        assert response.status_code == status
        assert response.json()["error"]["code"] == "engine_dead"
