"""Limits as settings: each holds where it is set, is counted by its name, and is checked itself."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields

import pytest
from fake_engine import FakeEngine, wait_until
from serve_setup import MODEL, serving
from test_serve_errors import error_of
from test_serve_metrics import scrape
from test_serve_tokenization import MESSAGES, over

from duetjax.cli import _parser
from duetjax.config import ConfigError
from duetjax.policy.durations import DurationTable
from duetjax.policy.launch import Program
from duetjax.serve.limits import Limits

REFUSED = "duetjax_refused_requests_total"
BODY = {"model": MODEL, "prompt": "a", "max_tokens": 3}
SMALL = {
    "max_prompt_characters": 200,
    "max_prompts": 3,
    "max_n": 2,
    "max_choices": 4,
    "max_messages": 2,
    "max_stop_strings": 2,
    "max_stop_characters": 5,
    "max_stop_token_ids": 3,
    "max_logit_bias": 2,
    "max_logprobs": 1,
    "max_top_logprobs": 2,
    "max_body_bytes": 4000,
    "max_headers": 20,
}


@pytest.fixture(scope="module")
def small(folder):
    with serving(folder, limits=Limits(**SMALL)) as served:
        yield served


@pytest.fixture(scope="module")
def beyond(small):
    with small.http() as http:
        yield over(http.get("/v1/limits").json())


@pytest.mark.parametrize("name", [n for n in SMALL if n not in ("max_body_bytes", "max_headers")])
def test_a_limit_holds_where_it_is_set_and_is_counted_by_its_name(small, beyond, name):
    body = beyond[name]
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    with small.http() as http:
        before = scrape(http).get((REFUSED, name), 0)
        assert str(SMALL[name]) in error_of(http.post(path, json=body), 400)["message"]
        assert scrape(http)[REFUSED, name] == before + 1


def test_limits_of_bodies_and_headers_hold_and_are_counted(small):
    with small.http() as http:
        assert error_of(http.post("/v1/completions", content=b" " * 4001), 413)
        assert error_of(http.post("/v1/completions", content=iter([b" " * 4001])), 413)
        assert error_of(http.get("/health", headers={f"x-{i}": "" for i in range(20)}), 400)
        counted = scrape(http)
        assert (counted[REFUSED, "max_body_bytes"], counted[REFUSED, "max_headers"]) == (2, 1)


def test_what_is_within_small_limits_is_answered(small):
    body = BODY | {"n": 2, "prompt": ["a", "b"], "stop": ["xxxxx"] * 2, "logprobs": 1}
    body |= {"logit_bias": {"5": 1, "6": 1}, "stop_token_ids": [1, 2], "prompt": ["a" * 200, "b"]}
    with small.http() as http:
        assert http.post("/v1/completions", json=body).status_code == 200


def test_limits_are_shown_as_they_are(small):
    with small.http() as http:
        shown = http.get("/v1/limits").json()
    assert {each.name for each in fields(Limits)} < shown.keys()
    assert {name: shown[name] for name in SMALL} == SMALL


def test_every_limit_is_a_flag_with_its_default():
    args = _parser().parse_args(["serve"])
    assert {each.name: getattr(args, each.name) for each in fields(Limits)} == {
        each.name: each.default for each in fields(Limits)
    }
    given = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    args = _parser().parse_args(["serve", *given, "--queue-timeout-s", "1.5"])
    assert {name: getattr(args, name) for name in SMALL} == SMALL
    assert args.queue_timeout_s == 1.5


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_n", 0), ("max_n", None), ("max_n", 1.0), ("max_n", True), ("max_n", 2**31),
        ("max_body_bytes", 0), ("max_header_bytes", 100), ("max_logit_bias", 65),
        ("max_top_logprobs", 21), ("max_logprobs", -1), ("max_stop_token_ids", 17),
        ("max_num_queued_reqs", -1), ("max_num_queued_tokens", 0), ("ttft_slo_ms", 0.0),
        ("ttft_slo_ms", -1.0), ("queue_timeout_s", -1.0), ("queue_timeout_s", None),
        ("request_timeout_s", float("nan")), ("body_timeout_s", float("inf")),
        ("header_timeout_s", "5"),
    ],
)  # fmt: skip
def test_a_limit_that_makes_no_sense_is_a_config_error(name, value):
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} .*: give an? "):
        Limits(**{name: value})


# Tokens that wait, and when their first output will come.


@pytest.fixture
def pool():
    with ThreadPoolExecutor(16) as pool:
        yield pool


def hold_one(served, pool, prompt):
    """A prompt that waits for its first token; its answer."""
    served.engine.executor.hold()
    before = served.context.queue.queued_tokens
    answer = pool.submit(post, served, BODY | {"prompt": prompt})
    wait_until(lambda: served.context.queue.queued_tokens == before + len(prompt), "its tokens")
    return answer


def post(served, body, **headers):
    with served.http() as http:
        return http.post("/v1/completions", json=body, headers=headers)


def test_tokens_that_wait_are_bounded(folder, pool):
    with serving(folder, limits=Limits(max_num_queued_tokens=150)) as served:
        first = hold_one(served, pool, "a" * 100)
        second = hold_one(served, pool, "b" * 50)
        assert error_of(post(served, BODY), 429)["code"] == "queue_full"
        served.engine.executor.release()
        assert {first.result(60).status_code, second.result(60).status_code} == {200}
        assert served.context.queue.queued_tokens == 0
        assert post(served, BODY | {"prompt": "a" * 200}).status_code == 200, "nobody waits"
        with served.http() as http:
            assert scrape(http)[REFUSED, "max_num_queued_tokens"] == 1


def test_completions_of_one_prompt_wait_for_it_once(folder, pool):
    with serving(folder, limits=Limits(max_num_queued_tokens=150)) as served:
        served.engine.executor.hold()
        answer = pool.submit(post, served, BODY | {"prompt": ["a" * 60, "b" * 60], "n": 4})
        wait_until(lambda: len(served.engine.submitted) == 8, "submission")
        assert served.context.queue.queued_tokens == 120
        served.engine.executor.release()
        assert answer.result(60).status_code == 200
        assert served.context.queue.queued_tokens == 0


@pytest.mark.parametrize("at_fault", ["client", "deadline", "engine"])
def test_tokens_of_who_does_not_get_one_wait_no_more(folder, pool, at_fault):
    limits = Limits(request_timeout_s=0.2 if at_fault == "deadline" else 0)
    with serving(folder, limits=limits) as served:
        answer = hold_one(served, pool, "a" * 100)
        if at_fault == "client":
            with served.connect():
                pass
            served.engine.executor.release()
        elif at_fault == "engine":
            served.engine.executor.break_down()
        answer.result(60)
        wait_until(lambda: served.context.queue.queued_tokens == 0, "none")


def predicted(folder, **limits):
    """A server that takes 10 ms for a prompt token, by prediction."""
    table = DurationTable({(None, Program.PREFILL, 66): 660.0, (None, Program.DECODE, 2): 1.0})
    engine = FakeEngine(num_slots=2, durations=table)
    return serving(folder, engine, limits=Limits(**limits))


@pytest.mark.parametrize(
    ("own", "server", "status"),
    [
        (None, None, 200), (None, 1000.0, 429), (None, 60_000.0, 200), ("1000", None, 429),
        ("60000", None, 200), ("60000", 1000.0, 200), ("1000", 60_000.0, 429),
    ],
)  # fmt: skip
def test_who_would_come_too_late_is_told_at_once(folder, pool, own, server, status):
    """66 tokens wait and 66 more come: 1.32 seconds."""
    with predicted(folder, ttft_slo_ms=server) as served:
        assert post(served, BODY | {"prompt": "c" * 66}).status_code == 200  # now it can predict
        hold_one(served, pool, "a" * 66)
        headers = {} if own is None else {"x-slo-ttft-ms": own}
        second = pool.submit(post, served, BODY | {"prompt": "b" * 66}, **headers)
        if status == 429:
            response = second.result(60)
            error = error_of(response, 429)
            assert (error["code"], "in 1320 ms" in error["message"]) == ("queue_full", True)
            assert int(response.headers["retry-after"]) >= 1
        else:
            wait_until(lambda: served.context.queue.queued_tokens == 132, "its tokens")
        served.engine.executor.release()
        assert second.result(60).status_code == status
        with served.http() as http:
            assert scrape(http).get((REFUSED, "ttft_slo_ms"), 0) == (status == 429)


def test_alone_nobody_is_too_late(folder):
    with predicted(folder, ttft_slo_ms=1.0) as served:
        for _ in range(3):
            assert post(served, BODY | {"prompt": "a" * 100}).status_code == 200


# Settings beside the limits.


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_strict_params_refuse_what_is_only_named_otherwise(folder, http, path):
    body = {"model": MODEL, "prompt": "a", "messages": MESSAGES, "max_tokens": 1}
    body |= {"use_beam_search": True, "stream_options": None, "user": "me"}
    extra = "messages" if path == "/v1/completions" else "prompt"
    assert http.post(path, json=body).headers["x-duetjax-ignored"] == f"{extra}, use_beam_search"
    with serving(folder, strict_params=True) as served, served.http() as strict:
        error = error_of(strict.post(path, json=body), 400)
        assert (error["code"], error["param"]) == ("unsupported_parameter", extra)
        del body["use_beam_search"], body[extra]
        assert strict.post(path, json=body).status_code == 200


@pytest.mark.parametrize("public", [False, True])
def test_metrics_are_public_only_if_told_so(folder, public):
    with serving(folder, api_key="key", metrics_public=public) as served, served.http() as http:
        assert http.get("/metrics").status_code == (200 if public else 401)
        assert http.get("/v1/models").status_code == 401
        assert http.get("/metrics/").status_code == 401
        counted = http.get("/metrics", headers={"authorization": "Bearer key"}).text
        assert f'{REFUSED}{{reason="invalid_api_key"}} {2.0 if public else 3.0}' in counted
