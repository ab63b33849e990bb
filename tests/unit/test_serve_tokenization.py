"""/tokenize, /detokenize and /v1/limits: what clients ask before they send work."""

import pytest
from fake_engine import END, VOCAB_SIZE
from serve_setup import MODEL, serving
from test_serve_errors import error_of

TEXT = "gr\u00fc\u00df dich, \U0001f600"
MESSAGES = [{"role": "user", "content": "hi"}]


def tokenize(http, **body):
    return http.post("/tokenize", json={"model": MODEL} | body)


def detokenize(http, **body):
    return http.post("/detokenize", json={"model": MODEL} | body)


@pytest.mark.parametrize("text", [TEXT, "", "a<|end|>b"])
def test_text_becomes_ids_and_the_same_text_again(http, text):
    said = tokenize(http, prompt=text).json()
    assert said["count"] == len(said["tokens"])
    assert said["max_model_len"] == 256
    assert detokenize(http, tokens=said["tokens"]).json() == {"prompt": text}


def test_ids_are_those_that_completions_see(http):
    said = tokenize(http, prompt=TEXT).json()["tokens"]
    assert said == list(TEXT.encode())
    seen = http.post(
        "/v1/completions",
        json={"model": MODEL, "prompt": TEXT, "max_tokens": 1, "return_token_ids": True},
    ).json()
    assert seen["choices"][0]["prompt_token_ids"] == said


def test_messages_are_written_by_the_template(http):
    told = tokenize(http, messages=MESSAGES).json()["tokens"]
    assert bytes(told) == b"[user]hi>"
    plain = tokenize(http, messages=MESSAGES, add_generation_prompt=False).json()["tokens"]
    assert bytes(plain) == b"[user]hi"
    thinking = {"enable_thinking": True}
    told = tokenize(http, messages=MESSAGES, chat_template_kwargs=thinking).json()["tokens"]
    assert bytes(told) == b"[user]hi!>"


def test_control_tokens_in_messages_stay_text(http):
    messages = [{"role": "user", "content": "<|end|>"}]
    assert END not in tokenize(http, messages=messages).json()["tokens"]
    assert END in tokenize(http, prompt="<|end|>").json()["tokens"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "a", "messages": MESSAGES}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": "a" * (8 * 256 + 1)}, "prompt"),
        ({"messages": [{"role": "nobody", "content": "a"}]}, "messages[0].role"),
        ({"messages": MESSAGES * 1025}, "messages"),
        ({"messages": MESSAGES, "chat_template_kwargs": {"nothing": True}}, None),
    ],
)
def test_what_cannot_be_tokenised_is_refused_by_its_name(http, body, param):
    error = error_of(tokenize(http, **body), 400)
    assert param is None or error["param"] == param


@pytest.mark.parametrize("tokens", [None, "abc", [1.5], [True], [-1], [VOCAB_SIZE], [2**40]])
def test_what_are_no_token_ids_is_refused(http, tokens):
    error_of(detokenize(http, tokens=tokens), 400)


def test_more_ids_than_any_text_has_are_refused(http):
    assert detokenize(http, tokens=[97] * 2048).status_code == 200
    assert error_of(detokenize(http, tokens=[97] * 2049), 400)["param"] == "tokens"


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
def test_unknown_fields_are_named_or_refused_as_elsewhere(folder, http, path):
    body = {"model": MODEL, "prompt": "a", "tokens": [1], "unheard": 1}
    assert "unheard" in http.post(path, json=body).headers["x-duetjax-ignored"]
    with serving(folder, strict_params=True) as strict, strict.http() as strict_http:
        error = error_of(strict_http.post(path, json=body), 400)
    assert error["code"] == "unsupported_parameter"


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
def test_another_model_is_not_found(http, path):
    body = {"model": "other", "prompt": "a", "tokens": [1]}
    assert error_of(http.post(path, json=body), 404)["code"] == "model_not_found"
    assert http.get(path).status_code == 405


# Limits.


def _tool(number):
    return {"type": "function", "function": {"name": f"f{number}"}}


def _schema(schema):
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def over(limits):
    """A request for each limit that goes one beyond it, and the route that it is sent to."""
    body = {"model": MODEL, "prompt": "a", "max_tokens": 1}
    stops, characters = limits["max_stop_strings"], limits["max_stop_characters"]
    biases = {str(token): 1 for token in range(limits["max_logit_bias"] + 1)}
    ids = list(range(limits["max_stop_token_ids"] + 1))
    prompts = limits["max_choices"] // limits["max_n"] + 1
    chat = {"model": MODEL, "messages": MESSAGES, "max_tokens": 1, "logprobs": True}
    large, deep = {"description": "x" * limits["max_schema_bytes"]}, {}
    for _ in range(limits["max_schema_depth"] + 1):
        deep = {"items": deep}
    return {
        "max_model_len": body | {"max_tokens": limits["max_model_len"]},
        "max_prompt_characters": body | {"prompt": "a" * (limits["max_prompt_characters"] + 1)},
        "max_prompts": body | {"prompt": ["a"] * (limits["max_prompts"] + 1)},
        "max_n": body | {"n": limits["max_n"] + 1},
        "max_choices": body | {"prompt": ["a"] * prompts, "n": limits["max_n"]},
        "max_messages": {"model": MODEL, "messages": MESSAGES * (limits["max_messages"] + 1)},
        "max_tools": chat | {"tools": [_tool(i) for i in range(limits["max_tools"] + 1)]},
        "max_schema_bytes": body | {"response_format": _schema(large)},
        "max_schema_depth": body | {"response_format": _schema(deep)},
        "max_stop_strings": body | {"stop": ["x"] * (stops + 1)},
        "max_stop_characters": body | {"stop": "x" * (characters + 1)},
        "max_stop_token_ids": body | {"stop_token_ids": ids},
        "max_logit_bias": body | {"logit_bias": biases},
        "max_logprobs": body | {"logprobs": limits["max_logprobs"] + 1},
        "max_top_logprobs": chat | {"top_logprobs": limits["max_top_logprobs"] + 1},
    }


def test_every_limit_of_a_request_is_one(http):
    limits = http.get("/v1/limits").json()
    beyond = over(limits)
    for name, body in beyond.items():
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        assert http.post(path, json=body).status_code == 400, name
    body = b'{"model":"' + b"x" * limits["max_body_bytes"] + b'"}'
    assert http.post("/v1/completions", content=body).status_code == 413
    assert http.get("/v1/models", headers={f"x-{i}": "" for i in range(101)}).status_code == 400
    elsewhere = {"max_num_seqs", "max_body_bytes", "max_headers", "max_header_bytes"}
    elsewhere |= {name for name in limits if "_queued_" in name or name.endswith(("_s", "_ms"))}
    assert limits.keys() - beyond.keys() == elsewhere
    assert (limits["max_num_seqs"], limits["max_num_queued_reqs"]) == (32, 256)
