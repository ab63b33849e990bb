"""Headers that say how long may pass between a request's tokens."""

import pytest
from serve_setup import MODEL

ROUTES = {
    "/v1/completions": {"prompt": "a"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
}


def post(http, headers, route="/v1/completions", **changes):
    body = {"model": MODEL, "max_tokens": 2} | ROUTES[route] | changes
    return http.post(route, json=body, headers=headers)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("header", ["x-slo-tbt-ms", "x-slo-tpot-ms", "X-SLO-TBT-MS"])
def test_the_objective_reaches_every_generation_of_a_call(served, http, route, header):
    assert post(http, {header: "12.5"}, route, n=2).status_code == 200
    assert [new.tbt_slo_ms for new in served.engine.requests[-2:]] == [12.5, 12.5]


def test_without_a_header_the_engine_s_own_holds(served, http):
    assert post(http, {}).status_code == 200
    assert served.engine.requests[-1].tbt_slo_ms is None


def test_two_headers_that_agree_are_one(served, http):
    assert post(http, {"x-slo-tbt-ms": "40", "x-slo-tpot-ms": "40.0"}).status_code == 200
    assert served.engine.requests[-1].tbt_slo_ms == 40


@pytest.mark.parametrize(
    "headers",
    [
        *({"x-slo-tbt-ms": text} for text in ("", "0", "0.0000001", "-5", "nan", "inf", "1e3")),
        *({"x-slo-tbt-ms": text} for text in ("1_0", "5ms", "0x10", "9" * 400, "1.", "\xb2")),
        {"x-slo-tpot-ms": "fast"},
        {"x-slo-tbt-ms": "40", "x-slo-tpot-ms": "50"},
    ],
    ids=repr,
)
def test_what_is_no_time_is_400_and_names_the_header(served, http, headers):
    before = list(served.engine.submitted)
    response = post(http, [(name, text.encode("latin-1")) for name, text in headers.items()])
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] in headers
    assert len(error["message"]) < 200
    assert served.engine.submitted == before
