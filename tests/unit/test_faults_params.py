"""Parameters out of place: each is refused or harmless, and nobody's tokens change."""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, repeat
from typing import Annotated, Any

import pytest
from fake_engine import END, wait_until
from faults import Faults
from faulty import asking, both, code, harm, lifted, server, setting
from pydantic import BaseModel
from pydantic.functional_validators import PlainValidator
from serve_setup import MODEL

import duetjax.config
import duetjax.engine
import duetjax.serve.protocol
from duetjax.config import SamplingParams
from duetjax.policy.limits import SchedulerLimits
from duetjax.policy.request import new_requests
from duetjax.serve import call, completions
from duetjax.serve.fields import Body
from duetjax.serve.protocol import CompletionBody
from duetjax.text.stream import TextStream, _IncrementalDecoder

FAULTS = Faults("Parameters", server, harm)
V = END + 1  # width of the logits, as the server knows it


def unchecked(*_: Any) -> None:
    """In place of a check."""


def any_prompts(value: Any) -> tuple[Any, ...]:
    """Prompts as the protocol hands them on, whatever is in them."""
    if isinstance(value, str):
        return (value,)
    if value and isinstance(value[0], int | float):
        return (tuple(value),)
    return tuple(tuple(prompt) for prompt in value)


class AnyBody(CompletionBody):
    """Fields of any kind."""

    n: Any = 1
    prompt: Annotated[Any, PlainValidator(any_prompts)]


def any_fit(service: Any, body: Any, prompt: Any, usual: int | None) -> int | None:
    """max_tokens, whether it fits or not."""
    return usual if body.asked_max_tokens is None else body.asked_max_tokens


def validate_laxly(kind: type[Body], given: Any, **options: Any) -> Body:
    return BaseModel.model_validate.__func__(kind, given, strict=False, **options)


any_fields = setting(completions, "CompletionBody", AnyBody)
lax = setting(Body, "model_validate", classmethod(validate_laxly))
any_choice = setting(SamplingParams, "_check_choice", unchecked)
any_length = setting(SamplingParams, "_check_length", unchecked)
any_value = setting(duetjax.config, "_check", unchecked)
any_ids = both(
    setting(call, "check_ids", unchecked), setting(duetjax.engine, "_check_range", unchecked)
)
any_size = both(
    setting(call, "_fit", any_fit),
    setting(SchedulerLimits, "check", unchecked),
)
any_biases = setting(
    duetjax.config,
    "_bias_pairs",
    lambda given: tuple((int(token), bias) for token, bias in dict(given or ()).items()),
)


for value in (0, -1):
    FAULTS.add(
        f"max_tokens {value}",
        asking(max_tokens=value),
        expected="400 invalid_value",
        guard="lengths of SamplingParams, and the engine's",
        off=both(any_length, any_size),
    )
FAULTS.add(
    "max_tokens 1.5",
    asking(max_tokens=1.5),
    expected="400 invalid_value",
    guard="pydantic, strict or not",
)
for name, value in (("max_tokens", "5"), ("max_tokens", True), ("temperature", "1")):
    FAULTS.add(
        f"{name} {value!r}",
        asking(**{name: value}),
        expected="400 invalid_value",
        guard="strict types",
        off=lax,
    )
for name, value in (("temperature", -0.1), ("temperature", 2.1), ("top_p", 0), ("seed", 2**63)):
    FAULTS.add(
        f"{name} {value}",
        asking(**{name: value}),
        expected="400 invalid_value",
        guard="ranges of SamplingParams",
        off=any_choice,
    )
FAULTS.add(
    "temperature 1e-30",
    asking(temperature=1e-30),
    expected="200",
    guard="greedy below 1e-5, in the model's sampler",
)


def short_of_memory(request_id: str, prompt: Any, params: SamplingParams, **facts: Any) -> Any:
    """Where a machine's memory would end."""
    if params.n > 10**6:
        raise MemoryError
    return new_requests(request_id, prompt, params, **facts)


FAULTS.add(
    "n 0",
    asking(n=0),
    expected="400 invalid_value",
    guard="range of n, and that of SamplingParams",
    off=both(any_fields, any_length),
)
FAULTS.add(
    "n 10^9",
    asking(n=10**9),
    expected="400 invalid_value",
    guard="max_n and max_choices, before anything is multiplied",
    off=both(lifted("max_n", "max_choices"), setting(call, "new_requests", short_of_memory)),
)
FAULTS.add(
    "n 8 of 9 prompts",
    asking(n=8, prompt=["a"] * 9),
    expected="400 invalid_value",
    guard="max_choices",
    off=lifted("max_choices"),
)
FAULTS.add(
    "10^6 prompts",
    asking(prompt=["a"] * 10**6),
    expected="413 body_too_large",
    guard="max_body_bytes, then max_prompts",
    off=lifted("max_body_bytes"),
)
FAULTS.add(
    "100 prompts",
    asking(prompt=["a"] * 100),
    expected="400 invalid_value",
    guard="max_prompts and max_choices",
    off=lifted("max_prompts", "max_choices"),
)
for name, value in (("prompt ''", ""), ("prompt ['']", [""])):
    FAULTS.add(
        name,
        asking(prompt=value),
        expected="400 invalid_value",
        guard="a prompt's length, and the engine's look at it",
        off=any_size,
    )
