"""The Python API on the demo checkpoint: real tokenizer, weights, programs and engine."""

import itertools
import math
import threading
from dataclasses import replace

import pytest
from alphabet_model import alphabet_model
from compare import first_differences
from fake_engine import FakeEngine, continuation, wait_until
from fake_executor import top_tokens

import duetjax.llm
from duetjax import LLM, SamplingParams
from duetjax.config import ConfigError, InvalidRequest, ModelFolderError
from duetjax.engine import EngineDead
from duetjax.policy.request import TokenLogprob

QUESTION = [{"role": "user", "content": "What is TTFT?"}]
GREEDY = SamplingParams(temperature=0, max_tokens=24)


@pytest.fixture(scope="module")
def llm():
    with LLM(max_num_seqs=16, max_num_batched_tokens=128) as llm:
        yield llm


def held_pages(llm):
    return llm._model.engine.stats().pages_held


def wait_until_idle(llm):
    wait_until(lambda: not held_pages(llm), "no page held")


def test_a_text_and_its_token_ids_give_the_same_completion(llm):
    [text] = llm.generate("Prefill is", GREEDY, use_tqdm=False)
    [ids] = llm.generate(list(text.prompt_token_ids), GREEDY, use_tqdm=False)
    assert text.outputs[0].token_ids == ids.outputs[0].token_ids
    assert text.outputs[0].text == ids.outputs[0].text
    assert text.prompt == "Prefill is"
    assert ids.prompt is None


def test_a_chat_answer_ends_at_the_end_of_turn(llm):
    [answer] = llm.chat(QUESTION, SamplingParams(temperature=0, max_tokens=96), use_tqdm=False)
    assert answer.outputs[0].finish_reason == "stop"
    assert "first token" in answer.outputs[0].text


def test_results_come_in_the_order_of_the_prompts(llm):
    prompts = ["The scheduler", "A page", "Once upon a time", "Decode"]
    alone = [llm.generate(p, GREEDY, use_tqdm=False)[0].outputs[0] for p in prompts]
    together = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert [t.prompt for t in together] == prompts
    differences = first_differences(
        [t.outputs[0].token_ids for t in together],
        [a.token_ids for a in alone],
        [[1.0] * len(a.token_ids) for a in alone],
    )
    assert not differences


def test_a_seed_draws_the_same_tokens_alone_and_in_a_batch_of_sixteen(llm):
    params = SamplingParams(temperature=2.0, max_tokens=20, seed=5, ignore_eos=True)
    [alone] = llm.generate("A", params, use_tqdm=False)
    others = [replace(params, temperature=1.8, seed=seed) for seed in range(100, 115)]
    batch = llm.generate(["A"] * 16, [*others, params], use_tqdm=False)
    assert batch[-1].outputs[0].token_ids == alone.outputs[0].token_ids
    assert len({o.outputs[0].token_ids for o in batch}) > 8


def test_n_completions_differ_and_the_first_is_the_seed_alone(llm):
    params = SamplingParams(temperature=2.0, max_tokens=16, seed=3, ignore_eos=True)
    [one] = llm.generate("A request", params, use_tqdm=False)
    [three] = llm.generate("A request", replace(params, n=3), use_tqdm=False)
    assert [o.index for o in three.outputs] == [0, 1, 2]
    assert three.outputs[0].token_ids == one.outputs[0].token_ids
    assert len({o.token_ids for o in three.outputs}) == 3


def test_unseeded_requests_are_drawn_afresh(llm):
    params = SamplingParams(temperature=2.0, max_tokens=16, ignore_eos=True)
    drawn = {llm.generate("A", params, use_tqdm=False)[0].outputs[0].token_ids for _ in range(4)}
    assert len(drawn) > 1


def test_a_stop_string_ends_the_text_before_it(llm):
    [full] = llm.chat(QUESTION, SamplingParams(temperature=0, max_tokens=64), use_tqdm=False)
    text = full.outputs[0].text
    stop = text[8:14]
    params = SamplingParams(temperature=0, max_tokens=64, stop=stop)
    [cut] = llm.chat(QUESTION, params, use_tqdm=False)
    assert cut.outputs[0].text == text[: text.index(stop)]
    assert cut.outputs[0].finish_reason == "stop"


def test_streamed_pieces_add_up_to_the_whole(llm):
    [whole] = llm.chat(QUESTION, GREEDY, use_tqdm=False)
    deltas = list(llm.stream_chat(QUESTION, GREEDY))
    assert "".join(d.text for d in deltas) == whole.outputs[0].text
    assert deltas[-1].finish_reason == whole.outputs[0].finish_reason
    assert all(d.finish_reason is None for d in deltas[:-1])


