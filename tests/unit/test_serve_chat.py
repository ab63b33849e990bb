"""POST /v1/chat/completions over a real socket."""

import pytest
from fake_engine import END, continuation
from serve_setup import MODEL, serving, write_tokenizer

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(autouse=True)
def engine_is_idle_afterwards(served):
    yield
    served.engine.wait_idle()


def chat(http, **body):
    given = {"model": MODEL, "messages": HELLO, "max_tokens": 3} | body
    return http.post("/v1/chat/completions", json=given)


def prompt_of(http, messages, **body):
    """The prompt that the engine was given, as text."""
    response = chat(http, messages=messages, return_token_ids=True, **body)
    return bytes(response.json()["prompt_token_ids"]).decode()


def test_a_conversation_is_answered(client):
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=5)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == "abcde"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.prompt_tokens == len("[user]hello>")
    assert answer.usage.completion_tokens == 5


def test_the_response_has_the_shape_of_openai(http):
    body = chat(http).json()
    assert body.keys() == {"id", "object", "created", "model", "choices", "usage"}
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "abc"},
            "logprobs": None,
            "finish_reason": "length",
        }
    ]


def test_an_answer_may_fill_the_context_where_no_limit_is_given(http):
    body = chat(http, max_tokens=None, ignore_eos=True).json()
    assert body["usage"]["total_tokens"] == 256


def test_an_answer_ends_at_the_end_of_sequence(http):
    body = chat(http, max_tokens=None).json()
    assert body["choices"][0]["message"]["content"] == continuation(">", 26)
    assert body["choices"][0]["finish_reason"] == "stop"


def test_every_role_reaches_the_template_and_developer_is_system(http):
    roles = ("system", "developer", "user", "assistant", "tool")
    messages = [{"role": role, "content": role[0]} for role in roles]
    assert prompt_of(http, messages) == "[system]s[system]d[user]u[assistant]a[tool]t>"


def test_text_parts_are_joined_by_line_feeds(http):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert prompt_of(http, [{"role": "user", "content": parts}]) == "[user]one\ntwo>"


def test_template_arguments_reach_the_template(http):
    asked = prompt_of(http, HELLO, chat_template_kwargs={"enable_thinking": True})
    assert asked == "[user]hello!>"


def test_n_answers_come_with_their_own_seeds(http):
    body = chat(http, n=2, seed=1, temperature=1.0, max_tokens=4).json()
    assert [c["message"]["content"] for c in body["choices"]] == [
        continuation(">", 4, 1.0, seed) for seed in (1, 2)
    ]


def test_token_ids_are_returned_on_demand(http):
    body = chat(http, stop_token_ids=[END], return_token_ids=True).json()
    assert body["choices"][0]["token_ids"] == [97, 98, 99]
    assert bytes(body["prompt_token_ids"]) == b"[user]hello>"


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("hello", "messages"),
        (HELLO * 1025, "messages"),
        ([{"role": "king", "content": "x"}], "messages[0].role"),
        ([{"content": "x"}], "messages[0].role"),
        ([*HELLO, {"role": "user"}], "messages[1].content"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content"),
        (["x"], "messages[0]"),
    ],
)
def test_messages_that_are_none_are_refused_by_name(http, messages, param):
    response = chat(http, messages=messages)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert response.json()["error"]["code"] == "invalid_value"


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "messages[0].content"),
        ({"content": [{"type": "input_audio", "input_audio": {}}]}, "messages[0].content"),
    ],
)
def test_images_and_audio_are_named_as_unsupported(http, message, param):
    error = chat(http, messages=[{"role": "user"} | message]).json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_parameter", param)


def test_a_conversation_longer_than_the_context_is_refused_with_the_numbers(http):
    messages = [{"role": "user", "content": "x" * 300}]
    error = chat(http, messages=messages).json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    assert "307 tokens" in error["message"]


def test_unknown_fields_of_messages_are_named_in_the_header(http):
    response = chat(http, messages=[HELLO[0] | {"mood": "good"}], verbosity="low")
    assert response.headers["x-duetjax-ignored"] == "verbosity, messages[0].mood"


def test_a_folder_without_a_chat_template_says_to_use_completions(tmp_path):
    write_tokenizer(tmp_path, template=None)
    with serving(tmp_path) as served, served.http() as http:
        response = chat(http)
        assert response.status_code == 400
        assert "/v1/completions" in response.json()["error"]["message"]


def test_a_template_that_cannot_render_is_not_answered_with_a_status_that_clients_retry(tmp_path):
    loop = "{% for a in range(4000) %}{% for b in range(4000) %}{% endfor %}{% endfor %}"
    rarely = "{% if messages|length > 8 %}" + loop + "{% endif %}x"
    write_tokenizer(tmp_path, template=rarely)
    with serving(tmp_path) as served, served.http() as http:
        assert chat(http).status_code == 200
        response = chat(http, messages=HELLO * 9)
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "chat_template_failed"


def test_a_control_token_typed_by_a_user_stays_text(http):
    messages = [{"role": "user", "content": "<|end|>"}]
    assert prompt_of(http, messages) == "[user]<|end|>>"


def test_template_arguments_that_the_template_does_not_name_are_refused(http):
    error = chat(http, chat_template_kwargs={"no_such": True}).json()["error"]
    assert error["param"] == "chat_template_kwargs"
