"""`duetjax serve --device sim` as users run it: a process without a GPU, the official client."""

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

import openai
import pytest
from server_process import metric, serving

from duetjax.cli import main

NUM_STREAMS = 64
MODEL = "llama-3.1-8b"
DEMO = Path(__file__).parents[2] / "checkpoints" / "demo"
ON_H200 = (
    *("--device", "sim", "--hardware-profile", "h200-sxm", "--policy", "duet"),
    *("--model", MODEL, "--tokenizer", str(DEMO)),
    *("--max-num-batched-tokens", "8192", "--tbt-slo-ms", "25"),
)
QUESTION = [{"role": "user", "content": "What is TTFT?"}]
NOTICE = "simulated h200-sxm: tokens are invented"
# Fails if anything has loaded jax by the time the server ends.
PROGRAM = "import sys, duetjax.cli as cli; sys.exit(cli.main(sys.argv[1:]) or 'jax' in sys.modules)"


@pytest.fixture(scope="module")
def url():
    with serving(*ON_H200) as (_, url):
        yield url


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client, seed=10, **parameters):
    return client.chat.completions.create(
        model=MODEL, messages=QUESTION, seed=seed, **parameters
    ).choices[0]


def test_the_official_client_chats(client):
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, seed=10)
    words = answer.choices[0].message.content.split()
    assert answer.choices[0].finish_reason == "stop"
    assert all(word.isalpha() for word in words)
    assert answer.usage.completion_tokens == len(words) + 1
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + len(words) + 1


def test_a_streamed_answer_is_the_whole_answer(client):
    chunks = list(
        client.chat.completions.create(model=MODEL, messages=QUESTION, seed=10, stream=True)
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == ask(client).message.content
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_seed_has_its_answer_and_none_another_every_time(client):
    assert ask(client).message.content == ask(client, temperature=0).message.content
    assert ask(client).message.content != ask(client, seed=4).message.content
    assert ask(client, None).message.content != ask(client, None).message.content


def test_a_whole_number_of_tokens_a_stop_string_and_logprobs_are_to_be_had(client):
    text = ask(client).message.content
    cut = ask(client, max_tokens=4, logprobs=True, top_logprobs=2)
    assert cut.finish_reason == "length"
    assert text.startswith(cut.message.content)
    assert [(token.logprob, token.top_logprobs) for token in cut.logprobs.content] == [
        (0.0, [])
    ] * 4
    third = text.split()[2]
    assert ask(client, stop=third).message.content == text[: text.index(third)]


def test_models_health_and_metrics_are_there_as_ever(client, url):
    [model] = client.models.list().data
    assert (model.id, model.max_model_len) == (MODEL, 131072)
    assert metric(url, "duetjax_engine_healthy") == 1
    assert metric(url, "duetjax_rung", 'rung="simulated"') == 1
    assert metric(url, "duetjax_compilations_total") == 0


def test_sixty_four_streams_get_the_answers_that_they_get_alone(url):
    expected = [asyncio.run(streams(url, [seed]))[0] for seed in range(4)]
    results = asyncio.run(streams(url, range(NUM_STREAMS)))
    assert results[:4] == expected
    assert {finish for _, finish in results} == {"stop"}
    assert len(set(results)) == NUM_STREAMS


async def streams(url, seeds):
    """Text and finish of the same question with each of the seeds, at once."""
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        return await asyncio.gather(*(one_stream(client, seed) for seed in seeds))


async def one_stream(client, seed):
    text, finish = "", None
    stream = await client.chat.completions.create(
        model=MODEL, messages=QUESTION, seed=seed, stream=True, timeout=300
    )
    async for chunk in stream:
        text += chunk.choices[0].delta.content or ""
        finish = chunk.choices[0].finish_reason
    return text, finish


def test_a_long_prompt_beside_a_stream_splits_the_device():
    slow = "--hardware-profile", "l40s", "--tbt-slo-ms", "100"  # a busy machine keeps its pace
    with serving(*ON_H200, *slow) as (_, url):
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            endless = {"max_tokens": 100_000, "extra_body": {"ignore_eos": True}}
            stream = client.completions.create(model=MODEL, prompt="a", stream=True, **endless)
            with stream:
                next(iter(stream))
                prompt = [7] * 12_000
                client.completions.create(model=MODEL, prompt=prompt, max_tokens=1)
        assert metric(url, "duetjax_decisions_total", 'outcome="split"') > 0


# Time, as it is written.


def test_scripted_steps_take_no_less_than_their_time():
    with serving("--device", "sim", "--sim-step-ms", "10/40") as (_, url):
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            stream = client.completions.create(
                model="duetjax-demo",
                prompt="Once",
                max_tokens=50,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            text = "".join(chunk.choices[0].text for chunk in stream)
        assert len(text.split()) == 50
        assert metric(url, "vllm:generation_tokens_total") == 50
        assert metric(url, "vllm:time_to_first_token_seconds_sum") > 0.0399
        assert metric(url, "vllm:e2e_request_latency_seconds_sum") > 0.0399 + 49 * 0.00999


def test_noise_changes_no_answer(client):
    with serving(*ON_H200, "--sim-noise", "0.5") as (_, url):
        [uneven] = asyncio.run(streams(url, [10]))
    assert uneven == (ask(client).message.content, "stop")


# What it says, and what it leaves alone.


def test_a_start_says_that_it_is_a_simulation():
    command = [sys.executable, "-m", "duetjax.cli", "serve", "--port", "0", *ON_H200]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=60)
    assert line.startswith(f"duetjax: serving {MODEL} on http://127.0.0.1:")
    assert line.endswith(f" ({NOTICE})\n")
    assert f"duetjax: {NOTICE}" in log
    assert process.returncode == 0


def test_a_server_loads_no_jax_and_keeps_nothing(tmp_path):
    cache = {"DUETJAX_CACHE_DIR": str(tmp_path)}
    with serving(*ON_H200, program=("-c", PROGRAM), **cache) as (process, url):
        assert asyncio.run(streams(url, [10]))[0][1] == "stop"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert list(tmp_path.rglob("*")) == []


# What is refused.


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--device", "gpu"], "--device gpu: choose auto or sim"),
        (["--device", "sim"], "--hardware-profile (a100-sxm-80gb,"),
        (["--device", "sim", "--hardware-profile", "h300"], "--hardware-profile h300"),
        (["--device", "sim", "--sim-step-ms", "1/1", "--policy", "duet"], "--policy duet"),
        (["--device", "sim", "--sim-step-ms", "0/40"], "--sim-step-ms"),
        (["--device", "sim", "--sim-noise", "2"], "--sim-noise"),
        (["--sim-noise", "0.1"], "--device sim"),
        (["--sim-step-ms", "10/40"], "--device sim"),
        (["--device", "sim", "--sim-step-ms", "1/1", "--model", MODEL], "--tokenizer"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_flag_ends_with_one_line_that_names_it(flags, named, capsys):
    assert main(["serve", "--port", "0", *flags]) == 1
    [line] = [x for x in capsys.readouterr().err.splitlines() if "error" in x]
    assert line.startswith("duetjax: error: ")
    assert named in line


@pytest.mark.parametrize("text", ["10", "10/", "a/b", "1/2/3"])
def test_a_script_that_is_none_says_how_to_write_one(text, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--device", "sim", "--sim-step-ms", text])
    assert ended.value.code == 2
    assert "as in 10/40" in capsys.readouterr().err