def test_timings_are_one_increasing_time_per_token(llm):
    [result] = llm.generate("The engine", GREEDY, use_tqdm=False)
    output = result.outputs[0]
    times = output.timings.token_times
    assert len(times) == len(output.token_ids)
    assert all(0 < a <= b for a, b in itertools.pairwise(times))
    assert output.timings.ttft == times[0]
    assert len(output.timings.tbt) == len(times) - 1


def test_a_dropped_stream_gives_its_pages_back(llm):
    wait_until_idle(llm)
    params = SamplingParams(temperature=0, max_tokens=2000, ignore_eos=True)
    stream = llm.stream("Tell me", params)
    next(stream)
    assert held_pages(llm) > 0
    stream.close()
    wait_until_idle(llm)


def test_one_bad_prompt_refuses_the_batch_and_leaves_nothing_running(llm):
    with pytest.raises(InvalidRequest, match="token ids are integers"):
        llm.generate([[1, 2, 3], [10**6]], SamplingParams(max_tokens=2000), use_tqdm=False)
    wait_until_idle(llm)


def test_the_second_time_a_prompt_comes_from_the_cache_but_for_its_end(llm):
    prompt = list(range(300, 500))
    [first] = llm.generate(prompt, GREEDY, use_tqdm=False)
    [second] = llm.generate(prompt, GREEDY, use_tqdm=False)
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 192)  # three pages of 64
    differences = first_differences(
        [second.outputs[0].token_ids],
        [first.outputs[0].token_ids],
        [[1.0] * len(first.outputs[0].token_ids)],
    )
    assert not differences


def test_n_completions_do_not_count_what_they_share_as_cached(llm):
    prompt = list(range(500, 700))
    params = SamplingParams(n=3, temperature=1.0, seed=1, max_tokens=4, ignore_eos=True)
    hits = llm._model.engine.stats().prefix_hits
    [fresh] = llm.generate(prompt, params, use_tqdm=False)
    assert fresh.num_cached_tokens == 0
    assert llm._model.engine.stats().prefix_hits > hits


def test_parameters_that_do_not_match_the_prompts_are_refused(llm):
    for params in ([], [GREEDY] * 3):
        with pytest.raises(InvalidRequest, match="2 prompts"):
            llm.generate(["a", "b"], params, use_tqdm=False)


def test_a_stream_is_refused_when_it_is_asked_for(llm):
    with pytest.raises(InvalidRequest, match="n must be 1"):
        llm.stream("x", SamplingParams(n=2))


def test_a_tiny_temperature_is_greedy(llm):
    [cold] = llm.generate("Decode", replace(GREEDY, temperature=1e-30), use_tqdm=False)
    [greedy] = llm.generate("Decode", GREEDY, use_tqdm=False)
    assert cold.outputs[0].token_ids == greedy.outputs[0].token_ids


@pytest.mark.parametrize("filtered", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}], ids=str)
def test_a_filter_that_keeps_one_token_is_greedy_at_any_temperature(llm, filtered):
    [greedy] = llm.generate("Decode", GREEDY, use_tqdm=False)
    params = replace(GREEDY, temperature=2.0, seed=1, **filtered)
    [hot] = llm.generate("Decode", params, use_tqdm=False)
    assert hot.outputs[0].token_ids == greedy.outputs[0].token_ids


def test_a_bias_forces_a_token_or_keeps_it_out(llm):
    [free] = llm.generate("Decode", GREEDY, use_tqdm=False)
    banned = free.outputs[0].token_ids[0]
    forced = replace(GREEDY, logit_bias={banned + 1: 100, banned: -100}, max_tokens=3)
    [biased] = llm.generate("Decode", forced, use_tqdm=False)
    assert biased.outputs[0].token_ids == (banned + 1,) * 3


def test_min_tokens_puts_the_end_of_turn_off(llm):
    params = SamplingParams(temperature=0, max_tokens=96)
    [answer] = llm.chat(QUESTION, params, use_tqdm=False)
    length = len(answer.outputs[0].token_ids)
    assert answer.outputs[0].finish_reason == "stop"
    params = replace(params, max_tokens=200, min_tokens=length + 3)
    [longer] = llm.chat(QUESTION, params, use_tqdm=False)
    assert len(longer.outputs[0].token_ids) > length + 2


