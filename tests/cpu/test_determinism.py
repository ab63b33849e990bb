"""`--deterministic`: a request's tokens and logprobs, bit for bit, alone and in any company."""

import queue
import random
from dataclasses import replace

import pytest
from golden import tiny

from duetjax.build import build_engine
from duetjax.checkpoint.source import resolve_model
from duetjax.config import EngineConfig, SamplingParams
from duetjax.model.kv_pages import KVLayout
from duetjax.policy.request import NewRequest

MODEL = "qwen2"
TRIALS = 50
PAGE = 16


class Engine:
    """Runs batches of requests; what each of them got, to the bit."""

    def __init__(self, folder, **changes):
        settings = {"max_model_len": 128, "max_num_seqs": 16, "max_num_batched_tokens": 48}
        config = EngineConfig(**settings, page_size=PAGE, deterministic=True, **changes)
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
