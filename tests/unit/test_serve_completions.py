"""POST /v1/completions over a real socket, mostly through the official client."""

from dataclasses import replace

import openai
import pytest
from fake_engine import END, continuation
from serve_setup import GREEDY, MODEL, serving, write_tokenizer

from duetjax.config import SamplingParams


@pytest.fixture(autouse=True)
def engine_is_idle_afterwards(served):
    yield
    served.engine.wait_idle()


def complete(http, **body):
    return http.post("/v1/completions", json={"model": MODEL, "prompt": "abc"} | body)


def test_a_prompt_is_continued_for_16_tokens_unless_asked_otherwise(client):
    completion = client.completions.create(model=MODEL, prompt="a")
    assert completion.choices[0].text == continuation("a", 16)
    assert completion.choices[0].finish_reason == "length"
    assert completion.choices[0].logprobs is None
    assert completion.usage.prompt_tokens == 1
    assert completion.usage.completion_tokens == 16
    assert completion.usage.total_tokens == 17
    assert completion.usage.prompt_tokens_details.cached_tokens == 0


def test_the_response_has_the_shape_of_openai(http):
    body = complete(http, max_tokens=2).json()
    assert body.keys() == {"id", "object", "created", "model", "choices", "usage"}
    assert body["id"].startswith("cmpl-")
    assert (body["object"], body["model"]) == ("text_completion", MODEL)
    assert body["choices"] == [
        {"index": 0, "text": "de", "logprobs": None, "finish_reason": "length"}
    ]


def test_the_end_of_sequence_token_ends_a_completion_and_is_counted_but_not_shown(client):
    completion = client.completions.create(model=MODEL, prompt="w")
    assert completion.choices[0].text == "xyz"
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage.completion_tokens == 4


def test_ignore_eos_goes_on_to_max_tokens(client):
    completion = client.completions.create(
        model=MODEL, prompt="y", max_tokens=4, extra_body={"ignore_eos": True}
    )
    assert completion.choices[0].text == "zab"
    assert completion.choices[0].finish_reason == "length"
    assert completion.usage.completion_tokens == 4


def test_a_stop_token_id_ends_the_text_before_it(http):
    choice = complete(http, stop_token_ids=[ord("g")]).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("def", "stop")


@pytest.mark.parametrize("stop", ["ghi", ["zzz", "ghi"], ["hi", "ghi"]])
def test_a_stop_string_across_tokens_ends_the_text_before_it_and_aborts_the_rest(
    http, served, stop
):
    aborted = len(served.engine.aborted)
    choice = complete(http, stop=stop, max_tokens=100, ignore_eos=True).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("def", "stop")
    assert len(served.engine.aborted) == aborted + 1


def test_a_stop_string_can_be_kept_in_the_text(http):
    body = complete(http, stop="fg", include_stop_str_in_output=True).json()
    assert body["choices"][0]["text"] == "defg"


def test_n_choices_are_seeded_with_consecutive_seeds(client):
    completion = client.completions.create(
        model=MODEL, prompt="a", n=3, seed=5, temperature=0.5, max_tokens=6
    )
    assert [c.index for c in completion.choices] == [0, 1, 2]
    assert [c.text for c in completion.choices] == [
        continuation("a", 6, 0.5, seed) for seed in (5, 6, 7)
    ]
    assert completion.usage.prompt_tokens == 1
    assert completion.usage.completion_tokens == 18


def test_without_a_seed_each_request_draws_its_own(http):
    texts = {
        complete(http, temperature=1, max_tokens=8).json()["choices"][0]["text"] for _ in range(12)
    }
    assert 1 < len(texts) <= 5
    assert texts <= {continuation("c", 8, 1.0, seed) for seed in range(5)}


def test_the_largest_seed_wraps_instead_of_failing(http):
    body = complete(http, seed=2**63 - 1, n=2, temperature=1).json()
    assert len(body["choices"]) == 2


