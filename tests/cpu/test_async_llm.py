"""AsyncLLM: on the alphabet engine, whose every output is known, and on the demo checkpoint."""

import asyncio
import itertools
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from alphabet_model import alphabet_model
from compare import first_differences
from fake_engine import PATIENCE, FakeEngine, continuation, wait_until

import duetjax.llm
from duetjax import AsyncLLM, SamplingParams
from duetjax.config import ConfigError, InvalidRequest
from duetjax.engine import EngineDead

GREEDY = SamplingParams(temperature=0, max_tokens=12)
ENDLESS = SamplingParams(temperature=0, max_tokens=200)


@pytest.fixture
def engine():
    engine = FakeEngine()
    yield engine
    engine.executor.release()
    assert engine.shutdown(PATIENCE)


@pytest.fixture
def llm(engine, monkeypatch):
    """An AsyncLLM over the alphabet engine."""
    model = alphabet_model(engine)
    monkeypatch.setattr(duetjax.llm, "load", lambda *_: model)
    return AsyncLLM()


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, PATIENCE))


async def collect(outputs):
    return [output async for output in outputs]


async def last_text(outputs):
    return (await collect(outputs))[-1].outputs[0].text


@asynccontextmanager
async def begun(llm, **options):
    """An endless generation that has had its first output, and its iterator."""
    outputs = llm.generate("a", ENDLESS, "x", **options)
    await anext(outputs)
    yield outputs
    await outputs.aclose()


def test_each_output_holds_all_so_far_and_the_last_is_finished(llm):
    outputs = run(collect(llm.generate("a", GREEDY, "x")))
    texts = [o.outputs[0].text for o in outputs]
    assert texts[-1] == continuation("a", 12)
    assert all(b.startswith(a) for a, b in itertools.pairwise(texts))
    assert [o.finished for o in outputs] == [False] * (len(outputs) - 1) + [True]
    assert outputs[-1].outputs[0].finish_reason == "length"
    assert {o.request_id for o in outputs} == {"x"}
    assert outputs[-1].prompt == "a"


def test_every_step_is_seen_by_a_caller_that_keeps_up(llm, engine):
    async def stepwise():
        engine.executor.hold()
        outputs = llm.generate("a", GREEDY)
        seen = []
        for _ in range(12):
            engine.executor.step(1)
            seen.append(len((await anext(outputs)).outputs[0].token_ids))
        return seen

    assert run(stepwise()) == list(range(1, 13))


def test_a_slow_caller_gets_fewer_outputs_and_all_of_the_text(llm, engine):
    async def slow():
        async with begun(llm) as outputs:
            await asyncio.to_thread(engine.wait_idle)
            return await collect(outputs)

    outputs = run(slow())
    assert len(outputs) <= 2  # the last one may come after the engine is idle
    assert len(outputs[-1].outputs[0].token_ids) == 200


def test_the_completions_of_a_prompt_come_together_and_end_one_by_one(llm):
    params = SamplingParams(n=3, temperature=1.0, seed=1, stop=["z"], max_tokens=30)
    outputs = run(collect(llm.generate("a", params)))
    ends = [[o.finish_reason for o in output.outputs] for output in outputs]
    assert all(len(end) == 3 for end in ends)
    assert ends[-1] == ["length", "stop", "length"]  # of 2, 3 and 4 letters a step, 3 meets "z"
    assert [o.finished for o in outputs].index(True) == len(outputs) - 1
    texts = [continuation("a", 30, 1.0, seed).split("z")[0] for seed in (1, 2, 3)]
    assert [o.text for o in outputs[-1].outputs] == texts


def test_a_stop_string_ends_the_request_in_the_engine_too(llm, engine):
    assert run(last_text(llm.generate("a", replace(ENDLESS, stop="f")))) == "bcde"
    engine.wait_idle()


