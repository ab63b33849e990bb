"""`duetjax serve` as users run it: a process, the demo model, the official client, signals."""

import asyncio
import random
import signal

import openai
import pytest
from server_process import metric, serving

NUM_STREAMS = 64
MODEL = "duetjax-demo"
QUESTION = [{"role": "user", "content": "What is TTFT?"}]


@pytest.fixture(scope="module")
def server():
    """The address of a server, and its free pages before it saw a request."""
    with serving("--max-num-seqs", "16", "--max-num-batched-tokens", "128") as (_, url):
        yield url, free_pages(url)


@pytest.fixture
def url(server):
    return server[0]


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def free_pages(url):
    return metric(url, "duetjax_pages", 'state="free"')


def test_the_official_client_chats(client):
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0)
    assert "first token" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_the_official_client_completes_text_and_token_ids(client):
    text = client.completions.create(model=MODEL, prompt="Prefill is", temperature=0, max_tokens=8)
    assert text.choices[0].finish_reason == "length"
    assert text.usage.completion_tokens == 8
    ids = client.completions.create(model=MODEL, prompt=[5, 6, 7], temperature=0, max_tokens=8)
    assert ids.usage.prompt_tokens == 3


def test_a_streamed_answer_is_the_whole_answer(client):
    whole = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0)
    stream = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, stream=True
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_errors_reach_the_official_client_with_their_types(client):
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nobody", messages=QUESTION)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=9)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=MODEL, prompt=[5] * 5000, max_tokens=1)
    assert long.value.code == "context_length_exceeded"


def test_sixty_four_streams_survive_random_disconnects_among_them(server):
    url, free_at_start = server
    rng = random.Random(0)
    leaves_after = [rng.choice([None, None, 0, 1, 5, 20]) for _ in range(NUM_STREAMS)]
    wanted = asyncio.run(run_streams(url, [None]))[0]
    assert wanted[1] == "stop"
    results = asyncio.run(run_streams(url, leaves_after))
    stayed = [r for r, leaves in zip(results, leaves_after, strict=True) if leaves is None]
    assert len(stayed) > 16
    assert set(stayed) == {wanted}
    asyncio.run(pages_return(url, free_at_start))


async def run_streams(url, leaves_after):
    """Streams one question many times at once; a number is the chunk after which to leave."""
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        return await asyncio.gather(*(one_stream(client, after) for after in leaves_after))


async def one_stream(client, leaves_after):
    stream = await client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, stream=True, timeout=300
    )
    text, finish = "", None
    async with stream:
        count = 0
        async for chunk in stream:
            if count == leaves_after:
                return None
            count += 1
            text += chunk.choices[0].delta.content or ""
            finish = chunk.choices[0].finish_reason
    return text, finish


async def pages_return(url, wanted):
    for _ in range(600):
        if free_pages(url) == wanted:
            return
        await asyncio.sleep(0.1)
    raise AssertionError(f"{free_pages(url)} of {wanted} pages came back")


def test_sigterm_lets_a_stream_finish_and_exits_with_zero():
    with serving("--max-num-seqs", "1", "--max-num-batched-tokens", "64") as (process, url):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        with (
            client,
            client.chat.completions.create(
                model=MODEL, messages=QUESTION, temperature=0, stream=True
            ) as stream,
        ):
            chunks = iter(stream)
            next(chunks)
            process.send_signal(signal.SIGTERM)
            assert [c.choices[0].finish_reason for c in chunks][-1] == "stop"
        assert process.wait(60) == 0
