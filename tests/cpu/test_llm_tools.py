"""Tools in the Python API: answers that end with their first call, on the alphabet engine."""

import asyncio
import json
from dataclasses import replace
from random import Random

import pytest
from alphabet_model import alphabet_model
from fake_engine import END, PATIENCE, FakeEngine

import duetjax.llm
from duetjax import LLM, AsyncLLM, SamplingParams
from duetjax.completion import ToolCall

MAX_LEN = 4096
QUESTION = [{"role": "user", "content": "hello"}]
TOOLS = [{"type": "function", "function": {"name": name}} for name in ("weather", "clock")]
GREEDY = SamplingParams(temperature=0, max_tokens=2000)
PARIS = '{"city": "Paris"}'


def call(name, arguments):
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


TWO = f"Let me see.\n{call('weather', PARIS)}\n{call('clock', '{}')}"
ENDLESS = TWO + call("clock", "{}") * 20
FIRST = TWO[: TWO.index("\n</tool_call>")]
WEATHER = ToolCall("weather", PARIS)


@pytest.fixture
def engine(monkeypatch):
    engine = FakeEngine(max_len=MAX_LEN, num_pages=1025)
    model = replace(alphabet_model(engine, eos=True), max_model_len=MAX_LEN)
    monkeypatch.setattr(duetjax.llm, "load", lambda *_: model)
    yield engine
    engine.executor.release()
    assert engine.shutdown(PATIENCE)


@pytest.fixture
def llm(engine):
    return LLM(tool_call_parser="hermes", reasoning_parser="qwen3")


def whole(llm, params=GREEDY, **options):
    [answer] = llm.chat(QUESTION, params, use_tqdm=False, **{"tools": TOOLS} | options)
    return answer.outputs[0]


def streamed(llm, params=GREEDY):
    """A stream's deltas, put together: text, ids, calls, the reason."""
    deltas = list(llm.stream_chat(QUESTION, params, tools=TOOLS, parallel_tool_calls=False))
    calls = [call for delta in deltas for call in delta.tool_calls]
    assert {each.index for each in calls} <= {0}
    return (
        "".join(delta.text for delta in deltas),
        tuple(token for delta in deltas for token in delta.token_ids),
        "".join(each.name or "" for each in calls),
        "".join(each.arguments for each in calls),
        deltas[-1].finish_reason,
    )


async def over_asyncio(llm, **options):
    outputs = llm.chat(QUESTION, GREEDY, tools=TOOLS, **options)
    return [output async for output in outputs][-1].outputs[0]


def test_without_parallel_calls_the_first_one_ends_the_answer(engine, llm):
    engine.executor.say(TWO)
    both = whole(llm)
    assert both.tool_calls == (WEATHER, ToolCall("clock", "{}"))
    assert bytes(both.token_ids[:-1]).decode() == TWO
    one = whole(llm, parallel_tool_calls=False)
    assert one.tool_calls == (WEATHER,)
    assert (one.text, one.finish_reason) == ("Let me see.", "tool_calls")
    assert bytes(one.token_ids).decode() == FIRST


def test_a_stream_ends_there_too(engine, llm):
    engine.executor.say(ENDLESS)
    ids = tuple(FIRST.encode())
    assert streamed(llm) == ("Let me see.", ids, "weather", PARIS, "tool_calls")


def test_asyncio_s_answer_ends_there_too(engine):
    engine.executor.say(TWO)
    llm = AsyncLLM(tool_call_parser="hermes")

    async def answers():
        return await over_asyncio(llm), await over_asyncio(llm, parallel_tool_calls=False)

    both, one = asyncio.run(asyncio.wait_for(answers(), PATIENCE))
    assert [each.name for each in both.tool_calls] == ["weather", "clock"]
    assert (one.text, one.tool_calls, one.finish_reason) == (both.text, (WEATHER,), "tool_calls")
    assert bytes(one.token_ids).decode() == FIRST


def test_what_would_follow_the_first_call_is_given_up(engine, llm):
    engine.executor.say(ENDLESS)
    assert whole(llm).finish_reason == "tool_calls"
    assert engine.aborted == []
    assert whole(llm, parallel_tool_calls=False).tool_calls == (WEATHER,)
    assert engine.aborted == engine.submitted[1:]


def test_a_call_that_is_cut_off_has_not_ended_the_answer(engine, llm):
    engine.executor.say(TWO)
    for missing, reason in ((1, "length"), (0, "tool_calls")):
        params = replace(GREEDY, max_tokens=len(FIRST) - missing)
        assert whole(llm, params, parallel_tool_calls=False).finish_reason == reason


def test_it_does_not_end_before_min_tokens(engine, llm):
    engine.executor.say(TWO)
    params = replace(GREEDY, min_tokens=len(FIRST) + 30)
    one = whole(llm, params, parallel_tool_calls=False)
    assert (one.tool_calls, len(one.token_ids)) == ((WEATHER,), len(FIRST) + 30)
    assert streamed(llm, params)[1] == one.token_ids


def test_each_completion_of_a_prompt_has_a_call_of_its_own(engine, llm):
    engine.executor.say(call("clock", "{}") + TWO, "No.", TWO)
    params = replace(GREEDY, n=3, seed=0)
    [answer] = llm.chat(QUESTION, params, tools=TOOLS, parallel_tool_calls=False, use_tqdm=False)
    told = [([call.name for call in one.tool_calls], one.finish_reason) for one in answer.outputs]
    assert told == [(["clock"], "tool_calls"), ([], "stop"), (["weather"], "tool_calls")]


@pytest.mark.parametrize("text", ["No.", "a <tool_call> b", f"<think>{TWO}</think>No."])
def test_an_answer_without_calls_is_the_same(text, engine, llm):
    engine.executor.say(text)
    one, usual = whole(llm, parallel_tool_calls=False), whole(llm)
    assert replace(one, timings=usual.timings) == usual
    assert usual.token_ids == (*text.encode(), END)


def test_where_no_tools_are_offered_it_changes_nothing(engine, llm):
    engine.executor.say(TWO)
    one = whole(llm, tools=None, parallel_tool_calls=False)
    assert (one.text, one.tool_calls, one.finish_reason) == (TWO, (), "stop")


@pytest.mark.parametrize("seed", range(20))
def test_it_ends_where_the_first_call_of_any_answer_does(seed, engine, llm):
    random = Random(seed)
    arguments = json.dumps({random.choice("aü"): [random.randrange(99)]}, ensure_ascii=False)
    thought = random.choice(["", "<think>hm</think>"])
    content = random.choice(["", "x < y"])
    first = f"{thought}{content}{call('clock', arguments)}"
    engine.executor.say(first + call("weather", PARIS) * random.randrange(3))
    one = whole(llm, parallel_tool_calls=False)
    assert (one.text, one.tool_calls) == (content, (ToolCall("clock", arguments),))
    assert bytes(one.token_ids).decode() == first.removesuffix("\n</tool_call>")
