"""Logprobs in OpenAI's shapes, whole and streamed, on both routes.

The alphabet engine gives the sampled token -0.5 and the i-th after it in the byte order -0.5 - i.
"""

import itertools
import json
import math

import pytest
from fake_engine import END
from fake_executor import top_tokens
from serve_setup import MODEL, events

from duetjax.policy.request import TokenLogprob
from duetjax.serve.call import ScoredToken
from duetjax.serve.logprobs import chat_logprobs, completion_logprobs

SMILE = "\U0001f600"


@pytest.fixture(autouse=True)
def engine_is_idle_afterwards(served):
    yield
    served.engine.wait_idle()


def complete(http, **body):
    given = {"model": MODEL, "prompt": "a", "max_tokens": 3} | body
    return http.post("/v1/completions", json=given)


def chat(http, **body):
    given = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "max_tokens": 3}
    return http.post("/v1/chat/completions", json=given | body)


def chunks(response):
    """The choices of a stream's chunks."""
    *data, done = events(response.content)
    assert done == "[DONE]"
    return [json.loads(chunk)["choices"][0] for chunk in data]


def letters(*entries):
    """Chat entries whose texts are one letter each."""
    return [{"token": t, "logprob": lp, "bytes": [ord(t)]} for t, lp in entries]


def test_a_completion_has_its_tokens_their_logprobs_and_offsets(http):
    logprobs = complete(http, logprobs=2).json()["choices"][0]["logprobs"]
    assert logprobs == {
        "tokens": ["b", "c", "d"],
        "token_logprobs": [-0.5, -0.5, -0.5],
        "top_logprobs": [{"b": -0.5, "c": -1.5}, {"c": -0.5, "d": -1.5}, {"d": -0.5, "e": -1.5}],
        "text_offset": [0, 1, 2],
    }


def test_without_alternatives_the_sampled_token_is_still_among_them(http):
    logprobs = complete(http, logprobs=0).json()["choices"][0]["logprobs"]
    assert logprobs["top_logprobs"] == [{"b": -0.5}, {"c": -0.5}, {"d": -0.5}]


def test_an_answer_has_an_entry_for_each_token_with_its_bytes(http):
    logprobs = chat(http, logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]
    first, *_ = logprobs["content"]
    assert logprobs.keys() == {"content", "refusal"}
    assert logprobs["refusal"] is None
    assert [entry["token"] for entry in logprobs["content"]] == ["a", "b", "c"]
    assert {k: v for k, v in first.items() if k != "top_logprobs"} == letters(("a", -0.5))[0]
    assert first["top_logprobs"] == letters(("a", -0.5), ("b", -1.5))


def test_logprobs_of_an_answer_have_no_alternatives_unless_asked_for(http):
    for extra in ({}, {"top_logprobs": 0}):
        logprobs = chat(http, logprobs=True, **extra).json()["choices"][0]["logprobs"]
        assert [entry["top_logprobs"] for entry in logprobs["content"]] == [[], [], []]


def test_twenty_alternatives_are_the_most(http):
    [entry] = chat(http, logprobs=True, top_logprobs=20, max_tokens=1).json()["choices"][0][
        "logprobs"
    ]["content"]
    assert [(top["bytes"][0], top["logprob"]) for top in entry["top_logprobs"]] == list(
        top_tokens(ord("a"), 20)
    )


def test_the_official_client_reads_logprobs(client):
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "x"}], max_tokens=2,
        logprobs=True, top_logprobs=1,
    )  # fmt: skip
    assert [e.top_logprobs[0].bytes for e in answer.choices[0].logprobs.content] == [[97], [98]]
    completion = client.completions.create(model=MODEL, prompt="a", max_tokens=2, logprobs=1)
    assert completion.choices[0].logprobs.tokens == ["b", "c"]


@pytest.mark.parametrize("ask", [complete, chat])
def test_logprobs_that_are_not_asked_for_are_null(http, ask):
    fields = {} if ask is complete else {"logprobs": False}
    assert ask(http, **fields).json()["choices"][0]["logprobs"] is None
    assert all(c["logprobs"] is None for c in chunks(ask(http, stream=True, **fields)))


def test_each_choice_has_its_own(http):
    choices = complete(http, logprobs=0, n=2, seed=0, temperature=1, prompt=["a", "k"]).json()
    tokens = ["".join(c["logprobs"]["tokens"]) for c in choices["choices"]]
    assert tokens == [c["text"] for c in choices["choices"]] == ["bcd", "ceg", "lmn", "moq"]


def joined(parts):
    """The logprobs of a stream's chunks as those of a whole response."""
    parts = [part for part in parts if part is not None]
    return {key: [v for part in parts for v in part[key] or []] for key in parts[0]}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"stop": "de", "max_tokens": 9},
        {"stop": ["dz", "efgq"], "max_tokens": 9},
        {"stop": "de", "include_stop_str_in_output": True, "max_tokens": 9},
        {"logit_bias": {"240": 100}, "max_tokens": 5},
        {"stop_token_ids": [ord("e")], "max_tokens": 9},
    ],
    ids=str,
)
def test_a_stream_has_the_same_logprobs_as_the_whole(http, fields):
    whole = complete(http, logprobs=1, **fields).json()["choices"][0]
    parts = chunks(complete(http, logprobs=1, stream=True, **fields))
    assert joined(part["logprobs"] for part in parts) == whole["logprobs"]
    assert "".join(part["text"] for part in parts) == whole["text"]
    fields = fields | {"logprobs": True, "top_logprobs": 1}
    whole = chat(http, **fields).json()["choices"][0]
    parts = chunks(chat(http, stream=True, **fields))
    content = joined(part["logprobs"] for part in parts)["content"]
    assert content == whole["logprobs"]["content"]
    assert (parts[0]["logprobs"], parts[-1]["logprobs"]) == (None, None)


