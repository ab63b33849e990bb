"""The first start compiles, the second finds everything, and nothing compiles while serving."""

import asyncio
import os
import random
import subprocess
import sys

import openai
import pytest
from fake_engine import wait_until
from server_process import metric, serving

FLAGS = ("--max-num-seqs", "8", "--max-num-batched-tokens", "128")
FEW = ("--max-num-seqs", "1", "--max-num-batched-tokens", "64")
MODEL = "duetjax-demo"
NUM_REQUESTS = 1000


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A folder whose programs an engine with FLAGS has compiled, and what it answered."""
    folder = tmp_path_factory.mktemp("cache")
    done = generate(folder)
    assert "7 of them compiled" in done.stderr
    return folder, done.stdout


@pytest.fixture
def cache(first):
    return first[0]


@pytest.fixture
def wanted(first):
    return first[1]


def generate(folder, flags=FLAGS):
    command = [sys.executable, "-m", "duetjax.cli", "generate", *flags]
    return subprocess.run(
        [*command, "--temperature", "0", "--max-tokens", "12", "What is TTFT?"],
        env={**os.environ, "DUETJAX_CACHE_DIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )


def test_a_second_start_compiles_nothing_nor_do_a_thousand_mixed_requests(cache):
    with serving(*FLAGS, DUETJAX_CACHE_DIR=str(cache)) as (_, url):
        assert metric(url, "duetjax_compilations_total") == 0
        asyncio.run(mixed_requests(url))
        assert metric(url, "duetjax_compilations_total") == 0
        wait_until(lambda: metric(url, "vllm:num_requests_running") == 0, "an idle engine")


async def mixed_requests(url):
    """Short ones of every kind, from 32 clients at a time."""
    dice, gate = random.Random(0), asyncio.Semaphore(32)
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:

        async def one(body):
            async with gate:
                if "messages" in body:
                    answer = await client.chat.completions.create(**body)
                else:
                    answer = await client.completions.create(**body)
                assert answer.choices[0].finish_reason in ("stop", "length")

        await asyncio.gather(*(one(body(dice)) for _ in range(NUM_REQUESTS)))


def body(dice):
    common = {
        "model": MODEL,
        "max_tokens": dice.randint(1, 6),
        "temperature": dice.choice((0, 0.7, 1.3)),
        "top_p": dice.choice((1, 0.9)),
        "seed": dice.getrandbits(40),
        "frequency_penalty": dice.choice((0, 0, 0.5)),
        "logit_bias": dice.choice((None, {"5": 3})),
        "extra_body": {"top_k": dice.choice((0, 30)), "min_tokens": dice.choice((0, 1))},
    }
    if dice.random() < 0.5:
        logprobs = {"logprobs": True, "top_logprobs": 3} if dice.random() < 0.3 else {}
        question = dice.choice(("What is TTFT?", "Why is decode slow?", "Name a river."))
        return {**common, **logprobs, "messages": [{"role": "user", "content": question}]}
    prompt = [dice.randrange(1000) for _ in range(dice.choice((1, 9, 70, 200)))]
    return {**common, "prompt": prompt, "logprobs": dice.choice((None, 2))}


def test_a_damaged_program_is_found_compiled_again_and_answers_the_same(cache, wanted):
    entries = sorted((cache / "programs").glob("*.program"))
    dice = random.Random(1)
    damaged = dice.sample(entries, 2)
    for entry in damaged:
        data = bytearray(entry.read_bytes())
        place = dice.randrange(len(data))
        data[place] ^= 1 << dice.randrange(8)
        entry.write_bytes(data)
    done = generate(cache)
    assert done.stdout == wanted
    assert "2 of them compiled" in done.stderr
    assert all(f"{entry.name} is not used" in done.stderr for entry in damaged)
    assert "0 of them compiled" in generate(cache).stderr


def test_a_cache_folder_that_cannot_be_written_is_said_once_and_does_no_harm(wanted, tmp_path):
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    done = generate(in_the_way, FEW)
    assert done.stdout == wanted
    assert done.stderr.count("programs cannot be stored") == 1