def test_a_list_of_prompts_gives_n_choices_for_each_in_order(client):
    completion = client.completions.create(model=MODEL, prompt=["a", "kl"], n=2, max_tokens=2)
    assert [c.text for c in completion.choices] == ["bc", "bc", "mn", "mn"]
    assert [c.index for c in completion.choices] == [0, 1, 2, 3]
    assert completion.usage.prompt_tokens == 3


@pytest.mark.parametrize("prompt", [[97, 98], [[97, 98]]])
def test_token_ids_are_a_prompt(client, prompt):
    completion = client.completions.create(model=MODEL, prompt=prompt, max_tokens=2)
    assert completion.choices[0].text == "cd"
    assert completion.usage.prompt_tokens == 2


def test_several_lists_of_token_ids_are_several_prompts(client):
    completion = client.completions.create(model=MODEL, prompt=[[97], [107]], max_tokens=2)
    assert [c.text for c in completion.choices] == ["bc", "lm"]


@pytest.mark.parametrize("prompt", ["ab", [97, 98]])
def test_echo_puts_the_prompt_before_the_text(client, prompt):
    completion = client.completions.create(model=MODEL, prompt=prompt, echo=True, max_tokens=2)
    assert completion.choices[0].text == "abcd"


def test_echo_repeats_each_prompt_before_its_own_choices(client):
    completion = client.completions.create(
        model=MODEL, prompt=["ab", "x"], echo=True, n=2, max_tokens=1
    )
    assert [c.text for c in completion.choices] == ["abc", "abc", "xy", "xy"]


def test_token_ids_are_returned_on_demand(http):
    choice = complete(http, prompt="y", return_token_ids=True).json()["choices"][0]
    assert choice["token_ids"] == [ord("z"), END]
    assert choice["prompt_token_ids"] == [ord("y")]


def test_max_completion_tokens_is_max_tokens_by_another_name(http):
    for body in ({"max_completion_tokens": 3}, {"max_tokens": 3, "max_completion_tokens": 3}):
        assert complete(http, **body).json()["choices"][0]["text"] == "def"


def test_two_different_limits_are_refused(http):
    response = complete(http, max_tokens=3, max_completion_tokens=4)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "max_tokens"


def test_null_is_the_same_as_left_out(http):
    nulls = dict.fromkeys(
        ("max_tokens", "max_completion_tokens", "temperature", "seed", "stop", "n", "stream",
         "stream_options", "logprobs", "top_p", "logit_bias", "user", "echo", "suffix",
         "response_format", "tools", "ignore_eos", "stop_token_ids", "no_such_field")
    )  # fmt: skip
    response = complete(http, **nulls)
    assert response.json()["choices"][0]["text"] == continuation("c", 16)
    assert "x-duetjax-ignored" not in response.headers


def test_every_sampling_parameter_reaches_the_engine(http, served):
    asked = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1,
        "frequency_penalty": -0.5, "presence_penalty": 2, "logit_bias": {"100": 1.5, "99": -3},
        "max_tokens": 7, "min_tokens": 3, "seed": 11, "stop": ["!", "?"], "stop_token_ids": [33],
        "ignore_eos": True, "include_stop_str_in_output": True, "logprobs": 2,
    }  # fmt: skip
    assert complete(http, **asked).status_code == 200
    new = served.engine.requests[-1]
    assert new.sampling == SamplingParams(**asked)
    assert new.sampling.biases == ((99, -3.0), (100, 1.5))
    assert new.stop_ids == (33,)


def test_what_is_left_out_is_as_in_the_api(http, served):
    complete(http, seed=1, max_tokens=16)
    assert served.engine.requests[-1].sampling == replace(GREEDY, seed=1, max_tokens=16)


def test_a_bias_changes_what_is_sampled(http):
    assert (
        complete(http, logit_bias={"33": 100}, max_tokens=3).json()["choices"][0]["text"] == "!!!"
    )
    banned = complete(http, logit_bias={"101": -100}, max_tokens=3).json()
    assert banned["choices"][0]["text"] == "dab"


