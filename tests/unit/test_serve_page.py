"""The page at /: whole in itself, public, and held to itself by the browser."""

import base64
import hashlib
import re

import pytest
from serve_setup import serving


@pytest.fixture
def page(http):
    return http.get("/")


def test_anybody_may_have_it_whatever_they_may_ask_for(folder):
    with serving(folder, api_key="key") as served, served.http() as http:
        assert http.get("/").status_code == 200
        assert http.head("/").status_code == 200
        assert http.get("/v1/models").status_code == 401


def test_it_is_html_that_no_cache_keeps(page):
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.headers["cache-control"] == "no-cache"
    assert page.text.startswith("<!doctype html>")


def test_a_browser_runs_what_is_in_it_and_nothing_else(page):
    parts = page.headers["content-security-policy"].split("; ")
    policy = dict(part.split(" ", 1) for part in parts)
    for kind in ("script", "style"):
        [body] = re.findall(rf"<{kind}>(.*?)</{kind}>", page.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert policy[f"{kind}-src"] == f"'sha256-{digest}'"
    assert policy["default-src"] == policy["frame-ancestors"] == policy["form-action"] == "'none'"
    assert policy["connect-src"] == "'self'"


def test_it_needs_nothing_from_elsewhere_and_marks_up_nothing_that_a_model_says(page):
    assert not re.search(r"https?:|//cdn|<link|<img|<iframe|@import|url\(", page.text)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", page.text)
    assert not re.search(r"\son\w+=|\sstyle=", page.text)  # what the policy would refuse


def test_every_field_has_a_name_for_those_who_do_not_see(page):
    fields = re.findall(r"<(?:input|textarea)[^>]*\sid=\"(\w+)\"", page.text)
    assert len(fields) >= 6
    for field in fields:
        assert f'<label for="{field}">' in page.text, field
    for canvas in re.findall(r"<canvas[^>]*>", page.text):
        assert "aria-label=" in canvas, canvas


def test_it_asks_for_routes_that_there_are(page, http):
    paths = set(re.findall(r"(?:stream|post|fetch)\(\"([\w/]+)\"", page.text))
    assert paths == {"v1/models", "v1/completions", "v1/chat/completions", "debug/steps"}
    known = http.get("/openapi.json").json()["paths"]
    assert {f"/{path}" for path in paths} <= known.keys()
