"""Bodies that are no JSON objects, or no JSON: each is refused before anybody looks into it."""

import gzip
import json

import orjson
from faults import Faults
from faulty import both, code, harm, server, setting
from serve_setup import MODEL

import duetjax.text.tokenizer
from duetjax.serve import body

FAULTS = Faults("Bodies", server, harm)
REFUSED = "400 invalid_value"


def sending(content: bytes, **headers: str):
    """An attack: this body."""

    def attack(served):
        with served.http() as http:
            return code(http.post("/v1/completions", content=content, headers=headers))

    return attack


def with_field(value: bytes) -> bytes:
    """A body that is right but for the value of a field that is not looked at."""
    return b'{"model": "%s", "prompt": "a", "note": %s}' % (MODEL.encode(), value)


any_kind = setting(body, "_parse", orjson.loads)
python_json = setting(body, "orjson", json)
any_text = setting(duetjax.text.tokenizer, "_check_unicode", lambda _: None)

for name, content in (("null", b"null"), ("[]", b"[]"), ("a string", b'"a"'), ("5", b"5")):
    FAULTS.add(name, sending(content), REFUSED, guard="a body must be an object", off=any_kind)
for name, content in (
    ("empty", b""),
    ("truncated JSON", b'{"model": "'),
    ("gzip", gzip.compress(with_field(b"1"))),
):
    FAULTS.add(name, sending(content), REFUSED, guard="orjson")
FAULTS.add(
    "gzip, and a header that says so",
    sending(gzip.compress(with_field(b"1")), **{"content-encoding": "gzip"}),
    REFUSED,
    guard="orjson; nothing is decompressed",
)
for name, value in (
    ("NaN", b"NaN"),
    ("Infinity", b"-Infinity"),
    ("arrays 100,000 deep", b"[" * 100_000 + b"]" * 100_000),
    ("objects 100,000 deep", b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    ("an integer of 5,000 digits", b"1" * 5000),
    ("a number beyond all doubles", b"1e400"),
    ("bad UTF-8", b'"\xff"'),
    ("an overlong slash in UTF-8", b'"\xc0\xaf"'),
    ("half a surrogate pair", b'"\\ud800"'),
):
    FAULTS.add(
        name,
        sending(with_field(value)),
        REFUSED,
        guard="orjson, where Python's json takes it or fails",
        off=python_json,
    )
FAULTS.add(
    "half a surrogate pair in a prompt",
    sending(b'{"model": "%s", "prompt": "\\ud800"}' % MODEL.encode()),
    REFUSED,
    guard="orjson, then the tokenizer",
    off=both(python_json, any_text),
)

test_guarded, test_unguarded = FAULTS.tests()
