"""An engine on a device made of numbers, through the Python API: no weights and no jax."""

import json
import shutil
from pathlib import Path

import pytest
from serve_setup import write_tokenizer

from duetjax import LLM, SamplingParams
from duetjax.config import ConfigError, DuetJAXError, PolicyName
from duetjax.profile_files import Kind, read_hardware_profile, shipped, shipped_file
from duetjax.text.tokenizer import Tokenizer

DEMO = Path(__file__).parents[2] / "checkpoints" / "demo"
SMALL_FILES = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    "chat_template.jinja",
)
QUICK = {"device": "sim", "sim_step_ms": (0.01, 0.01)}
SEEDED = [SamplingParams(seed=seed, max_tokens=None) for seed in range(8)]
WORDS = ["Prefill", "decode", "page", "slot", "lane", "split", "step", "row"]


def answers(params=SEEDED, prompts=WORDS, **settings):
    """Text, number of tokens and finish of each."""
    with LLM(**{**QUICK, **settings}) as llm:
        outputs = [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]
    return [(out.text, len(out.token_ids), out.finish_reason) for out in outputs]


@pytest.fixture(scope="module")
def expected():
    return answers()


def refusal(**settings):
    with pytest.raises(ConfigError) as caught:
        LLM(**settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What is answered.


def test_answers_are_words_of_the_tokenizer_and_end_by_themselves(expected):
    assert {finish for _, _, finish in expected} == {"stop"}
    for text, num_tokens, _ in expected:
        words = text.split(" ")[1:]
        assert len(words) == num_tokens - 1  # the end of the sequence says nothing
        assert all(word.isalpha() for word in words)


def test_a_seed_has_its_answer_whatever_the_prompt_policy_or_noise(expected):
    assert answers(prompts=["x" * n for n in range(1, 9)]) == expected
    assert answers(sim_noise=1.0, seed=5) == expected
    assert answers(max_num_seqs=2, enable_prefix_caching=False) == expected
    assert answers(deterministic=True) == expected
    assert answers(SamplingParams(max_tokens=None)) != expected


@pytest.mark.parametrize("policy", PolicyName)
def test_every_policy_works(expected, policy):
    split = {"split": (40, 92)} if policy == PolicyName.STATIC_SPLIT else {}
    assert answers(policy=policy, hardware_profile="h200-sxm", **split) == expected


def test_a_profile_s_times_need_no_script(expected):
    assert answers(sim_step_ms=None, hardware_profile="h200-sxm") == expected


def test_max_tokens_ignore_eos_and_stop_strings_hold(expected):
    text, *_ = expected[0]
    third = text.split(" ")[3]
    [cut] = answers(SamplingParams(seed=0, max_tokens=5), WORDS[:1])
    assert cut == (" " + " ".join(text.split(" ")[1:6]), 5, "length")
    [stopped] = answers(SamplingParams(seed=0, max_tokens=None, stop=[f" {third}"]), WORDS[:1])
    assert stopped[0] == text[: text.index(f" {third}")]
    assert stopped[2] == "stop"
    [(_, num_tokens, finish)] = answers(
        SamplingParams(seed=0, max_tokens=2000, ignore_eos=True), WORDS[:1]
    )
    assert (num_tokens, finish) == (2000, "length")


def test_logprobs_are_zero():
    with LLM(**QUICK) as llm:
        [output] = llm.generate("x", SamplingParams(seed=1, max_tokens=3, logprobs=2))
    assert [score.logprob for score in output.outputs[0].logprobs] == [0.0] * 3


def test_a_tokenizer_without_words_gives_what_it_can_print(tmp_path):
    write_tokenizer(tmp_path)
    for text, num_tokens, _ in answers(tokenizer=str(tmp_path)):
        assert text.isascii()
        assert text.isprintable()
        assert len(text) == num_tokens - 1


def test_without_a_tokenizer_tokens_are_any_but_the_end():
    params = SamplingParams(seed=1, max_tokens=400)
    with LLM("llama-3.1-8b", **QUICK) as llm:
        [output] = llm.generate([5, 6, 7], params, use_tqdm=False)
    tokens = output.outputs[0].token_ids
    assert max(tokens) > 64_000
    assert all(0 <= token < 128_256 for token in tokens)


# Which model.


def test_a_folder_without_weights_is_enough(expected, tmp_path):
    for name in SMALL_FILES:
        shutil.copy(DEMO / name, tmp_path)
    assert answers(model=str(tmp_path)) == expected


def test_a_word_that_ends_answers_is_no_ordinary_one(expected, tmp_path):
    for name in SMALL_FILES:
        shutil.copy(DEMO / name, tmp_path)
    [first] = Tokenizer.from_folder(tmp_path).encode(" the", add_special_tokens=False)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [first, 1]}))
    params = [SamplingParams(seed=seed, max_tokens=None) for seed in range(64)]
    found = answers(params, ["x"] * 64, model=str(tmp_path))
    assert [size for _, size, _ in found[: len(expected)]] == [size for _, size, _ in expected]
    assert all(" the " not in f"{text} " for text, _, _ in found)


