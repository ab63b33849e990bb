"""The server's own document against the server: requests made from /openapi.json by schemathesis.

`python schemathesis_client.py small=URL strict=URL narrow=URL`, as tests/clients/run.py does. What
the document forbids must be refused, what it allows taken, and every answer be as it says. Fails
with what schemathesis prints.
"""

import json
import socket
import subprocess
import sys
import tempfile
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import jsonschema_rs
import requests

HERE = Path(__file__).parent
KEY = "open-sesame"
LEAST_CASES = 2000
HTTP = requests.Session()
HTTP.trust_env = False
ASKED = {"messages": [{"role": "user", "content": "What is TTFT?"}], "max_tokens": 4}
CONTINUED = {"prompt": "Prefill is", "max_tokens": 4}
LETTER = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["a"]}}}
NOTHING = {"type": "object", "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "f", "parameters": NOTHING, "strict": True}}
CALLING = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
THINKING = {"max_tokens": 90, "max_reasoning_tokens": 2}
ALL_TOLD = {"return_token_ids": True, "temperature": 1, "n": 2}
STREAM = {"stream": True, "stream_options": {"include_usage": True}}

# Left out, and why:
# - positive_data_acceptance: rules that join fields or depend on the model (RULES in the hooks) are
#   in no schema; refused_by_a_known_rule takes its place and lets those alone through.
# - the stateful phase: no request makes anything that another could use, so it only repeats.
# - the rest of /debug/steps, which never ends, after 1 s; check_answers looks at its events. Other
#   streams are read to their ends: 6 choices of 128 tokens have fewer than 1,000 events.
CONFIG = """
request-timeout = 30.0
max-stream-events = 1000
continue-on-failure = true
hooks = {hooks}
[phases.stateful]
enabled = false
[[operations]]
include-path = "/debug/steps"
request-timeout = 1.0
{auth}
"""
AUTH = f'[auth.openapi.bearer]\nbearer = "{KEY}"\n'


class Api:
    """A server and the document that it gives."""

    def __init__(self, url, **headers):
        self.url, self.headers = url, headers
        self.document = self.send("GET", "/openapi.json").json()
        self.model = self.document["components"]["schemas"]["ModelName"]["enum"][0]

    def send(self, method, path, **options):
        return HTTP.request(method, self.url + path, headers=self.headers, timeout=30, **options)

    def check(self, status, method, path, body=None, template=None):
        """Sends a request and holds the answer against the document."""
        given = None if body is None else {"model": self.model} | body
        response = self.send(method, path, json=given)
        assert response.status_code == status, (method, path, response.text)
        media = response.headers["content-type"].partition(";")[0]
        schema = self.answer_schema(method, template or path, status, media)
        if media == "text/event-stream":
            lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
            assert lines.pop() == "[DONE]", response.text
            assert lines, response.text
            self.check_events(schema, lines)
        else:
            self.validate(schema, response.text if media == "text/plain" else response.json())

    def check_events(self, schema, lines):
        for line in lines:
            self.validate(
                schema["properties"]["data"]["anyOf"][1]["contentSchema"], json.loads(line)
            )

    def answer_schema(self, method, path, status, media="application/json"):
        answer = self.document["paths"][path][method.lower()]["responses"][str(status)]
        if "$ref" in answer:
            answer = self.document["components"]["responses"][answer["$ref"].rpartition("/")[2]]
        return answer["content"][media]["schema"]

    def validate(self, schema, value):
        whole = schema | {"components": self.document["components"]}
        jsonschema_rs.validator_for(whole).validate(value)


def check_answers(small, strict, narrow):
    """Answers that generated requests seldom bring about."""
    scored = {"logprobs": True, "top_logprobs": 2}
    for more in ({}, STREAM, ALL_TOLD, ALL_TOLD | STREAM):
        small.check(200, "POST", "/v1/chat/completions", ASKED | more | scored)
        small.check(200, "POST", "/v1/chat/completions", ASKED | more)
        for asked in (CALLING, {"response_format": LETTER}):
            told = ASKED | THINKING | asked
            small.check(200, "POST", "/v1/chat/completions", told | more)
            small.check(200, "POST", "/v1/chat/completions", told | more | scored)
        small.check(200, "POST", "/v1/completions", CONTINUED | more | {"logprobs": 2})
        small.check(200, "POST", "/v1/completions", CONTINUED | more | {"echo": True})
    check_calls(small)
    for path in ("/v1/models", "/v1/limits", "/livez", "/readyz", "/health", "/metrics"):
        small.check(200, "GET", path)
    small.check(404, "GET", "/v1/models/other", template="/v1/models/{id}")
    small.check(404, "POST", "/tokenize", {"prompt": "a", "model": "other"})
    small.check(413, "POST", "/v1/completions", {"prompt": "a" * 70_000})
    late = send_late(small, "/v1/completions")
    small.validate(small.answer_schema("POST", "/v1/completions", 408), late)
    small.validate({"$ref": "#/components/schemas/Error"}, small.send("GET", "/nope").json())
    Api.check(locked_out(strict), 401, "GET", "/v1/models")
    small.check_events(
        small.answer_schema("GET", "/debug/steps", 200, "text/event-stream"), watched(small)
    )
    with narrow.send("POST", "/v1/completions", json=endless(narrow), stream=True) as running:
        lines = running.iter_lines()  # which ends the request once nobody holds it
        next(lines)
        narrow.check(429, "POST", "/v1/completions", CONTINUED)
        narrow.check(200, "GET", "/livez")


def check_calls(api):
    """What an answer says can be said again, with the result of the call."""
    asked = {"model": api.model, **ASKED, **THINKING, **CALLING}
    [choice] = api.send("POST", "/v1/chat/completions", json=asked).json()["choices"]
    turn = choice["message"]
    assert turn["content"] is None, turn
    assert turn["reasoning_content"], turn
    [call] = turn["tool_calls"]
    result = {"role": "tool", "tool_call_id": call["id"], "content": "on"}
    again = {"messages": [turn, result], "max_tokens": 4, "tools": [TOOL]}
    api.check(200, "POST", "/v1/chat/completions", again)
    api.check(400, "POST", "/v1/chat/completions", ASKED | {"tool_choice": "required"})


def locked_out(api):
    """The same without the key."""
    other = object.__new__(Api)
    other.__dict__ = api.__dict__ | {"headers": {}}
    return other


def endless(api):
    return {"model": api.model, "prompt": "a", "max_tokens": 3000, "ignore_eos": True} | STREAM


def send_late(api, path):
    """What the server says to a body that does not come."""
    host, port = api.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n"
        connection.sendall(head.encode())
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 "), answer
    return json.loads(body)


def watched(api):
    """The data of the first launches at /debug/steps, while there is work."""
    with api.send("GET", "/debug/steps", stream=True) as steps:
        api.check(200, "POST", "/v1/completions", CONTINUED)
        lines = (line[6:] for line in steps.iter_lines() if line.startswith(b"data: "))
        return list(islice(lines, 3))


def generate(api, *options, auth=""):
    """Runs schemathesis; the number of cases that it has tried."""
    with tempfile.TemporaryDirectory() as folder:
        config, document, report = (Path(folder, name) for name in ("a.toml", "b.json", "c.json"))
        hooks = json.dumps(str(HERE / "schemathesis_hooks.py"))
        config.write_text(CONFIG.format(hooks=hooks, auth=auth))
        document.write_text(json.dumps(api.document))  # from a URL it would not try that URL
        command = [Path(sys.executable).with_name("schemathesis"), "--config-file", config]
        command += ["run", document, "--url", api.url, "--generation-deterministic", "--no-color"]
        command += ["--checks", "all", "--exclude-checks", "positive_data_acceptance"]
        command += ["--report", "json", "--report-json-path", report]
        subprocess.run([*command, *options], check=True, cwd=folder)
        told = json.loads(report.read_text())
    assert told["complete"], told
    assert told["operations"]["errored"] == 0, told
    return told["test_cases"]["generated"]


def main():
    urls = dict(argument.split("=", 1) for argument in sys.argv[1:])
    print(f"schemathesis {version('schemathesis')}", flush=True)
    small, narrow = Api(urls["small"]), Api(urls["narrow"])
    strict = Api(urls["strict"], authorization=f"Bearer {KEY}")
    check_answers(small, strict, narrow)
    print("ok check_answers", flush=True)
    cases = generate(small, "--phases", "examples,coverage")
    cases += generate(small, "--phases", "fuzzing", "--mode", "negative", "-n", "120")
    cases += generate(small, "--phases", "fuzzing", "--mode", "positive", "-n", "120")
    locked = generate(strict, "-n", "10", auth=AUTH)
    print(f"{cases} cases without a key, {locked} with one and strict", flush=True)
    assert cases >= LEAST_CASES, cases


if __name__ == "__main__":
    main()
