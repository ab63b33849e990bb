"""Whatever goes wrong is answered in OpenAI's shape, on every route and status."""

import itertools
import json
import re

import openai
import pytest
from fake_engine import PATIENCE, VOCAB_SIZE
from serve_setup import MODEL, make_service, post_bytes, read_all, serving

from duetjax.serve.app import create_app
from duetjax.serve.auth import PUBLIC_PATHS
from duetjax.serve.limits import Limits

GENERATING = ("/v1/completions", "/v1/chat/completions")
MODELS = ("/v1/models", f"/v1/models/{MODEL}", "/v1/models/abc/alias")
READABLE = (*MODELS, "/v1/limits", "/openapi.json", "/livez", "/readyz", "/health", "/metrics")


@pytest.fixture(autouse=True)
def nothing_has_reached_the_engine(served):
    before = list(served.engine.submitted)
    yield
    assert served.engine.submitted == before
    served.engine.wait_idle()


def error_of(response, status):
    """The error object, its shape checked."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert body.keys() == {"error"}
    error = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert isinstance(error["code"], str)
    assert error["code"] != ""
    assert "\n" not in error["message"]
    assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")
    return error


def refused(http, route="/v1/completions", **body):
    given = {"model": MODEL, "prompt": "a"} | body
    return error_of(http.post(route, json=given), 400)


@pytest.mark.parametrize(
    "path", ["/index.html", "/v1", "/v1/completions/", "/v1/models/", "/nope", "/v2/x"]
)
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "OPTIONS"])
def test_an_unknown_path_is_404(http, method, path):
    error = error_of(
        http.request(method, path), 405 if "models/" in path and method != "GET" else 404
    )
    assert path in error["message"] or error["code"] == "model_not_found"


def test_a_path_or_host_that_is_nonsense_is_404_in_one_line(http):
    error = error_of(http.get("/a%0Ab" + "c" * 5000), 404)
    assert len(error["message"]) < 300
    error_of(http.get("/nope", headers={"host": "["}), 404)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *itertools.product(("GET", "PUT", "DELETE", "PATCH", "OPTIONS"), GENERATING),
        *itertools.product(("POST", "PUT", "DELETE", "PATCH", "OPTIONS"), READABLE),
    ],
)
def test_a_wrong_method_is_405_and_told_the_right_one(http, method, path):
    response = http.request(method, path)
    assert error_of(response, 405)["code"] == "method_not_allowed"
    assert ("POST" if path in GENERATING else "GET") in response.headers["allow"]


@pytest.mark.parametrize("path", READABLE)
def test_head_is_answered_as_get_without_a_body(http, path):
    head, get = http.head(path), http.get(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == get.headers["content-type"]


def test_models_are_listed_and_found_by_name(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        assert [m.id for m in client.models.list()] == [MODEL, "abc/alias"]
        assert client.models.retrieve("abc/alias").created == 1_700_000_000
        with pytest.raises(openai.NotFoundError) as caught:
            client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("path", GENERATING)
@pytest.mark.parametrize(
    "body",
    [
        b"", b" ", b"null", b"[]", b'"text"', b"5", b"1.5", b"true", b"{", b'{"model": NaN}',
        b'{"a": Infinity}', b'{"a": "\xff"}', b'{"a": "\\ud800"}', b"[" * 200_000,
        b'{"a":' * 100_000, b"{'a': 1}", b'{"a": 1} x', b"\x1f\x8b\x08\x00gzip", b"a=b",
    ],
    ids=lambda body: repr(body[:12]),
)  # fmt: skip
def test_a_body_that_is_not_a_json_object_is_400(http, path, body):
    error_of(http.post(path, content=body), 400)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", 5), ("model", ""), ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", 1.5),
        ("max_tokens", "5"), ("max_tokens", True), ("max_tokens", 10**30),
        ("max_completion_tokens", 0), ("temperature", -0.1), ("temperature", 2.1),
        ("temperature", "1"), ("temperature", True), ("seed", 1.5), ("seed", 2**63), ("seed", "1"),
        ("n", 0), ("n", 9), ("n", 10**9), ("n", True), ("stop", ""), ("stop", 5), ("stop", [""]),
        ("stop", ["a"] * 5), ("stop", ["x" * 257]), ("stop", [1]), ("stream", 1),
        ("stream", "true"), ("stop_token_ids", [-1]), ("stop_token_ids", [257]),
        ("stop_token_ids", ["1"]), ("stop_token_ids", 1), ("ignore_eos", 0), ("echo", "yes"),
        ("return_token_ids", 1), ("prompt", 5), ("prompt", []), ("prompt", ""), ("prompt", [""]),
        ("prompt", [[]]), ("prompt", {}), ("prompt", ["a", 1]), ("prompt", [1, "a"]),
        ("prompt", [1, 1.5]), ("prompt", [True]), ("prompt", [1, True]), ("prompt", [-1]),
        ("prompt", [257]), ("prompt", [2**31]), ("prompt", [2**70]), ("prompt", [[1], "a"]),
        ("prompt", [[1], [[1]]]), ("prompt", ["a"] * 33), ("prompt", [[1]] * 10**5),
        ("top_p", 0), ("top_p", 1.5), ("top_p", True), ("top_k", -2), ("top_k", 1.5),
        ("top_k", 10**18), ("min_p", -0.1), ("min_p", 1.1), ("repetition_penalty", 0),
        ("repetition_penalty", 3), ("frequency_penalty", 2.1), ("presence_penalty", -2.1),
        ("presence_penalty", "1"), ("min_tokens", -1), ("min_tokens", 17), ("min_tokens", 10**18),
        ("min_tokens", 1.5), ("logit_bias", []), ("logit_bias", 5), ("logit_bias", {"257": 1}),
        ("logit_bias", {"-1": 1}), ("logit_bias", {"a\nb": 1}), ("logit_bias", {"5": 101}),
        ("logit_bias", {"5": True}), ("logit_bias", {"5": "1"}), ("logit_bias", {"5": None}),
        ("logit_bias", {str(i): 1 for i in range(65)}), ("stop_token_ids", list(range(17))),
        ("logprobs", 6), ("logprobs", -1), ("logprobs", True), ("logprobs", 1.5),
    ],
    ids=lambda value: repr(value)[:24],
)  # fmt: skip
def test_a_value_out_of_place_is_400_and_names_the_field(http, field, value):
    if field == "model" and value == "":
        assert error_of(http.post("/v1/completions", json={field: value, "prompt": "a"}), 404)
        return
    error = refused(http, **{field: value})
    param = "max_tokens" if field == "max_completion_tokens" else field
    assert re.fullmatch(rf"{param}(\[\d+\])?", error["param"])
    assert len(error["message"]) < 300


def test_a_missing_field_is_named(http):
    error = error_of(http.post("/v1/completions", json={"prompt": "a"}), 400)
    assert (error["param"], error["message"]) == ("model", "model: is required")
    error = error_of(http.post("/v1/chat/completions", json={"model": MODEL}), 400)
    assert error["param"] == "messages"


def test_the_number_of_choices_is_bounded(http):
    error = refused(http, prompt=["a"] * 32, n=3)
    assert error["param"] == "n"
    assert "96" in error["message"]


def test_a_token_id_beyond_the_logits_never_reaches_the_engine(http):
    assert VOCAB_SIZE > 257, "or the engine itself would refuse it"
    assert "257" in refused(http, prompt=[97, 257])["message"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("best_of", 2), ("suffix", "x"), ("audio", {"voice": "x"}),
        ("modalities", ["text", "audio"]),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("route", GENERATING)
def test_a_parameter_not_offered_is_400_with_a_hint(http, route, field, value):
    messages = [{"role": "user", "content": "a"}]
    error = refused(http, route, messages=messages, **{field: value})
    assert (error["code"], error["param"]) == ("unsupported_parameter", field)
    assert "leave it out" in error["message"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("logprobs", 1), ("logprobs", "true"), ("top_logprobs", 21), ("top_logprobs", -1),
        ("top_logprobs", True), ("top_logprobs", 3),
    ],
    ids=str,
)  # fmt: skip
def test_logprobs_of_a_chat_are_asked_for_with_true_and_a_number(http, field, value):
    messages = [{"role": "user", "content": "a"}]
    fields = {"logprobs": True} if field == "top_logprobs" and value != 3 else {}
    error = refused(http, "/v1/chat/completions", messages=messages, **fields | {field: value})
    assert (error["code"], error["param"]) == ("invalid_value", field)


def test_echo_with_logprobs_is_not_offered(http):
    error = refused(http, echo=True, logprobs=0)
    assert (error["code"], error["param"]) == ("unsupported_parameter", "echo")


def test_stop_ids_are_bounded_together_with_the_end_of_sequence_ids(http):
    error = refused(http, stop_token_ids=list(range(16)))
    assert error["param"] == "stop_token_ids"
    assert "16" in error["message"]


def test_a_body_over_the_limit_is_413_whether_its_length_is_declared_or_not(http):
    body = b" " * (Limits().max_body_bytes + 1)
    chunks = (body[i : i + 50_000] for i in range(0, len(body), 50_000))
    for content in (body, chunks):
        assert error_of(http.post("/v1/completions", content=content), 413)
    assert http.get("/health").status_code == 200


def test_a_body_of_exactly_the_limit_is_read(http):
    assert error_of(http.post("/v1/completions", content=b" " * Limits().max_body_bytes), 400)


def test_a_body_over_the_limit_is_refused_before_the_client_sends_it(served):
    with served.connect() as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {10**9}\r\n"
        connection.sendall(head.encode() + b"Expect: 100-continue\r\nConnection: close\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"garbage\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: x\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 70_000,
    ],
    ids=lambda b: repr(b[:50]),
)
def test_what_is_not_http_gets_a_json_400_and_the_connection_closes(served, request_bytes):
    with served.connect() as connection:
        connection.sendall(request_bytes)
        head, _, body = read_all(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["error"].keys() == {"message", "type", "param", "code"}


def test_garbage_behind_a_request_does_not_disturb_the_server(served, http):
    with served.connect() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\ngarbage\r\n\r\n")
        read_all(connection)
    assert http.get("/health").status_code == 200


def test_a_client_that_leaves_while_sending_its_body_leaves_nothing_behind(served):
    with served.connect() as connection:
        whole = post_bytes("/v1/completions", {"model": MODEL, "prompt": "a"})
        connection.sendall(whole[:-5])


@pytest.mark.parametrize("given", ["abc", "A-1_b.2", "x" * 128])
def test_a_request_id_is_echoed_on_success_and_on_failure(http, given):
    for path, status in (("/health", 200), ("/nope", 404), ("/v1/completions", 405)):
        response = http.get(path, headers={"x-request-id": given})
        assert response.status_code == status
        assert response.headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "x" * 129, "a b", "a,b", "\xe9".encode("latin-1")])
def test_a_request_id_that_is_none_is_replaced(http, given):
    response = http.get("/health", headers={"x-request-id": given})
    assert re.fullmatch("[0-9a-f]{32}", response.headers["x-request-id"])


def test_a_fault_of_the_server_is_logged_and_tells_the_client_nothing(folder, monkeypatch, caplog):
    with serving(folder) as served, served.http() as http:
        monkeypatch.setattr(type(served.engine), "stats", lambda _: 1 / 0)
        response = http.get("/metrics", headers={"x-request-id": "seen"})
        monkeypatch.undo()
    error = error_of(response, 500)
    assert "Zero" not in error["message"]
    assert "ZeroDivisionError" in caplog.text
    assert "seen" in caplog.text
    assert response.headers["x-request-id"] == "seen"


KEY = "sekret-\u00e9"


@pytest.fixture(scope="module")
def locked(folder):
    with serving(folder, api_key=KEY) as served, served.http() as http:
        yield served, http


def test_every_route_but_the_public_list_needs_the_key(folder, served, locked):
    app = create_app(make_service(folder, served.engine, api_key=KEY))
    paths = {route.path.replace("{id:path}", MODEL) for route in app.routes}
    assert paths >= PUBLIC_PATHS
    others = {"/nope", "/health/", "/v1//models", "/health/../v1/models", "/HEALTH"}
    for path in paths | others:
        response = locked[1].get(path)
        if path in PUBLIC_PATHS:
            assert response.status_code == 200
        else:
            assert error_of(response, 401)["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "value",
    ["", "Bearer", f"Basic {KEY}", KEY, f"Bearer {KEY}x", f"Bearer x{KEY}", "Bearer x"],
)
def test_a_wrong_key_opens_nothing(locked, value):
    error_of(locked[1].get("/v1/models", headers={"authorization": value.encode()}), 401)


@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
def test_the_right_key_opens_everything(locked, scheme):
    headers = {"authorization": f"{scheme} {KEY}".encode()}
    for path in READABLE:
        assert locked[1].get(path, headers=headers).status_code == 200


def test_a_wrong_key_is_a_typed_error_in_the_client(locked):
    with (
        openai.OpenAI(base_url=f"{locked[0].url}/v1", api_key="x", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.completions.create(model=MODEL, prompt="a", timeout=PATIENCE)


def test_the_key_is_not_shown_with_the_service(folder, served):
    assert KEY not in repr(make_service(folder, served.engine, api_key=KEY))
