"""x-duetjax-timings: where a request's time went, for the clients who ask."""

import json

import pytest
from serve_setup import MODEL, events

ROUTES = {
    "/v1/completions": {"prompt": "abc"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "abc"}]},
}
KEYS = ["index", "queue_ms", "prefill_ms", "decode_ms", "ttft_ms", "launches"]


def post(http, route, asked="1", **changes):
    body = {"model": MODEL, "max_tokens": 4} | ROUTES[route] | changes
    headers = {} if asked is None else {"x-duetjax-timings": asked}
    return http.post(route, json=body, headers=headers)


def chunks(response):
    *chunks, done = events(response.content)
    assert done == "[DONE]"
    return [json.loads(chunk) for chunk in chunks]


def check(timings, count, launches=4):
    assert [each["index"] for each in timings] == list(range(count))
    for each in timings:
        assert list(each) == KEYS
        assert min(each["queue_ms"], each["prefill_ms"], each["decode_ms"]) >= 0
        assert each["queue_ms"] + each["prefill_ms"] <= each["ttft_ms"] + 0.01
        assert each["decode_ms"] > 0
        assert each["launches"] == launches


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("n", [1, 3])
def test_an_answer_has_them_by_choice(http, route, n):
    body = post(http, route, n=n).json()
    assert len(body["choices"]) == n
    check(body["duetjax_timings"], n)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_has_them_in_a_last_event_without_choices(http, route, n):
    *others, last = chunks(post(http, route, n=n, stream=True))
    assert last["choices"] == []
    assert "usage" not in last
    check(last["duetjax_timings"], n)
    assert [each for each in others if "duetjax_timings" in each] == []


def test_with_usage_they_come_together(http):
    usage = {"include_usage": True}
    *_, before, last = chunks(post(http, "/v1/completions", stream=True, stream_options=usage))
    assert before["choices"]
    assert last["usage"]["completion_tokens"] == 4
    check(last["duetjax_timings"], 1)


def test_of_a_stop_string_nobody_knows_the_launches(http):
    body = post(http, "/v1/completions", stop="e", max_tokens=9).json()
    check(body["duetjax_timings"], 1, launches=None)


@pytest.mark.parametrize("asked", [None, "0"])
@pytest.mark.parametrize("stream", [False, True])
def test_nobody_is_told_unasked(http, asked, stream):
    response = post(http, "/v1/completions", asked, stream=stream)
    assert response.status_code == 200
    assert b"timings" not in response.content


@pytest.mark.parametrize("asked", ["", "2", "true", "1, 1", "\xb9"])
def test_anything_else_is_400_and_names_the_header(served, http, asked):
    before = list(served.engine.submitted)
    body = {"model": MODEL, "prompt": "a"}
    headers = [(b"x-duetjax-timings", asked.encode("latin-1"))]
    response = http.post("/v1/completions", json=body, headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "x-duetjax-timings"
    assert served.engine.submitted == before