def test_neither_the_end_token_nor_a_stop_string_counts_before_min_tokens(http):
    choice = complete(http, prompt="y", min_tokens=3, max_tokens=30).json()["choices"][0]
    assert choice["text"] == "za" + continuation("a", 25)
    choice = complete(http, stop=["d", "hi"], min_tokens=1).json()["choices"][0]
    assert choice["text"] == "defg"
    choice = complete(http, stop=["e"], min_tokens=1).json()["choices"][0]
    assert choice["text"] == "d"


def test_min_tokens_above_the_usual_limit_is_refused_with_the_numbers(http):
    error = complete(http, min_tokens=17).json()["error"]
    assert error["param"] == "min_tokens"
    assert "max_tokens 16" in error["message"]


def test_values_that_change_nothing_are_accepted(http):
    neutral = {
        "top_p": 1, "top_k": -1, "min_p": 0.0, "frequency_penalty": 0, "presence_penalty": 0.0,
        "repetition_penalty": 1.0, "logit_bias": {}, "min_tokens": 0, "best_of": 1, "suffix": "",
        "response_format": {"type": "text"}, "tools": [], "tool_choice": "none", "user": "me",
    }  # fmt: skip
    response = complete(http, **neutral, max_tokens=1)
    assert response.json()["choices"][0]["text"] == "d"
    assert "x-duetjax-ignored" not in response.headers


def test_unknown_fields_are_accepted_and_named_in_a_header(http):
    fields = {"no_such_field": 1, "bad\r\nset-cookie: x": 2}
    response = complete(http, **fields, stream=True, stream_options={"other": 3})
    assert response.status_code == 200
    assert response.headers["x-duetjax-ignored"] == "no_such_field, ?, stream_options.other"
    assert "set-cookie" not in response.headers


def test_generation_config_gives_the_defaults_that_a_request_leaves_open(tmp_path):
    write_tokenizer(tmp_path)
    with (
        serving(tmp_path, defaults=SamplingParams(max_tokens=3, top_p=0.5)) as served,
        served.http() as http,
    ):
        assert complete(http, seed=2).json()["choices"][0]["text"] == continuation("c", 3, 1.0, 2)
        asked = complete(http, seed=2, max_tokens=1, temperature=0).json()
        assert asked["choices"][0]["text"] == "d"
        complete(http, top_p=1)
        assert [r.sampling.top_p for r in served.engine.requests] == [0.5, 0.5, 1.0]


def test_the_default_number_of_tokens_is_cut_to_what_fits(http):
    body = complete(http, prompt="a" * 250).json()
    assert body["usage"]["completion_tokens"] == 6


def test_a_prompt_that_leaves_exactly_room_for_max_tokens_is_served(http):
    assert complete(http, prompt="a" * 253, max_tokens=3).json()["choices"][0]["text"] == "bcd"


@pytest.mark.parametrize(
    ("length", "max_tokens", "param"),
    [(253, 4, "max_tokens"), (256, None, "prompt"), (257, 1, "prompt"), (2048, 1, "prompt")],
)
def test_a_request_longer_than_the_context_is_refused_with_the_numbers(
    http, length, max_tokens, param
):
    response = complete(http, prompt="a" * length, max_tokens=max_tokens)
    error = response.json()["error"]
    assert response.status_code == 400
    assert (error["code"], error["param"]) == ("context_length_exceeded", param)
    assert f"{length} tokens" in error["message"]
    assert "256" in error["message"]


def test_a_text_too_long_to_fit_is_refused_before_it_is_tokenised(http):
    error = complete(http, prompt="a" * 2049).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "2049 characters" in error["message"]


def test_an_unknown_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt-5", prompt="a")
    assert caught.value.code == "model_not_found"
    assert MODEL in caught.value.message


def test_an_alias_is_served_under_its_own_name(client):
    assert client.completions.create(model="abc/alias", prompt="a").model == "abc/alias"


def test_a_bad_parameter_is_a_typed_error_in_the_client(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="a", temperature=2.5)
    assert caught.value.param == "temperature"
    assert caught.value.code == "invalid_value"
    assert caught.value.type == "invalid_request_error"