FAULTS.add(
    "prompt []",
    asking(prompt=[]),
    expected="400 invalid_value",
    guard="the protocol's look at prompts",
    off=any_fields,
)
FAULTS.add(
    "prompt [[]]",
    asking(prompt=[[]]),
    expected="400 invalid_value",
    guard="the protocol's look at prompts, and two at their length",
    off=both(any_fields, any_size),
)
for name, value in (("-1", -1), ("V", V), ("2^31", 2**31)):
    FAULTS.add(
        f"token id {name} in a prompt",
        asking(prompt=[97, value]),
        expected="400 invalid_value",
        guard="ids below the logits' width, looked at twice",
        off=any_ids,
    )
    FAULTS.add(
        f"token id {name} in stop_token_ids",
        asking(stop_token_ids=[value]),
        expected="400 invalid_value",
        guard="ids below the logits' width, looked at twice",
        off=both(any_ids, any_value),
    )
    FAULTS.add(
        f"token id {name} in logit_bias",
        asking(logit_bias={str(value): 1}),
        expected="400 invalid_value",
        guard="ids below the logits' width, looked at twice",
        off=both(any_ids, any_biases),
    )
for value in (1.5, True):
    FAULTS.add(
        f"token id {value} in a prompt",
        asking(prompt=[97, value]),
        expected="400 invalid_value",
        guard="the protocol's look at prompts, and the engine's",
        off=both(any_fields, any_ids),
    )
for value in (101, -101):
    FAULTS.add(
        f"logit_bias {value}",
        asking(logit_bias={"97": value}),
        expected="400 invalid_value",
        guard="ranges of SamplingParams",
        off=any_biases,
    )
FAULTS.add(
    "min_tokens 17 with max_tokens null, which is 16",
    asking(min_tokens=17, max_tokens=None),
    expected="400 invalid_value",
    guard="lengths of SamplingParams",
    off=any_length,
)


@FAULTS.attack(
    "prompts of max_model_len less one, of max_model_len, and of one more",
    expected="200, 400 context_length_exceeded, 400 context_length_exceeded",
    guard="a prompt's length, and the engine's look at it",
    off=any_size,
)
def long_prompts(served):
    most = served.context.service.max_model_len
    lengths = (most - 1, most, most + 1)
    return ", ".join(asking(prompt=[97] * n, max_tokens=1)(served) for n in lengths)


@contextmanager
def scripted(served, script: bytes) -> Iterator[None]:
    """Whatever is asked, these bytes are the answer, again and again."""
    executor = served.engine.executor
    executor.next_token = lambda state: script[
        (state.position - state.params.num_prompt) % len(script)
    ]
    try:
        yield
    finally:
        del executor.next_token


def stopping(script: bytes, stop: str):
    """An attack: a stop string in an answer."""

    def attack(served):
        asked = {"model": MODEL, "prompt": "a", "max_tokens": len(script), "stop": stop}
        with scripted(served, script), served.http() as http:
            [choice] = http.post("/v1/completions", json=asked).json()["choices"]
        return f"{choice['text']}, {choice['finish_reason']}"

    return attack


def decode_alone(decoder: Any, token_id: int) -> str:
    return decoder._decode([token_id])


def hold_nothing_back(stream: Any, new: str) -> str:
    text = _certain(stream, new) + stream._held
    stream._held = ""
    return text


_certain = TextStream._certain
FAULTS.add(
    "a stop string across three tokens",
    stopping(b"abcdef", "cde"),
    expected="ab, stop",
    guard="text that may begin a stop string is held back",
    off=setting(TextStream, "_certain", hold_nothing_back),
)
FAULTS.add(
    "a stop string that is one character of three tokens",
    stopping("a€b".encode(), "€"),
    expected="a, stop",
    guard="text is decoded by whole characters",
    off=setting(_IncrementalDecoder, "push", decode_alone),
)
FAULTS.add(
    "a stop string that looks like half a character",
    stopping("a€b".encode(), "\ufffd"),
    expected="a€b, length",
    guard="text is decoded by whole characters",
    off=setting(_IncrementalDecoder, "push", decode_alone),
)


def foreign_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = chain([0], repeat(1))

    def requests(request_id: str, prompt: Any, params: SamplingParams, **facts: Any) -> Any:
        params = replace(params, seed=next(seeds))
        return new_requests(request_id, prompt, params, **facts)

    monkeypatch.setattr(call, "new_requests", requests)


@FAULTS.attack(
    "a seed alone and among 16 others",
    expected="the same tokens",
    guard="each request's own seed",
    off=foreign_seeds,
)
def seeds(served):
    asked = {"model": MODEL, "prompt": "a", "max_tokens": 30, "temperature": 1}
    with served.http() as http, ThreadPoolExecutor(16) as pool:

        def text(seed: int) -> str:
            response = http.post("/v1/completions", json=asked | {"seed": seed})
            return response.json()["choices"][0]["text"]

        alone = text(7)
        served.engine.executor.hold()
        batch = [pool.submit(text, seed) for seed in range(16)]
        wait_until(lambda: served.engine.num_live == 16, "16 requests at once")
        served.engine.executor.release()
        return "the same tokens" if batch[7].result() == alone else "others"


def told(**fields: Any):
    """An attack: unknown fields."""

    def attack(served):
        with served.http() as http:
            asked = {"model": MODEL, "prompt": "a"} | fields
            response = http.post("/v1/completions", json=asked)
        return f"{code(response)}, told {response.headers.get('x-duetjax-ignored', 'nothing')}"

    return attack


FAULTS.add(
    "an unknown field",
    told(temprature=0.5),
    expected="200, told temprature",
    guard="unknown fields are named in a header",
    off=setting(completions, "ignored_header", lambda *_, **__: {}),
)
FAULTS.add(
    "an unknown field with a header in its name",
    told(**{"a\r\nx-evil: 1": 0}),
    expected="200, told ?",
    guard="only plain names are named",
    off=setting(duetjax.serve.protocol, "_PLAIN_NAME", re.compile("(?s:.*)")),
)

test_guarded, test_unguarded = FAULTS.tests()
