"""Request bodies by themselves: what any JSON object is turned into."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duetjax.config import InvalidRequest
from duetjax.serve.limits import Limits
from duetjax.serve.protocol import NEUTRAL, ChatBody, CompletionBody, ignored_header

SCALAR = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
)
FLAT = (
    SCALAR | st.lists(SCALAR, max_size=3) | st.dictionaries(st.text(max_size=5), SCALAR, max_size=3)
)
JSON = FLAT | st.lists(FLAT, max_size=3)
FIELDS = sorted({*CompletionBody.model_fields, *ChatBody.model_fields, *NEUTRAL})


@pytest.mark.parametrize("kind", [CompletionBody, ChatBody])
@settings(deadline=None, max_examples=60)
@given(
    body=st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=8), JSON, max_size=5),
    is_complete=st.booleans(),
)
def test_any_object_is_taken_or_refused_by_the_name_of_a_field(kind, body, is_complete):
    needed = {"model": "m", "prompt": "a", "messages": [{"role": "user", "content": "a"}]}
    given_body = body | needed if is_complete else body
    parsed, fault = None, None
    try:
        parsed = kind.parse(given_body, Limits())
    except InvalidRequest as error:
        fault = error
    if parsed is not None:
        assert parsed.model == given_body["model"]
        assert 1 <= parsed.n <= 8
        assert all(isinstance(v, str) and v.isprintable() for v in ignored_header(parsed).values())
        return
    assert re.split(r"[.\[]", fault.param)[0] in FIELDS
    assert "\n" not in str(fault)
    assert len(str(fault)) < 300


@settings(deadline=None, max_examples=50)
@given(
    prompts=st.lists(st.text(), min_size=1, max_size=32)
    | st.lists(st.lists(st.integers(), min_size=1, max_size=5), min_size=1, max_size=32)
)
def test_a_list_of_prompts_is_kept_as_it_is(prompts):
    parsed = CompletionBody.parse({"model": "m", "prompt": prompts}, Limits()).prompt
    assert [p if isinstance(p, str) else list(p) for p in parsed] == prompts


def test_many_unknown_fields_are_cut_to_a_header_of_bounded_length():
    body = {f"field-{'x' * 50}{i}": i for i in range(5000)}
    parsed = CompletionBody.parse({"model": "m", "prompt": "a"} | body, Limits())
    assert ignored_header(parsed)["x-duetjax-ignored"].count(",") == 15


def test_many_wrong_messages_are_refused_at_the_first():
    with pytest.raises(InvalidRequest) as caught:
        ChatBody.parse({"model": "m", "messages": [{"role": "x"}] * 1024}, Limits())
    assert caught.value.param == "messages[0].role"


@pytest.mark.parametrize(
    ("message", "is_taken"),
    [
        ({"content": "a", "tool_calls": []}, True),
        ({"content": "a", "tool_calls": None}, True),
        ({"content": "a", "tool_calls": {}}, False),
        ({"content": "a", "tool_calls": 0}, False),
        ({"content": [{"type": "text", "text": "a", "more": 1}]}, True),
        ({"content": [{"type": 5, "text": "a"}]}, False),
    ],
    ids=str,
)
def test_what_a_message_may_hold(message, is_taken):
    body = {"model": "m", "messages": [{"role": "assistant"} | message]}
    if is_taken:
        assert list(ChatBody.parse(body, Limits()).unknown_fields()) == []
    else:
        with pytest.raises(InvalidRequest):
            ChatBody.parse(body, Limits())