def test_every_token_has_its_logprob_and_the_likeliest_beside_it(llm):
    [result] = llm.generate("A page", replace(GREEDY, logprobs=3), use_tqdm=False)
    [output] = result.outputs
    assert len(output.logprobs) == len(output.token_ids)
    for token, entry in zip(output.token_ids, output.logprobs, strict=True):
        ids, values = zip(*entry.top, strict=True)
        assert len(set(ids)) == 3
        assert list(values) == sorted(values, reverse=True)
        assert entry.top[0] == (token, entry.logprob)  # greedy takes the likeliest
        assert sum(map(math.exp, values)) <= 1 + 1e-5


def test_logprobs_are_the_models_own_whatever_the_parameters_prefer(llm):
    [plain] = llm.generate("A page", replace(GREEDY, max_tokens=1, logprobs=2), use_tqdm=False)
    [first] = plain.outputs[0].logprobs
    second = first.top[1]
    changed = replace(
        GREEDY, max_tokens=1, logprobs=0, logit_bias={second[0]: 100}, repetition_penalty=1.5
    )
    [biased] = llm.generate("A page", changed, use_tqdm=False)
    [entry] = biased.outputs[0].logprobs
    assert biased.outputs[0].token_ids == (second[0],)
    assert entry.logprob == pytest.approx(second[1], abs=1e-4)
    assert entry.top == ()


def test_ids_that_the_device_could_not_hold_are_refused_by_name(llm):
    for field, value in (("logit_bias", {10**6: 1}), ("stop_token_ids", [10**6])):
        with pytest.raises(InvalidRequest, match="token ids are integers") as caught:
            llm.generate("x", replace(GREEDY, **{field: value}), use_tqdm=False)
        assert caught.value.param == field
    with pytest.raises(InvalidRequest, match="at most 16"):
        llm.generate("x", replace(GREEDY, stop_token_ids=list(range(100, 116))), use_tqdm=False)


