"""`--deterministic`: a request's tokens and logprobs, bit for bit, alone and in any company.

And without the flag: the same tokens with the prefix cache and without it, near-ties aside.
"""

import queue
import random
from dataclasses import replace

import numpy as np
import pytest
from compare import assert_same_generations
from golden import tiny

from duetjax.build_device import build_engine
from duetjax.checkpoint.source import resolve_model
from duetjax.config import EngineConfig, SamplingParams
from duetjax.model.kv_pages import KVLayout
from duetjax.policy.request import NewRequest

MODEL = "qwen2"
TRIALS = 50
PAGE = 16


class Engine:
    """Runs batches of requests; what each of them got, to the bit."""

    def __init__(self, folder, *, deterministic=True, **changes):
        settings = {"max_model_len": 128, "max_num_seqs": 16, "max_num_batched_tokens": 48}
        settings |= {"page_size": PAGE, "deterministic": deterministic}
        config = EngineConfig(**settings | changes)
        self.client, _ = build_engine(resolve_model(str(folder)), config)
        self._outputs = queue.SimpleQueue()
        self.client.start(self._outputs.put)

    def run(self, *news):
        for new in news:
            self.client.submit(new)
        got = {new.id: [] for new in news}
        running = len(news)
        while running:
            for output in self._outputs.get(timeout=120):
                got[output.id] += zip(output.token_ids, output.logprobs, strict=True)
                running -= output.finish is not None
        return got


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp(MODEL)
    tiny.write_checkpoint(MODEL, made)
    return made


@pytest.fixture(scope="module")
def engine(folder):
    made = Engine(folder)
    yield made
    made.client.shutdown(30)


def request(name, dice):
    vocab = tiny.CONFIGS[MODEL]["vocab_size"]
    prompt = tuple(dice.randrange(vocab) for _ in range(dice.randrange(1, 100)))
    params = SamplingParams(
        temperature=dice.choice((0.0, 0.8, 1.5)),
        top_p=dice.choice((1.0, 0.9)),
        top_k=dice.choice((0, 10)),
        presence_penalty=dice.choice((0.0, 0.5)),
        seed=dice.getrandbits(60),
        logprobs=3,
    )
    return NewRequest(name, prompt, dice.randrange(4, 28), params)


@pytest.mark.parametrize("trial", range(TRIALS))
def test_a_request_gets_the_same_bits_alone_and_in_company(engine, trial):
    dice = random.Random(trial)
    wanted = request("wanted", dice)
    company = [request(f"other-{i}", dice) for i in range(dice.choice((1, 7, 15)))]
    company.insert(dice.randrange(len(company) + 1), wanted)
    alone = engine.run(wanted)["wanted"]
    assert len(alone) == wanted.max_tokens
    assert engine.run(*company)["wanted"] == alone


def test_a_preempted_request_gets_the_same_bits_and_sends_nothing_twice(engine, folder):
    dice = random.Random(0)
    drawn = [request(str(i), dice) for i in range(6)]
    news = [replace(new, prompt=(*new.prompt, *new.prompt)[:60], max_tokens=40) for new in drawn]
    news = [new for new in news if len(new.prompt) == 60]
    config = resolve_model(str(folder)).config
    page_bytes = KVLayout.of(config, 1, PAGE, "float32").page_bytes
    crowded = Engine(folder, kv_cache_memory_bytes=16 * page_bytes)
    got = crowded.run(*news)
    assert crowded.client.stats().preemptions > 0
    crowded.client.shutdown(30)
    assert got == {new.id: engine.run(new)[new.id] for new in news}


def family(dice, count, **sampling):
    """Requests that begin alike: with one of two beginnings of 48 or more tokens."""
    vocab = tiny.CONFIGS[MODEL]["vocab_size"]
    beginnings = [[dice.randrange(vocab) for _ in range(n)] for n in (48, 60)]
    for index in range(count):
        end = [dice.randrange(vocab) for _ in range(dice.randrange(1, 30))]
        params = SamplingParams(seed=index, logprobs=2, **sampling)
        yield NewRequest(f"{index}", (*dice.choice(beginnings), *end), 12, params)


def with_and_without_cache(folder, news, **settings):
    got = []
    for caching in (True, False):
        engine = Engine(folder, enable_prefix_caching=caching, **settings)
        got.append([engine.run(new)[new.id] for new in news[:4]])
        got[-1] += engine.run(*news[4:]).values()
        hits = engine.client.stats().prefix_hits
        engine.client.shutdown(30)
        assert (hits > 48 * len(news) / 2) if caching else (hits == 0)
    return got


def test_what_was_found_in_the_prefix_cache_gives_the_same_bits(folder):
    news = list(family(random.Random(1), 16, temperature=0.8))
    cached, computed = with_and_without_cache(folder, news)
    assert cached == computed


def test_what_was_found_in_the_prefix_cache_gives_the_same_tokens_by_default(folder):
    news = list(family(random.Random(2), 60, temperature=0.0))
    cached, computed = with_and_without_cache(folder, news, deterministic=False, max_num_seqs=4)
    tokens = [[np.array([token for token, _ in one]) for one in got] for got in (cached, computed)]
    gaps = [np.array([lp.top[0][1] - lp.top[1][1] for _, lp in one]) for one in computed]
    assert_same_generations(*tokens, gaps)
