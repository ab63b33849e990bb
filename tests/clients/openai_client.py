"""OpenAI's own client against running servers: what an application that uses it sees.

`python openai_client.py demo=URL calling=URL locked=URL narrow=URL`, as tests/clients/run.py does;
the same checks hold under openai 2 and 3.
"""

import asyncio
import json
import re
import socket
import sys
import time
from datetime import date
from enum import Enum
from importlib.metadata import version
from itertools import pairwise
from typing import Literal
from urllib.request import urlopen

import openai
from pydantic import BaseModel, Field

MODEL = "duetjax-demo"
QUESTIONS = (
    "What is TTFT?",
    "What does TBT mean?",
    "What is the KV cache?",
    "How do you define TTFT?",
)
ASKED = [{"role": "user", "content": QUESTIONS[0]}]
ENDLESS = {"max_tokens": 3000, "extra_body": {"ignore_eos": True}}
NUM_STREAMS = 32


def connect(url, **options):
    return openai.OpenAI(base_url=f"{url}/v1", **{"api_key": "none", "max_retries": 0} | options)


def ask(client, **parameters):
    return client.chat.completions.create(
        **{"model": MODEL, "messages": ASKED, "temperature": 0} | parameters
    )


def go_on(client, prompt="Prefill is", **parameters):
    return client.completions.create(
        **{"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 16} | parameters
    )


def error_of(kind, call, *args, **parameters):
    try:
        call(*args, **parameters)
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


def metric(url, name, label=""):
    with urlopen(f"{url}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    [value] = [x.rpartition(" ")[2] for x in lines if re.match(rf"{name}[ {{]", x) and label in x]
    return float(value)


def pages_in_use(url):
    return sum(metric(url, "duetjax_pages", f'"{state}"') for state in ("held", "quarantined"))


def wait_until(is_true, what):
    for _ in range(600):
        if is_true():
            return
        time.sleep(0.1)
    raise AssertionError(f"waited in vain until {what}")


# One client, one server with the demo model.


def check_models(client):
    [model] = client.models.list().data
    assert (model.id, model.object, model.max_model_len) == (MODEL, "model", 4096), model
    assert client.models.retrieve(MODEL) == model
    assert error_of(openai.NotFoundError, client.models.retrieve, "x").code == "model_not_found"


def check_chat(client):
    answer = ask(client)
    [choice] = answer.choices
    assert (answer.object, answer.model) == ("chat.completion", MODEL), answer
    assert (choice.finish_reason, choice.message.role) == ("stop", "assistant"), choice
    assert "first token" in choice.message.content, choice
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens, usage


def check_chat_stream(client):
    chunks = list(ask(client, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert {(c.object, c.id) for c in chunks} == {("chat.completion.chunk", chunks[0].id)}
    text = "".join(c.choices[0].delta.content or "" for c in chunks)
    assert text == ask(client).choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["stop"]


def check_chat_stream_helper(client):
    with client.chat.completions.stream(model=MODEL, messages=ASKED, temperature=0) as stream:
        kinds = {event.type for event in stream}
        whole = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds, kinds
    assert whole.choices[0].message.content == ask(client).choices[0].message.content


def check_completion(client):
    answer = go_on(client)
    assert (answer.object, answer.choices[0].finish_reason) == ("text_completion", "length")
    assert answer.usage.completion_tokens == 16
    chunks = list(go_on(client, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == answer.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "length"
    batch = go_on(client, ["Prefill is", "Decode is"])
    assert [c.index for c in batch.choices] == [0, 1]
    assert batch.choices[0].text == answer.choices[0].text
    assert go_on(client, [5, 6, 7]).usage.prompt_tokens == 3


def check_usage_of_streams(client):
    usage = ask(client).usage
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert [c.usage for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices == []
    counts = "prompt_tokens", "completion_tokens", "total_tokens"
    assert [getattr(chunks[-1].usage, c) for c in counts] == [getattr(usage, c) for c in counts]
    assert all(c.usage is None for c in ask(client, stream=True))


def check_cached_tokens(client):
    prompt = [7, 8] * 100 + [9]
    first, again = (go_on(client, prompt, extra_body={"cache_salt": "a"}).usage for _ in range(2))
    other = go_on(client, prompt, extra_body={"cache_salt": "b"}).usage
    cached = [usage.prompt_tokens_details.cached_tokens for usage in (first, again, other)]
    assert cached == [0, 192, 0], cached


def check_chat_logprobs(client):
    answer = ask(client, logprobs=True, top_logprobs=3, max_tokens=8).choices[0]
    tokens = answer.logprobs.content
    assert len(tokens) == 8
    assert b"".join(bytes(t.bytes) for t in tokens).decode() == answer.message.content
    for token in tokens:
        assert [t.logprob for t in token.top_logprobs] == sorted(
            (t.logprob for t in token.top_logprobs), reverse=True
        )
        assert (token.top_logprobs[0].token, len(token.top_logprobs)) == (token.token, 3)
        assert token.logprob == token.top_logprobs[0].logprob <= 0
    chunks = list(ask(client, logprobs=True, top_logprobs=3, max_tokens=8, stream=True))
    streamed = [c.choices[0].logprobs for c in chunks if c.choices[0].logprobs]
    assert [t.token for part in streamed for t in part.content] == [t.token for t in tokens]
    assert error_of(openai.BadRequestError, ask, client, top_logprobs=3).param == "top_logprobs"


def check_completion_logprobs(client):
    choice = go_on(client, logprobs=2, max_tokens=6).choices[0]
    told = choice.logprobs
    assert "".join(told.tokens) == choice.text
    assert [len(top) for top in told.top_logprobs] == [2] * 6
    pairs = zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True)
    assert all(top[token] == logprob == max(top.values()) for token, logprob, top in pairs), told
    assert told.text_offset == [len("".join(told.tokens[:i])) for i in range(6)]


def check_several_choices(client):
    asked = {"n": 2, "temperature": 1.3, "seed": 3, "max_tokens": 24}
    answer = go_on(client, **asked)
    texts = [choice.text for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert texts[0] != texts[1]
    streamed = ["", ""]
    for chunk in go_on(client, stream=True, **asked):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts
    assert len(ask(client, n=2, seed=3, temperature=1.3).choices) == 2


def check_seeds(client):
    drawn = [
        go_on(client, temperature=1.3, seed=seed, max_tokens=32).choices[0].text
        for seed in (1, 1, 2, 3)
    ]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) == 3, drawn
    free = {go_on(client, temperature=1.3, max_tokens=32).choices[0].text for _ in range(3)}
    assert len(free) == 3, free


def check_stop(client):
    whole = ask(client).choices[0].message.content
    cut = ask(client, stop=["first", "never there"]).choices[0]
    assert (cut.finish_reason, cut.message.content) == ("stop", whole[: whole.index("first")])
    chunks = list(ask(client, stop="first", stream=True))
    text = "".join(c.choices[0].delta.content or "" for c in chunks)
    assert (text, chunks[-1].choices[0].finish_reason) == (cut.message.content, "stop")
    kept = ask(client, stop="first", extra_body={"include_stop_str_in_output": True})
    assert kept.choices[0].message.content == cut.message.content + "first"


def check_most_tokens(client):
    answer = ask(client, max_completion_tokens=5)
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 5)
    both = error_of(openai.BadRequestError, ask, client, max_completion_tokens=5, max_tokens=6)
    assert both.param == "max_tokens", both


def check_parameters_of_vllm(client):
    greedy = ask(client)
    one = ask(client, temperature=1.5, extra_body={"top_k": 1})
    assert one.choices[0].message.content == greedy.choices[0].message.content
    length = greedy.usage.completion_tokens
    longer = ask(client, max_tokens=length + 9, extra_body={"min_tokens": length + 5})
    assert longer.usage.completion_tokens >= length + 5
    on = ask(client, max_tokens=length + 9, extra_body={"ignore_eos": True})
    assert (on.choices[0].finish_reason, on.usage.completion_tokens) == ("length", length + 9)
    told = ask(client, extra_body={"return_token_ids": True, "priority": -5})
    assert len(told.prompt_token_ids) == told.usage.prompt_tokens
    assert len(told.choices[0].token_ids) == told.usage.completion_tokens
    ids = []
    for chunk in ask(client, stream=True, extra_body={"return_token_ids": True}):
        ids += chunk.choices[0].token_ids
    assert ids == told.choices[0].token_ids
    wrong = error_of(openai.BadRequestError, ask, client, extra_body={"priority": "high"})
    assert wrong.param == "priority", wrong


def check_objectives(client):
    assert ask(client, extra_headers={"x-slo-tbt-ms": "20"}).choices
    wrong = error_of(openai.BadRequestError, ask, client, extra_headers={"x-slo-tbt-ms": "soon"})
    assert wrong.param == "x-slo-tbt-ms", wrong


def check_headers(client):
    create = client.chat.completions.with_raw_response.create
    asked = {"model": MODEL, "messages": ASKED, "max_tokens": 4, "temperature": 0}
    raw = create(
        **asked, extra_headers={"x-request-id": "my-own.7"}, extra_body={"mood": 1, "x": 2}
    )
    assert raw.headers["x-request-id"] == raw.parse()._request_id == "my-own.7"
    assert sorted(raw.headers["x-duetjax-ignored"].split(", ")) == ["mood", "x"]
    plain = create(**asked)
    assert len(plain.headers["x-request-id"]) == 32
    assert "x-duetjax-ignored" not in plain.headers
    stream = create(**asked, stream=True, extra_body={"mood": 1})
    assert stream.headers["x-duetjax-ignored"] == "mood"
    assert stream.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert list(stream.parse())[-1].choices[0].finish_reason == "length"


def check_refusals(client):
    missing = error_of(openai.NotFoundError, ask, client, model="nobody")
    assert (missing.code, missing.param) == ("model_not_found", "model"), missing
    assert missing.request_id
    for parameters, param in (
        ({"temperature": 9}, "temperature"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"n": 99}, "n"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ):
        wrong = error_of(openai.BadRequestError, ask, client, **parameters)
        assert (wrong.param, wrong.type) == (param, "invalid_request_error"), wrong
    long = error_of(openai.BadRequestError, go_on, client, [5] * 5000)
    assert long.code == "context_length_exceeded", long
    large = error_of(openai.APIStatusError, go_on, client, "a" * 3 * 2**20)
    assert (large.status_code, large.code) == (413, "body_too_large"), large
    assert error_of(openai.NotFoundError, client.embeddings.create, model=MODEL, input="a").code


# One client, one server that knows tools and reasoning. The model was taught neither: whatever it
# writes is what the grammar leaves it, so all that a schema asks for here is short.


class Colour(Enum):
    """A list of words, by reference."""

    RED = "red"
    BLUE = "blue"


class Wheel(BaseModel):
    """An object, by reference."""

    spokes: int = Field(ge=0, le=99, description="how many")
    colour: Colour = Colour.RED


class Bicycle(BaseModel):
    """What pydantic writes into schemas: titles, defaults, references, formats, null."""

    kind: Literal["road", "city"]
    name: str = Field(max_length=12, title="Its name")
    built: date
    bell: bool | None = None
    front: Wheel
    others: list[Wheel] = Field(default_factory=list, max_length=2)


class Repair(BaseModel):
    """Repairs a part of a bicycle."""

    part: Literal["wheel", "bell", "chain"]
    urgent: bool
    wheel: Wheel | None


class Sell(BaseModel):
    """Sells a bicycle."""

    price: int = Field(ge=1, le=500)


TOOLS = [openai.pydantic_function_tool(Repair), openai.pydantic_function_tool(Sell)]
UNTHINKING = {"chat_template_kwargs": {"enable_thinking": False}}
ONE_CALL = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
NAMED = {"type": "function", "function": {"name": "Sell"}}


def parse(client, **parameters):
    given = {"model": MODEL, "messages": ASKED, "temperature": 1, "extra_body": UNTHINKING}
    return client.chat.completions.parse(**given | parameters).choices[0]


def check_parse(client):
    for seed in range(8):
        choice = parse(client, response_format=Bicycle, seed=seed)
        assert choice.finish_reason == "stop", choice
        assert isinstance(choice.message.parsed, Bicycle), choice
        assert choice.message.parsed == Bicycle.model_validate_json(choice.message.content)


def check_parse_stream(client):
    asked = {"model": MODEL, "messages": ASKED, "seed": 3, "extra_body": UNTHINKING}
    with client.chat.completions.stream(response_format=Bicycle, **asked) as stream:
        *_, done = [event for event in stream if event.type == "content.done"]
        whole = stream.get_final_completion()
    assert isinstance(done.parsed, Bicycle), done
    assert whole.choices[0].message.parsed == done.parsed


def check_parse_with_reasoning(client):
    extra = {"max_reasoning_tokens": 9}
    choice = parse(client, response_format=Bicycle, seed=1, extra_body=extra)
    assert isinstance(choice.message.parsed, Bicycle), choice
    assert choice.message.reasoning_content, choice


def check_json_object(client):
    close = {str(token): 100 for token in tokens_of(client, "}")}  # else it goes on for long
    for seed in range(4):
        answer = ask(
            *(client,),
            response_format={"type": "json_object"},
            logit_bias=close,
            temperature=1,
            seed=seed,
            extra_body=UNTHINKING,
        )
        assert answer.choices[0].finish_reason == "stop", answer
        assert isinstance(json.loads(answer.choices[0].message.content), dict), answer


def tokens_of(client, text):
    url = str(client.base_url).removesuffix("v1/") + "tokenize"
    body = {"model": MODEL, "prompt": text, "add_special_tokens": False}
    return client.post(url, cast_to=object, body=body)["tokens"]


def check_tools(client):
    kinds = {"Repair": Repair, "Sell": Sell}
    called = set()
    for seed in range(8):
        choice = parse(client, seed=seed, **ONE_CALL)
        [call] = choice.message.tool_calls
        assert choice.finish_reason == "tool_calls", choice
        assert choice.message.content is None, choice
        assert type(call.function.parsed_arguments) is kinds[call.function.name], call
        called.add(call.id)
    assert len(called) == 8
    choice = parse(client, tools=TOOLS, tool_choice=NAMED)
    assert [call.function.name for call in choice.message.tool_calls] == ["Sell"]


def check_tools_after_reasoning(client):
    choice = parse(client, seed=2, extra_body={"max_reasoning_tokens": 6}, **ONE_CALL)
    assert choice.message.reasoning_content, choice
    assert len(choice.message.tool_calls) == 1


def check_tools_stream(client):
    asked = {"model": MODEL, "messages": ASKED, "seed": 4, "extra_body": UNTHINKING} | ONE_CALL
    with client.chat.completions.stream(**asked) as stream:
        events = list(stream)
        whole = stream.get_final_completion().choices[0]
    told = "".join(
        event.arguments_delta
        for event in events
        if event.type == "tool_calls.function.arguments.delta"
    )
    [done] = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    [call] = whole.message.tool_calls
    assert told == done.arguments == call.function.arguments
    assert isinstance(done.parsed_arguments, BaseModel), done
    assert call.function.parsed_arguments == done.parsed_arguments
    assert (whole.finish_reason, done.name) == ("tool_calls", call.function.name)
    again = parse(client, **{k: v for k, v in asked.items() if k in ("seed", *ONE_CALL)})
    assert again.message.tool_calls[0].function.arguments == told


def check_tool_results(client):
    choice = parse(client, seed=5, **ONE_CALL)
    call = choice.message.tool_calls[0]
    result = {"role": "tool", "tool_call_id": call.id, "content": "done"}
    turn = choice.message.model_dump(exclude_none=True)
    answer = ask(client, messages=[*ASKED, turn, result], tools=TOOLS, max_tokens=4)
    assert answer.usage.completion_tokens <= 4
    bare = {"role": "assistant", "tool_calls": [call.model_dump()]}
    assert ask(client, messages=[*ASKED, bare, result], tool_choice="none", max_tokens=4).choices


def check_budgets(client):
    for budget in (0, 1, 2, 7, 30):
        for wanted in ({}, {"response_format": Bicycle}, ONE_CALL):
            extra = {"max_reasoning_tokens": budget}
            asked = {"model": MODEL, "messages": ASKED, "max_tokens": 300, "seed": 6}
            answer = client.chat.completions.parse(**asked, extra_body=extra, **wanted)
            used = answer.usage.completion_tokens_details.reasoning_tokens
            assert used <= budget, (budget, answer.usage)
            assert bool(wanted) <= (used == budget), (budget, answer.usage)


def check_reasoning_stream(client):
    asked = {
        "max_tokens": 200,
        "response_format": {"type": "json_schema", "json_schema": SMALL},
        "extra_body": {"max_reasoning_tokens": 12},
    }
    whole = ask(client, **asked)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}, **asked))
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    thought = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    assert thought == whole.choices[0].message.reasoning_content != ""
    content = "".join(delta.content or "" for delta in deltas)
    assert content == whole.choices[0].message.content
    assert json.loads(content) in ("a", "b")
    details = chunks[-1].usage.completion_tokens_details
    assert details == whole.usage.completion_tokens_details
    assert details.reasoning_tokens == 12


SMALL = {"name": "letter", "schema": {"enum": ["a", "b"]}, "strict": True}


def check_refusals_of_tools(client):
    twice = [TOOLS[0], TOOLS[0]]
    odd = {"name": "x", "schema": {"type": "nothing"}}
    for parameters, param in (
        ({"tools": twice}, "tools"),
        ({"tool_choice": "required"}, "tools"),
        ({"tools": TOOLS, "tool_choice": NAMED | {"function": {"name": "x"}}}, "tool_choice"),
        ({"response_format": {"type": "json_schema", "json_schema": odd}}, "response_format"),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "response_format"),
    ):
        wrong = error_of(openai.BadRequestError, ask, client, **parameters)
        assert (wrong.param, wrong.type) == (param, "invalid_request_error"), wrong


# Servers of their own, several clients, and clients that leave.


def check_keys(urls):
    url = urls["locked"]
    for wrong in ("none", "open-sesame2", "Open-Sesame"):
        with connect(url, api_key=wrong) as client:
            refused = error_of(openai.AuthenticationError, client.models.list)
            assert refused.code == "invalid_api_key", refused
            error_of(openai.AuthenticationError, go_on, client, stream=True)
    with connect(url, api_key="open-sesame") as client:
        assert client.models.list().data[0].id == MODEL
        assert list(go_on(client, stream=True))


def check_nobody_there(urls):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with connect(f"http://127.0.0.1:{unused.getsockname()[1]}") as client:
            error_of(openai.APIConnectionError, client.models.list)


def check_full_server(urls):
    """The client comes again on its own, and not before Retry-After is over."""
    url = urls["narrow"]
    seen = []
    hooks = {"response": [lambda response: seen.append((time.monotonic(), response))]}
    with connect(url) as first, first_of_a_stream(first) as stream:
        with connect(url) as client:
            refused = error_of(openai.RateLimitError, go_on, client)
        assert (refused.code, refused.response.headers["retry-after"]) == ("queue_full", "1")
        refusals = metric(url, "duetjax_refused_requests_total")

        def leave_after_two(response):
            if len(seen) == 2:
                stream.close()

        hooks["response"].append(leave_after_two)
        with connect(
            url, max_retries=9, http_client=openai.DefaultHttpxClient(event_hooks=hooks)
        ) as client:
            whole = go_on(client, extra_body={"ignore_eos": True})
            assert whole.usage.completion_tokens == 16
    statuses = [response.status_code for _, response in seen]
    assert statuses == [429] * (len(seen) - 1) + [200], statuses
    assert metric(url, "duetjax_refused_requests_total") - refusals == len(seen) - 1 >= 2
    waits = [b[0] - a[0] for a, b in pairwise(seen)]
    assert min(waits) > 0.99, waits
    told = [response.request.headers["x-stainless-retry-count"] for _, response in seen]
    assert told == [str(i) for i in range(len(seen))], told
    print(f"  {statuses}, waited {', '.join(f'{wait:.2f}' for wait in waits)} s")


def first_of_a_stream(client):
    """An endless stream that has begun."""
    stream = go_on(client, stream=True, **ENDLESS)
    next(iter(stream))
    return stream


def check_impatience(urls):
    url = urls["narrow"]
    wait_until(lambda: pages_in_use(url) == 0, "the server is idle")
    with connect(url, timeout=0.5) as client:
        error_of(openai.APITimeoutError, go_on, client, **ENDLESS)
        wait_until(lambda: pages_in_use(url) == 0, "what nobody waits for has ended")
        whole = {"extra_body": {"ignore_eos": True}}
        assert go_on(client.with_options(timeout=60), **whole).usage.completion_tokens == 16


def check_leaving(urls):
    url = urls["demo"]
    wait_until(lambda: pages_in_use(url) == 0, "the server is idle")
    total = metric(url, "duetjax_pages", '"free"') + metric(url, "duetjax_pages", '"cached"')
    with connect(url) as client:
        stream = first_of_a_stream(client)
        assert pages_in_use(url) > 0
        stream.close()
        wait_until(lambda: pages_in_use(url) == 0, "a closed stream's pages are free")
    asyncio.run(cancelled(url))
    wait_until(lambda: pages_in_use(url) == 0, "a cancelled task's pages are free")
    left = metric(url, "duetjax_pages", '"free"') + metric(url, "duetjax_pages", '"cached"')
    assert left == total, (left, total)


async def cancelled(url):
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        begun = asyncio.Event()

        async def read():
            async for _ in await go_on(client, stream=True, **ENDLESS):
                begun.set()

        task = asyncio.create_task(read())
        await begun.wait()
        assert pages_in_use(url) > 0
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()


def check_many_streams(urls):
    with connect(urls["demo"]) as client:
        alone = [ask(client, messages=question(i)) for i in range(len(QUESTIONS))]
    wanted = [(a.choices[0].message.content, "stop", a.usage.completion_tokens) for a in alone]
    began = time.monotonic()
    results = asyncio.run(streams(urls["demo"]))
    assert results == [wanted[i % len(QUESTIONS)] for i in range(NUM_STREAMS)]
    tokens = sum(count for _, _, count in results)
    print(f"  {NUM_STREAMS} streams, {tokens} tokens in {time.monotonic() - began:.1f} s")


def question(index):
    return [{"role": "user", "content": QUESTIONS[index % len(QUESTIONS)]}]


async def streams(url):
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        return await asyncio.gather(*(one_stream(client, i) for i in range(NUM_STREAMS)))


async def one_stream(client, index):
    text, finish, count = "", None, 0
    options = {"stream": True, "stream_options": {"include_usage": True}}
    async for chunk in await ask(client, messages=question(index), timeout=300, **options):
        if chunk.usage is not None:
            count = chunk.usage.completion_tokens
        for choice in chunk.choices:
            text += choice.delta.content or ""
            finish = choice.finish_reason
    return text, finish, count


WITH_ONE_CLIENT = (
    *(check_models, check_chat, check_chat_stream, check_chat_stream_helper, check_completion),
    *(check_usage_of_streams, check_cached_tokens, check_chat_logprobs, check_completion_logprobs),
    *(check_several_choices, check_seeds, check_stop, check_most_tokens, check_parameters_of_vllm),
    *(check_objectives, check_headers, check_refusals),
)
WITH_TOOLS = (
    *(check_parse, check_parse_stream, check_parse_with_reasoning, check_json_object, check_tools),
    *(check_tools_after_reasoning, check_tools_stream, check_tool_results, check_budgets),
    *(check_reasoning_stream, check_refusals_of_tools),
)
WITH_SERVERS = (
    *(check_keys, check_nobody_there, check_full_server, check_impatience, check_leaving),
    check_many_streams,
)


def main():
    urls = dict(argument.split("=", 1) for argument in sys.argv[1:])
    print(f"openai {version('openai')}", flush=True)
    for name, checks in (("demo", WITH_ONE_CLIENT), ("calling", WITH_TOOLS)):
        with connect(urls[name]) as client:
            for check in checks:
                check(client)
                print(f"ok {check.__name__}", flush=True)
    for check in WITH_SERVERS:
        check(urls)
        print(f"ok {check.__name__}", flush=True)


if __name__ == "__main__":
    main()
