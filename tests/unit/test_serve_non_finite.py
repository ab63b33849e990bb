"""A request whose logits are not finite: it fails in words, and its neighbours do not notice."""

import json
import threading

import openai
import pytest
from fake_engine import continuation, wait_until
from serve_setup import MODEL, events, serving
from test_serve_metrics import scrape


@pytest.fixture
def poisoned(folder):
    """A server whose model breaks down after the letter "i"."""
    with serving(folder) as served, served.http() as http:
        served.engine.executor.poison(ord("i"))
        yield served, http
        served.engine.wait_idle()
        assert http.get("/health").status_code == 200


def complete(http, **body):
    return http.post("/v1/completions", json={"model": MODEL, "prompt": "a"} | body)


def failure(error):
    assert error.keys() == {"message", "type", "param", "code"}
    assert "other requests are not affected" in error["message"]
    return error["type"], error["code"]


def test_it_is_a_fault_of_the_server_that_clients_are_told_not_to_repeat(poisoned):
    response = complete(poisoned[1])
    assert response.status_code == 500
    assert response.headers["x-should-retry"] == "false"
    assert failure(response.json()["error"]) == ("server_error", "non_finite_logits")


def test_the_official_client_asks_once(poisoned):
    served, _ = poisoned
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=3) as client:
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(model=MODEL, prompt="a")
        assert caught.value.code == "non_finite_logits"
    assert len(served.engine.submitted) == 1


def test_a_stream_gives_what_came_before_and_ends_with_an_error_event(poisoned):
    for path, prompt in (
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ):
        body = {"model": MODEL, "stream": True, **prompt}
        *chunks, error, done = events(poisoned[1].post(path, json=body).content)
        assert done == "[DONE]"
        assert failure(json.loads(error)["error"]) == ("server_error", "non_finite_logits")
        choices = [json.loads(chunk)["choices"][0] for chunk in chunks]
        assert all(choice["finish_reason"] is None for choice in choices)
        last = choices[-1]
        assert last.get("text", last.get("delta", {}).get("content")) == "i"


def test_a_prompt_that_breaks_the_model_fails_before_the_first_token(poisoned):
    assert complete(poisoned[1], prompt="i" * 100).status_code == 500


def test_neighbours_in_the_same_steps_are_served_as_if_alone(poisoned):
    served, http = poisoned
    executor, answers = served.engine.executor, {}
    executor.hold()

    def ask(prompt, seed):
        answers[prompt] = complete(http, prompt=prompt, seed=seed, temperature=1, max_tokens=20)

    threads = [threading.Thread(target=ask, args=args) for args in (("a", 0), ("j", 0), ("b", 1))]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(served.engine.submitted) == 3, "three submissions")
    executor.release()
    for thread in threads:
        thread.join()
    assert answers["a"].status_code == 500
    for prompt, seed in (("j", 0), ("b", 1)):
        text = answers[prompt].json()["choices"][0]["text"]
        assert text == continuation(prompt, 20, 1.0, seed)


@pytest.mark.parametrize("stream", [False, True])
def test_one_failed_choice_fails_the_call_and_aborts_the_others(poisoned, stream):
    served, http = poisoned
    fields = {"n": 2, "seed": 0, "temperature": 1, "max_tokens": 200, "stream": stream}
    response = complete(http, prompt="b", **fields)  # up to i, and dfhj for ever
    if stream:
        *_, error, _ = events(response.content)
        failed = json.loads(error)["error"]
    else:
        failed = response.json()["error"]
    assert failure(failed) == ("server_error", "non_finite_logits")
    served.engine.wait_idle()
    assert set(served.engine.submitted) <= set(served.engine.aborted)
    samples = scrape(http)
    assert samples["vllm:request_success_total", "error"] == 2
