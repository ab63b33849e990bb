"""Answers under grammars and reasoning budgets by the demo model, among others in launches of 8.

500 random schemas, a quarter each greedily or not and on lanes beside each other or not. As many
are walked through at random, without a model, in tests/unit/test_constrain_follower.py.
"""

import queue
import random
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
from json_schemas import is_valid, random_schema

from duetjax.build_device import prepare
from duetjax.build_permits import permit_issuer
from duetjax.checkpoint.source import resolve_model
from duetjax.config import Backend, EngineConfig, SamplingParams
from duetjax.constrain.grammars import json_grammar
from duetjax.engine import EngineClient
from duetjax.policy.launch import Split
from duetjax.policy.policies import Aggregate, Duet
from duetjax.policy.request import Constraint, FinishReason, NewRequest, Reasoning
from duetjax.policy.scheduler import Scheduler
from duetjax.text.tokenizer import Tokenizer

DEMO = Path(__file__).parents[2] / "checkpoints" / "demo"
PATIENCE = 120.0
EOS = 1
K = 8
ENGINE = {"max_num_seqs": 16, "max_num_batched_tokens": 128}
"""The sizes of test_llm: its programs are in the store."""
QUESTIONS = ("What is TTFT?", "What is a KV page?", "Who are you?", "What is a launch?")


class ByEights:
    """Decode launches of eight steps, beside prefill launches where there is a second lane."""

    def __init__(self, *, splits):
        self._splits = splits

    def decide(self, load):
        budget = ENGINE["max_num_batched_tokens"]
        if self._splits and load.rows and load.prompt_tokens:
            return Duet(Split(1, 1), K, budget)
        return Aggregate(budget, k=K)


class Served:
    """An engine, and what came of what it was asked; launches: those that it has completed.

    free, free_tokens: a request and its answer, before any other was under a grammar.
    """

    def __init__(self, backend):
        self.backend = backend
        is_split = backend is Backend.LANES
        split = {"policy": "static-split", "split": (1, 1)} if is_split else {}
        source = resolve_model(str(DEMO))
        ready = prepare(source, EngineConfig(**ENGINE, **split, backend=backend))
        self.tokenizer = Tokenizer.from_folder(DEMO)
        self.client = EngineClient(
            Scheduler(ready.limits, ByEights(splits=is_split)),
            ready.executor,
            vocab_size=source.config.vocab_size,
            permits=permit_issuer(source, self.tokenizer),
        )
        self._outputs = queue.SimpleQueue()
        self.client.start(self._outputs.put)
        self.launches = []
        self.client.watch_launches(self.launches.extend)
        self.free = self.request("free", 24, stop_ids=())
        self.free_tokens = self.run(self.free)[0]["free"]

    def run(self, *news):
        """The tokens and the ends of requests, by id."""
        for new in news:
            self.client.submit(new)
        tokens, ends = defaultdict(list), {}
        while len(ends) < len(news):
            for output in self._outputs.get(timeout=PATIENCE):
                tokens[output.id] += output.token_ids
                if output.finish is not None:
                    ends[output.id] = output.finish
        return tokens, ends

    def text(self, tokens):
        return self.tokenizer.decode([token for token in tokens if token != EOS])

    def request(self, name, max_tokens, *, constraint=None, temperature=0.0, **fields):
        question = QUESTIONS[sum(map(ord, name)) % len(QUESTIONS)]
        prompt = tuple(self.tokenizer.encode(question, add_special_tokens=False))
        sampling = SamplingParams(temperature=temperature, seed=sum(map(ord, name)))
        new = NewRequest(name, prompt, max_tokens, sampling, (EOS,), constraint=constraint)
        return replace(new, **fields)


@pytest.fixture(scope="module", params=[Backend.LANES, Backend.JAX])
def served(request):
    made = Served(request.param)
    yield made
    assert made.client.shutdown(PATIENCE)


def under(schema):
    return Constraint(json_grammar(schema, max_bytes=65_536, max_depth=100, param="schema"))


def schemas(seed, count):
    dice = random.Random(seed)
    return [random_schema(dice) for _ in range(count)]


def check_valid(served, asked, tokens, ends):
    """Of requests and their schemas."""
    num_ended = 0
    for new, schema in asked:
        assert ends[new.id] in (FinishReason.STOP, FinishReason.LENGTH)
        if ends[new.id] is FinishReason.STOP:
            num_ended += 1
            text = served.text(tokens[new.id])
            assert is_valid(text, schema), (schema, text)
    assert num_ended >= 0.9 * len(asked)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_of_a_crowd_are_valid_against_their_schemas(served, temperature):
    wanted = schemas(f"{served.backend} {temperature}", 125)
    asked = [
        (served.request(f"{i}", 120, constraint=under(schema), temperature=temperature), schema)
        for i, schema in enumerate(wanted)
    ]
    tokens, ends = served.run(*(new for new, _ in asked))
    check_valid(served, asked, tokens, ends)


def test_one_row_under_a_grammar_leaves_fifteen_neighbours_their_tokens_and_their_steps(served):
    plain = [served.request(f"plain {i}", 400, stop_ids=()) for i in range(15)]
    alone, _ = served.run(*plain)
    del served.launches[:]
    wanted = schemas(5, 12)
    asked = [
        (served.request(f"json {i}", 60, constraint=under(schema)), schema)
        for i, schema in enumerate(wanted)
    ]
    tokens, ends = served.run(*plain, *(new for new, _ in asked))
    check_valid(served, asked, tokens, ends)
    assert [tokens[new.id] for new in plain] == [alone[new.id] for new in plain]
    shared = [
        launch.k
        for launch in served.launches
        if not launch.prompt_chunks
        and any(each.startswith("plain") for each in launch.ids)
        and any(each.startswith("json") for each in launch.ids)
    ]
    assert shared.count(K) >= 0.9 * len(shared) > 0


@pytest.mark.parametrize("follows", [None, {"enum": ["yes", "no"]}], ids=["text", "json"])
def test_reasoning_never_has_a_token_more_than_its_budget(served, follows):
    budgets = [0, 1, 2, 7, 8, 9, 16, 30]
    grammar = None if follows is None else under(follows).grammar
    asked = {
        f"reason {budget}": served.request(
            f"reason {budget}",
            64,
            constraint=Constraint(grammar, Reasoning("<think>", "</think>", True, budget)),
            stop_ids=(EOS,) if follows else (),
        )
        for budget in budgets
    }
    del served.launches[:]
    tokens, ends = served.run(*asked.values())
    end = served.tokenizer.encode("</think>", add_special_tokens=False)
    for budget in budgets:
        said = tokens[f"reason {budget}"]
        places = [i for i in range(len(said)) if said[i : i + len(end)] == end]
        assert places == [budget], served.text(said)
        if follows:
            assert ends[f"reason {budget}"] is FinishReason.STOP
            assert is_valid(served.text(said[budget + len(end) :]), follows)
    if not follows:
        assert K in {launch.k for launch in served.launches}


def test_the_next_owner_of_a_slot_is_not_under_the_grammar_of_the_last(served):
    null = under({"type": "null"})
    served.run(*(served.request(f"{i}", 30, constraint=null) for i in range(16)))
    crowd = [replace(served.free, id=f"free {i}") for i in range(16)]
    tokens, _ = served.run(*crowd)
    assert [tokens[new.id] for new in crowd] == [served.free_tokens] * 16
    assert len(set(served.free_tokens)) > 4
