"""Crowds whose grammar has not been looked at yet: they share the look, and hold up nobody."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from dictation import ASKED, CLOCK, dictated
from fake_engine import FakeEngine, wait_until
from serve_setup import MODEL, post_bytes, serving

from duetjax.serve.limits import Limits
from duetjax.text.answer import ToolStyle

CROWD = 40  # more than asyncio has threads on any machine
ANSWER = '{"a": 1}'
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PLAIN = {"model": MODEL, "prompt": "x", "max_tokens": 3}


def keeping(name="a"):
    """A format of one property."""
    schema = {"type": "object", "properties": {name: {"type": "integer"}}, "required": [name]}
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}


def completion(name="a", **more):
    return COMPLETIONS, {"model": MODEL, "prompt": "x", "response_format": keeping(name)} | more


def turn(**more):
    return CHAT, {"model": MODEL, "messages": ASKED} | more


ASKING = {
    "completion": completion(),
    "stream": completion(stream=True),
    "chat": turn(response_format=keeping()),
    "tools": turn(tools=[CLOCK], tool_choice="required"),
}


@pytest.fixture
def served(chat_folder, child):
    with dictated(chat_folder, tool_style=ToolStyle.HERMES) as served:
        served.engine.executor.say(ANSWER)
        yield served
        child.may_answer.set()


@pytest.fixture
def pool():
    with ThreadPoolExecutor(CROWD) as pool:
        yield pool


def sent(served, pool, path, body, count=CROWD):
    """As many requests at a time; each is in the server when this returns."""

    def post():
        with served.http() as http:
            return http.post(path, json=body)

    before = served.context.admission.in_flight
    responses = [pool.submit(post) for _ in range(count)]
    wait_until(lambda: served.context.admission.in_flight == before + count, "a crowd that waits")
    return responses


def results(responses):
    return [each.result(60) for each in responses]


@pytest.mark.parametrize("asking", ASKING)
def test_a_crowd_with_one_new_grammar_is_answered_after_one_look(served, child, pool, asking):
    crowd = sent(served, pool, *ASKING[asking])
    child.may_answer.set()
    assert [response.status_code for response in results(crowd)] == [200] * CROWD
    assert len(child.asked) == 1
    assert len(served.engine.requests) == CROWD
    [grammar] = {new.constraint.grammar for new in served.engine.requests}
    assert grammar


@pytest.mark.parametrize("asking", ASKING)
def test_each_of_a_crowd_is_told_what_is_wrong_with_its_grammar(served, child, pool, asking):
    child.fault = "it is no good"
    crowd = sent(served, pool, *ASKING[asking])
    child.may_answer.set()
    for response in results(crowd):
        assert response.status_code == 400
        assert response.json()["error"] == {
            "message": "the schema cannot be used: it is no good",
            "type": "invalid_request_error",
            "param": "tools" if asking == "tools" else "response_format",
            "code": "invalid_value",
        }
    assert len(child.asked) == 1
    assert not served.engine.requests


def test_others_are_answered_while_a_crowd_waits_for_a_look(served, child, pool):
    crowd = sent(served, pool, *completion())
    with served.http() as http:
        assert http.post(COMPLETIONS, json=PLAIN).status_code == 200
    child.may_answer.set()
    assert [response.status_code for response in results(crowd)] == [200] * CROWD


def test_beyond_eight_new_grammars_another_one_is_refused_but_not_one_of_them(served, child, pool):
    names = "abcdefgh"
    crowds = [sent(served, pool, *completion(name), count=1) for name in names]
    wait_until(lambda: served.context.queue._num_unsubmitted == len(names), "eight looks")
    with served.http() as http:
        path, body = completion("i")
        response = http.post(path, json=body)
        assert response.status_code == 429
        assert response.json()["error"]["code"] == "queue_full"
        assert response.headers["retry-after"] == "1"
    crowds += [sent(served, pool, *completion(name), count=1) for name in names]
    child.may_answer.set()
    for crowd in crowds:
        assert [response.status_code for response in results(crowd)] == [200]
    assert len(child.asked) == len(names)


def test_a_client_that_leaves_takes_its_look_from_nobody(served, child, pool):
    path, body = completion()
    with served.connect() as leaving:
        leaving.sendall(post_bytes(path, body))
        wait_until(lambda: child.asked, "a look")
        crowd = sent(served, pool, path, body, count=3)
    wait_until(lambda: served.context.admission.in_flight == 3, "one that has left")
    child.may_answer.set()
    assert [response.status_code for response in results(crowd)] == [200] * 3
    assert len(child.asked) == 1
    assert len(served.engine.requests) == 3


def test_who_waits_for_a_look_has_places_in_the_queue(folder, child, pool):
    limits = Limits(max_num_queued_reqs=2)
    with (
        serving(folder, FakeEngine(num_slots=2), limits=limits) as served,
        served.http() as http,
    ):
        queue = served.context.queue
        path, body = completion(n=2)
        crowd = sent(served, pool, path, body, count=1)
        with served.connect() as leaving:
            leaving.sendall(post_bytes(path, body))
            wait_until(lambda: queue._num_unsubmitted == 4, "two that wait")
            assert queue.why_full() == "4 generations run or wait; ready again at 3"
            response = http.post(COMPLETIONS, json=PLAIN)
            assert response.status_code == 429
            assert "4 generations run or wait and at most 4 may" in response.text
            refused = http.post(path, json=body)
            assert (refused.status_code, refused.json()) == (429, response.json())
        wait_until(lambda: queue._num_unsubmitted == 2, "one that has left")
        assert http.post(COMPLETIONS, json=PLAIN | {"n": 2}).status_code == 200
        assert http.post(path, json=completion(n=5)[1]).status_code == 400
        child.may_answer.set()
        assert [response.status_code for response in results(crowd)] == [200]
        assert queue._num_unsubmitted == 0


def test_who_waits_for_a_look_as_the_server_ends_is_told_so(folder, child, pool):
    with serving(folder) as served:
        crowd = sent(served, pool, *completion(), count=3)
        wait_until(lambda: served.context.queue._num_unsubmitted == 3, "three that wait")
        served.server.stop()
        wait_until(lambda: served.context.dispatcher._failure is not None, "the end")
        child.may_answer.set()
        for response in results(crowd):
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "shutting_down"
        assert not served.engine.requests


def test_who_waits_for_a_look_when_all_is_given_up_is_told_so_at_once(folder, child, pool):
    with serving(folder) as served:
        crowd = sent(served, pool, *completion(), count=3)
        wait_until(lambda: served.context.queue._num_unsubmitted == 3, "three that wait")
        served.server.stop()
        served.server.stop()
        for response in results(crowd):  # nobody has answered the look
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "shutting_down"