def test_abort_ends_the_iteration_with_what_there_is(llm, engine):
    async def aborted():
        async with begun(llm) as outputs:
            await llm.abort("x")
            return await collect(outputs)

    engine.executor.hold()
    engine.executor.step(3)
    *_, last = run(aborted_with_release(aborted, engine))
    assert (last.finished, last.outputs[0].finish_reason) == (True, "abort")
    assert continuation("a", 20).startswith(last.outputs[0].text)
    engine.wait_idle()


async def aborted_with_release(work, engine):
    """Runs `work` and, once it has aborted something, lets the engine go on."""
    task = asyncio.create_task(work())
    while not engine.aborted:
        await asyncio.sleep(0.001)
    engine.executor.release()
    return await task


def test_abort_while_the_prompt_is_still_being_read_counts(llm, engine):
    async def aborted():
        task = asyncio.create_task(collect(llm.generate("a", ENDLESS, "x")))
        await asyncio.sleep(0)
        assert not engine.submitted
        await llm.abort("x")
        return await task

    *_, last = run(aborted())
    assert last.outputs[0].finish_reason == "abort"


def test_abort_of_an_id_that_nobody_has_does_nothing(llm):
    run(llm.abort("nobody"))


def test_closing_the_iterator_aborts_in_the_engine(llm, engine):
    async def closed():
        async with begun(llm):
            engine.executor.hold()
        assert engine.aborted == engine.submitted

    run(closed())
    engine.executor.release()
    engine.wait_idle()


def test_cancelling_the_waiting_task_aborts_in_the_engine(llm, engine):
    async def cancelled():
        engine.executor.hold()
        task = asyncio.create_task(collect(llm.generate("a", ENDLESS)))
        while not engine.submitted:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert engine.aborted == engine.submitted

    run(cancelled())
    engine.executor.release()
    engine.wait_idle()


def test_an_id_in_use_is_refused_and_is_free_again_at_the_end(llm):
    async def twice():
        async with begun(llm):
            with pytest.raises(InvalidRequest, match="'x' is already in use"):
                await anext(llm.generate("a", GREEDY, "x"))
        for _ in range(3):  # a stop string: the engine may end it later than we
            assert await last_text(llm.generate("a", replace(ENDLESS, stop="d"), "x")) == "bc"

    run(twice())


@pytest.mark.parametrize(
    ("prompt", "options", "param"),
    [
        ([], {}, "prompt"),
        ([10**6], {}, "prompt"),
        ("a" * 300, {}, "prompt"),
        ("a", {"priority": 10**400}, "priority"),
        (7, {}, None),
    ],
)
def test_what_cannot_be_served_is_refused_before_the_first_output(llm, prompt, options, param):
    with pytest.raises(InvalidRequest) as caught:
        run(anext(llm.generate(prompt, GREEDY, "x", **options)))
    assert caught.value.param == param
    assert run(last_text(llm.generate("a", GREEDY, "x"))) == continuation("a", 12)


def test_an_engine_that_dies_raises_for_everybody_and_for_those_to_come(llm, engine):
    async def dying():
        engine.executor.hold()
        tasks = [asyncio.create_task(collect(llm.generate(p, ENDLESS))) for p in "abc"]
        while len(engine.submitted) < 3:
            await asyncio.sleep(0.001)
        engine.executor.break_down()
        died = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(d) for d in died] == [EngineDead] * 3
        with pytest.raises(EngineDead, match="broke down"):
            await anext(llm.generate("a", GREEDY))

    run(dying())


def test_a_device_that_hangs_raises_for_everybody(llm, engine):
    async def hanging():
        engine.executor.hold()
        tasks = [asyncio.create_task(collect(llm.generate(p, ENDLESS))) for p in "abc"]
        while engine.executor.num_waiting == 0:
            await asyncio.sleep(0.001)
        engine.watch(0.2)
        died = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(d) for d in died] == [EngineDead] * 3

    run(hanging())
    engine.executor.release()
    wait_until(lambda: engine.shutdown(PATIENCE), "the engine's end")