def test_a_preset_with_another_tokenizer_is_enough(expected):
    assert answers(model="llama-3.1-8b", tokenizer=str(DEMO)) == expected


def test_a_load_format_that_is_none_is_still_refused():
    assert "--load-format nonsense" in refusal(load_format="nonsense", **QUICK)


# What is refused.


def test_what_takes_its_times_from_a_profile_names_those_there_are():
    message = refusal(device="sim")
    assert "--hardware-profile" in message
    assert all(name in message for name in shipped(Kind.HARDWARE))


def test_a_script_is_no_profile_for_a_policy_that_foretells():
    assert "--policy duet" in refusal(policy="duet", **QUICK)


def test_a_model_that_does_not_fit_the_device_names_a_flag():
    message = refusal(model="qwen3-14b", hardware_profile="rtx-4090", **QUICK)
    assert "--gpu-memory-utilization" in message


def test_a_context_longer_than_the_model_s_names_the_flag():
    assert "--max-model-len 4096" in refusal(max_model_len=5000, **QUICK)


def test_more_slots_than_there_are_name_the_flag():
    slots = {"max_num_seqs": 65_537, "max_num_batched_tokens": 70_000}
    assert "--max-num-seqs 65537" in refusal(**slots, **QUICK)


# What it stands on.


def test_a_script_without_a_profile_has_room_for_every_slot():
    with LLM(max_num_seqs=8, **QUICK) as llm:
        stats = llm._model.engine.stats()
    assert stats.pages_total == 8 * 4096 // 64


def test_a_script_with_a_profile_has_its_memory(tmp_path):
    document = read_hardware_profile(shipped_file(Kind.HARDWARE, "l40s")).to_json()
    document["memory_bytes"]["value"] = 4e8
    (tmp_path / "small.json").write_text(json.dumps(document))
    with LLM(hardware_profile=tmp_path / "small.json", **QUICK) as llm:
        stats = llm._model.engine.stats()
    assert 0 < stats.pages_total < 64 * 4096 // 64


def test_nothing_is_kept_of_what_simulated_launches_teach(tmp_path, monkeypatch):
    monkeypatch.setenv("DUETJAX_CACHE_DIR", str(tmp_path))
    answers(policy="aggregated-slo", hardware_profile="h200-sxm")
    assert list(tmp_path.rglob("*")) == []


def test_a_notice_says_that_tokens_are_invented(caplog):
    with LLM(hardware_profile="h200-sxm", **QUICK) as llm:
        notice = llm._model.notice
    assert notice == "simulated h200-sxm: tokens are invented"
    assert notice in caplog.text


def test_a_preset_without_a_tokenizer_cannot_be_asked_in_words():
    with LLM("llama-3.1-8b", **QUICK) as llm, pytest.raises(DuetJAXError, match="no tokenizer"):
        llm.generate("x")