def test_threads_share_one_engine(llm):
    [wanted] = llm.generate("A slot", GREEDY, use_tqdm=False)
    got = []
    threads = [
        threading.Thread(target=lambda: got.append(llm.generate("A slot", GREEDY, use_tqdm=False)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [g[0].outputs[0].token_ids for g in got] == [wanted.outputs[0].token_ids] * 8


def test_a_prompt_that_fills_the_context_is_refused_with_the_numbers(llm):
    with pytest.raises(InvalidRequest, match="4096"):
        llm.generate([[5] * 4096], GREEDY, use_tqdm=False)
    [last] = llm.generate([[5] * 4095], SamplingParams(max_tokens=50), use_tqdm=False)
    assert last.outputs[0].finish_reason == "length"
    assert len(last.outputs[0].token_ids) == 1


@pytest.mark.parametrize(
    ("arguments", "error", "cure"),
    [
        ({"max_model_len": 100_000}, ConfigError, "--max-model-len 4096"),
        ({"kv_cache_memory_bytes": 1000}, ConfigError, "--kv-cache-memory-bytes"),
        ({"page_size": 48}, ConfigError, "16, 32, 64 or 128"),
        ({"tensor_parallel_size": 2}, ConfigError, "max_num_seqs"),
        ({"model": "./nowhere"}, ModelFolderError, "no such folder"),
        ({"model": "qwen3-8b"}, ModelFolderError, "--load-format dummy"),
    ],
)
def test_what_cannot_be_built_is_refused_with_the_cure(arguments, error, cure):
    with pytest.raises(error, match=cure) as caught:
        LLM(**arguments)
    assert "\n" not in str(caught.value)


# On the alphabet engine: what a person can predict to the digit.


@pytest.fixture
def alphabet(monkeypatch):
    """An LLM over the fake engine, whose logits after the letter "i" are not finite."""
    engine = FakeEngine()
    engine.executor.poison(ord("i"))
    model = alphabet_model(engine, eos=True)
    monkeypatch.setattr(duetjax.llm, "load", lambda *_: model)
    with LLM() as llm:
        yield llm


def test_logprobs_match_token_ids_also_where_a_stop_string_cuts_the_text(alphabet):
    params = replace(GREEDY, logprobs=2, stop=["de"])
    [result] = alphabet.generate("a", params, use_tqdm=False)
    [output] = result.outputs
    assert (output.text, bytes(output.token_ids)) == ("bc", b"bcde")
    assert output.logprobs == tuple(TokenLogprob(-0.5, top_tokens(t, 2)) for t in b"bcde")
    deltas = list(alphabet.stream("a", params))
    assert [lp for delta in deltas for lp in delta.logprobs] == list(output.logprobs)
    assert all(len(delta.logprobs) == len(delta.token_ids) for delta in deltas)


def test_without_being_asked_for_there_are_no_logprobs(alphabet):
    [result] = alphabet.generate("a", replace(GREEDY, max_tokens=3), use_tqdm=False)
    assert result.outputs[0].logprobs is None
    deltas = list(alphabet.stream("a", replace(GREEDY, max_tokens=3)))
    assert {delta.logprobs for delta in deltas} == {None}


def test_a_completion_whose_logits_are_not_finite_says_so_and_the_others_are_whole(alphabet):
    results = alphabet.generate(["a", "j"], replace(GREEDY, max_tokens=12), use_tqdm=False)
    sick, well = (result.outputs[0] for result in results)
    assert (sick.text, sick.finish_reason) == ("bcdefghi", "error")
    assert (well.text, well.finish_reason) == (continuation("j", 12), "length")
    *_, last = alphabet.stream("a", GREEDY)
    assert last.finish_reason == "error"
    [after] = alphabet.generate("j", replace(GREEDY, max_tokens=2), use_tqdm=False)
    assert after.outputs[0].text == "kl"


def test_an_engine_that_dies_raises(alphabet):
    alphabet._model.engine.executor.break_down()
    with pytest.raises(EngineDead, match="broke down"):
        alphabet.generate(["a", "j"], GREEDY, use_tqdm=False)


def test_a_device_that_hangs_raises_instead_of_waiting_for_ever(monkeypatch):
    engine = FakeEngine()
    monkeypatch.setattr(duetjax.llm, "load", lambda *_: alphabet_model(engine))
    engine.executor.hold()
    with LLM(watchdog_s=0.2) as llm, pytest.raises(EngineDead, match="nothing has come from"):
        llm.generate(["a", "j"], GREEDY, use_tqdm=False)
    engine.executor.release()


def test_a_stop_string_does_not_count_before_min_tokens(alphabet):
    params = replace(GREEDY, stop=["b", "e"], min_tokens=1, max_tokens=9)
    [result] = alphabet.generate("a", params, use_tqdm=False)
    assert result.outputs[0].text == "bcd"


def test_ignore_eos_goes_on_to_max_tokens(alphabet):
    params = replace(GREEDY, max_tokens=5)
    [ended, other] = alphabet.generate(
        ["x", "x"], [params, replace(params, ignore_eos=True)], use_tqdm=False
    )
    assert (ended.outputs[0].text, ended.outputs[0].finish_reason) == ("yz", "stop")
    assert (other.outputs[0].text, other.outputs[0].finish_reason) == ("yzab", "length")


def test_each_of_n_completions_stops_at_its_own_stop_string(alphabet):
    params = SamplingParams(n=2, temperature=1.0, seed=0, stop=["f", "v"], max_tokens=40)
    [result] = alphabet.generate("j", params, use_tqdm=False)
    assert [o.text for o in result.outputs] == ["klmnopqrstu", "lnprtvxzbdhj"[:5]]
    assert [o.finish_reason for o in result.outputs] == ["stop", "stop"]


def test_results_are_finished_and_have_ids_of_their_own(alphabet):
    results = alphabet.generate(["j", "k"], replace(GREEDY, max_tokens=2), use_tqdm=False)
    assert all(r.finished for r in results)
    assert len({r.request_id for r in results}) == 2


def test_priority_is_one_for_all_or_one_each(alphabet):
    engine, params = alphabet._model.engine, replace(GREEDY, max_tokens=1, n=2)
    alphabet.generate(["j", "k"], params, use_tqdm=False, priority=[3, -1])
    alphabet.generate(["j", "k"], params, use_tqdm=False, priority=7)
    assert [r.priority for r in engine.requests] == [3, 3, -1, -1, 7, 7, 7, 7]


@pytest.mark.parametrize(
    ("priority", "cure"), [([1], "1 priorities .* 2 prompts"), (10**400, "1000"), (0.5, "priority")]
)
def test_a_priority_that_is_none_is_refused(alphabet, priority, cure):
    with pytest.raises(InvalidRequest, match=cure):
        alphabet.generate(["j", "k"], GREEDY, use_tqdm=False, priority=priority)
    alphabet._model.engine.wait_idle()


@pytest.mark.parametrize("auto", ["auto", -1, None])
def test_max_model_len_auto_is_what_fits(monkeypatch, auto):
    def refuse(_, engine):
        raise ConfigError(repr(engine))

    monkeypatch.setattr(duetjax.llm, "load", refuse)
    with pytest.raises(ConfigError, match="max_model_len=None"):
        LLM(max_model_len=auto)