def test_logits_that_are_not_finite_end_their_completion_alone(llm, engine):
    engine.executor.poison(ord("i"))

    async def both():
        return await asyncio.gather(*(collect(llm.generate(p, GREEDY)) for p in "aj"))

    sick, well = (outputs[-1].outputs[0] for outputs in run(both()))
    assert (sick.text, sick.finish_reason) == ("bcdefghi", "error")
    assert (well.text, well.finish_reason) == (continuation("j", 12), "length")


def test_leaving_the_block_ends_what_runs_and_refuses_what_comes(llm):
    async def left():
        async with llm:
            task = asyncio.create_task(collect(llm.generate("a", replace(ENDLESS, n=2))))
            await asyncio.sleep(0)
        with pytest.raises(EngineDead, match="shut down"):
            await anext(llm.generate("a", GREEDY))
        return await asyncio.gather(task, return_exceptions=True)

    [ended] = run(left())
    if not isinstance(ended, EngineDead):  # it was submitted in time
        assert {o.finish_reason for o in ended[-1].outputs} <= {"abort", "length"}


def test_priority_and_salt_reach_the_engine(llm, engine):
    run(collect(llm.generate("a", GREEDY, priority=-3, cache_salt="mine")))
    run(collect(llm.generate("a", GREEDY)))
    assert [(r.priority, r.cache_salt) for r in engine.requests] == [(-3, "mine"), (0, "")]


def test_cached_tokens_are_told_and_a_salt_keeps_them_apart(llm):
    prompt = "a prompt of more than two pages of 16 tokens"
    salts = (None, None, "other")
    cached = [
        run(collect(llm.generate(prompt, GREEDY, cache_salt=s)))[-1].num_cached_tokens
        for s in salts
    ]
    assert cached == [0, 32, 0]


def test_the_event_loop_is_woken_once_per_step_however_many_wait(llm, engine, monkeypatch):
    steps, wakes = [], []
    on_outputs = engine._on_outputs
    monkeypatch.setattr(engine, "_on_outputs", lambda o: (steps.append(len(o.ids)), on_outputs(o)))

    async def many():
        loop = asyncio.get_running_loop()
        wake = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda f, *a: (wakes.append(f), wake(f, *a))
        await asyncio.gather(*(collect(llm.generate("a", GREEDY)) for _ in range(16)))

    run(many())
    assert sum(steps) == 16 * 12
    assert wakes.count(llm._deliver) == len(steps) < 16 * 12


def test_two_event_loops_at_once_are_refused(llm, engine):
    async def outer():
        async with begun(llm):
            with pytest.raises(RuntimeError, match="another event loop"):
                await asyncio.to_thread(run, anext(llm.generate("a", GREEDY)))

    run(outer())


def test_an_unknown_setting_is_refused_by_name(llm):
    with pytest.raises(ConfigError, match="AsyncLLM has no setting tensor_parallel_size"):
        AsyncLLM(tensor_parallel_size=2)


# On the demo checkpoint: real tokenizer, weights, programs and engine.


@pytest.fixture(scope="module")
def demo():
    llm = AsyncLLM(max_num_seqs=16, max_num_batched_tokens=128)
    yield llm
    llm.shutdown()


def test_a_conversation_is_answered(demo):
    question = [{"role": "user", "content": "What is TTFT?"}]
    text = run(last_text(demo.chat(question, SamplingParams(temperature=0, max_tokens=96))))
    assert "first token" in text


def test_concurrent_requests_get_what_each_gets_alone(demo):
    prompts = ["The scheduler", "A page", "Once upon a time", "Decode", "Prefill is"] * 3

    async def tokens(prompt):
        outputs = await collect(demo.generate(prompt, replace(GREEDY, max_tokens=24)))
        return outputs[-1].outputs[0].token_ids

    async def together():
        return await asyncio.gather(*map(tokens, prompts))

    alone = [run(tokens(prompt)) for prompt in prompts[:5]] * 3
    differences = first_differences(run(together()), alone, [[1.0] * len(a) for a in alone])
    assert not differences