def test_logprobs_of_held_back_text_come_with_it(http):
    parts = chunks(complete(http, logprobs=0, stream=True, stop=["cdx"], max_tokens=4))
    told = [(p["text"], p["logprobs"] and p["logprobs"]["tokens"]) for p in parts]
    assert told == [("b", ["b"]), ("cde", ["c", "d", "e"])]
    offsets = [o for p in parts for o in p["logprobs"]["text_offset"]]
    assert offsets == [0, 1, 2, 3]


def test_tokens_of_a_stop_string_have_no_entries(http):
    choice = complete(http, logprobs=1, stop="de", max_tokens=9).json()["choices"][0]
    assert choice["text"] == "bc"
    assert choice["logprobs"]["tokens"] == ["b", "c"]
    choice = complete(
        http, logprobs=1, stop="de", max_tokens=9, include_stop_str_in_output=True
    ).json()["choices"][0]
    assert choice["logprobs"]["tokens"] == list(choice["text"]) == list("bcde")


def test_the_token_that_ends_a_completion_has_no_entry(http):
    choice = complete(http, logprobs=1, prompt="y").json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("z", "stop")
    assert choice["logprobs"]["tokens"] == ["z"]
    empty = complete(http, logprobs=1, prompt="z").json()["choices"][0]
    assert empty["logprobs"] == {
        "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []
    }  # fmt: skip
    answer = chat(http, logprobs=True, logit_bias={str(END): 100}).json()["choices"][0]
    assert answer["logprobs"] == {"content": [], "refusal": None}


def test_a_special_token_inside_the_text_has_an_entry_with_its_name(http):
    asked = {"prompt": "y", "ignore_eos": True, "max_tokens": 3, "logit_bias": {str(END): 100}}
    choice = complete(http, logprobs=0, **asked).json()["choices"][0]
    assert choice["text"] == ""
    assert choice["logprobs"]["tokens"] == ["<|end|>"] * 3
    assert choice["logprobs"]["text_offset"] == [0, 0, 0]


def test_token_ids_count_all_tokens_where_logprobs_count_those_of_the_text(http):
    fields = {"logprobs": 0, "return_token_ids": True, "stop": "de", "max_tokens": 9}
    choice = complete(http, **fields).json()["choices"][0]
    assert bytes(choice["token_ids"]) == b"bcde"
    assert choice["logprobs"]["tokens"] == ["b", "c"]


def scored(data, **score):
    """Tokens of a text's bytes, each character at one offset."""
    starts = itertools.accumulate(b & 0xC0 != 0x80 for b in data)
    return [
        ScoredToken(byte, start - 1, TokenLogprob(**{"logprob": -1.0} | score))
        for byte, start in zip(data, starts, strict=True)
    ]


def test_tokens_inside_a_character_are_spelled_in_escapes_and_their_bytes_are_exact(served):
    tokenizer, tokens = served.context.service.tokenizer, scored(f"a{SMILE}b".encode())
    content = chat_logprobs(tokenizer, tokens)["content"]
    assert [e["token"] for e in content] == ["a", "\\xf0", "\\x9f", "\\x98", "\\x80", "b"]
    assert bytes(b for e in content for b in e["bytes"]).decode() == f"a{SMILE}b"
    logprobs = completion_logprobs(tokenizer, tokens)
    assert logprobs["tokens"] == [
        "a", "bytes:\\xf0", "bytes:\\x9f", "bytes:\\x98", "bytes:\\x80", "b"
    ]  # fmt: skip
    assert logprobs["text_offset"] == [0, 1, 1, 1, 1, 2]


def test_ids_without_a_token_are_named_by_number_and_have_no_bytes(served):
    tokens = scored(b"a", top=((97, -0.5), (258, -1.0), (259, -2.0)))
    [entry] = chat_logprobs(served.context.service.tokenizer, tokens)["content"]
    assert entry["top_logprobs"][1:] == [
        {"token": "token_id:258", "logprob": -1.0, "bytes": None},
        {"token": "token_id:259", "logprob": -2.0, "bytes": None},
    ]
    [ranking] = completion_logprobs(served.context.service.tokenizer, tokens)["top_logprobs"]
    assert list(ranking) == ["a", "token_id:258", "token_id:259"]


def test_what_is_impossible_has_a_number_that_json_can_carry(served):
    tokens = scored(b"a", logprob=-math.inf, top=((98, -0.0), (99, -math.inf)))
    tokenizer = served.context.service.tokenizer
    [entry] = chat_logprobs(tokenizer, tokens)["content"]
    assert entry["logprob"] == -9999.0
    assert [top["logprob"] for top in entry["top_logprobs"]] == [0, -9999.0]
    assert completion_logprobs(tokenizer, tokens)["top_logprobs"] == [
        {"b": 0, "c": -9999.0, "a": -9999.0}
    ]
