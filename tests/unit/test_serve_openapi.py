"""GET /openapi.json: that it says what the routes do. `make check-schema` asks with many bodies."""

import ast
from dataclasses import fields
from pathlib import Path

import pytest
from serve_setup import MODEL, make_service

import duetjax
from duetjax.serve.app import create_app
from duetjax.serve.auth import PUBLIC_PATHS
from duetjax.serve.limits import Limits
from duetjax.serve.openapi import document
from duetjax.text.answer import ReasoningStyle

BODIES = {
    "/v1/completions": "CompletionBody",
    "/v1/chat/completions": "ChatBody",
    "/tokenize": "TokenizeBody",
    "/detokenize": "DetokenizeBody",
}
OF_A_BODY = [
    each.name
    for each in fields(Limits)
    if each.name.startswith("max_") and "header" not in each.name and "queued" not in each.name
]


@pytest.fixture(scope="module")
def told(http):
    return http.get("/openapi.json").json()


@pytest.fixture(scope="module")
def written(folder, served):
    """The document of a server with other settings."""

    def write(**settings):
        service = make_service(folder, served.engine, **settings)
        return document(service, create_app(service).routes)

    return write


def example_of(told, path):
    return told["paths"][path]["post"]["requestBody"]["content"]["application/json"]["example"]


def operations(told):
    return {
        (method.upper(), path): operation
        for path, methods in told["paths"].items()
        for method, operation in methods.items()
    }


def leaves(value, path=()):
    """Everything in a document that holds nothing else, by its path."""
    inside = value.items() if isinstance(value, dict) else enumerate(value)
    for name, part in inside:
        if isinstance(part, dict | list | tuple) and part:
            yield from leaves(part, (*path, name))
        else:
            yield (*path, name), part


def test_its_operations_are_the_routes(folder, served, told):
    routes = create_app(make_service(folder, served.engine)).routes
    table = {(m, route.path_format) for route in routes for m in route.methods - {"HEAD"}}
    assert operations(told).keys() == table
    names = [operation["operationId"] for operation in operations(told).values()]
    assert len(set(names)) == len(names)


def test_it_is_the_same_whatever_the_client_would_like(http):
    plain, picky = (http.get("/openapi.json", headers={"accept": a}) for a in ("*/*", "text/html"))
    assert plain.content == picky.content
    assert plain.headers["content-type"] == picky.headers["content-type"] == "application/json"
    assert plain.json()["openapi"] == "3.1.0"


def test_every_reference_leads_somewhere_and_no_bound_is_left_as_a_name(told):
    for path, value in leaves(told):
        if path[-1] == "$ref":
            target = told
            for step in value.removeprefix("#/").split("/"):
                target = target[step]
        if path[-1] in ("maximum", "minimum", "maxItems", "maxLength", "maxProperties"):
            assert isinstance(value, int | float), path
        assert not (isinstance(value, str) and "{max_" in value), path


@pytest.mark.parametrize("name", OF_A_BODY)
def test_each_limit_of_a_body_stands_there_as_it_is_set(written, told, name):
    before = dict(leaves(told))
    changed = [
        value
        for path, value in leaves(written(limits=Limits(**{name: 3})))
        if before.get(path) != value
    ]
    assert changed
    assert all(v == 3 or (isinstance(v, str) and " 3 " in f"{v[:-1]} ") for v in changed), changed


def test_bounds_of_the_model_stand_there(written):
    schemas = written(max_model_len=77, vocab_size=55)["components"]["schemas"]
    assert schemas["CompletionBody"]["properties"]["max_tokens"]["maximum"] == 76
    assert schemas["TokenId"]["maximum"] == 54
    assert schemas["ModelName"]["enum"] == [MODEL, "abc/alias"]


NUMBERS = [
    *("max_tokens", "max_completion_tokens", "min_tokens", "temperature", "top_p", "top_k"),
    *("min_p", "repetition_penalty", "frequency_penalty", "presence_penalty", "seed", "n"),
    *("priority", "logprobs", "top_logprobs"),
]


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_is_taken_up_to_its_bounds_and_no_further(http, told, name):
    path = "/v1/chat/completions" if name == "top_logprobs" else "/v1/completions"
    schema = told["components"]["schemas"][BODIES[path]]["properties"][name]
    step = 1 if "integer" in schema["type"] else 2**-10
    least, most = schema.get("minimum"), schema["maximum"]
    body = example_of(told, path) | {"prompt": "a", "max_tokens": 1, "logprobs": True}
    if path == "/v1/completions":
        del body["logprobs"]
    if name == "max_completion_tokens":
        del body["max_tokens"]
    if name == "min_tokens":
        body["max_tokens"] = most

    def status(value):
        return http.post(path, json=body | {name: value}).status_code

    assert (status(most), status(most + step)) == (200, 400)
    if least is None:
        assert (status(schema["exclusiveMinimum"]), status(step)) == (400, 200)
    else:
        assert (status(least), status(least - step)) == (200, 400)


def test_no_number_with_bounds_was_forgotten(told):
    schemas = told["components"]["schemas"]
    properties = schemas["CompletionBody"]["properties"] | schemas["ChatBody"]["properties"]
    assert {name for name, schema in properties.items() if "maximum" in schema} | {
        "logprobs"  # a boolean in chats
    } == set(NUMBERS)


@pytest.mark.parametrize("path", BODIES)
def test_its_examples_are_taken_with_null_for_whatever_may_be_null(http, told, path):
    example = example_of(told, path)
    assert http.post(path, json=example).status_code == 200
    schema = told["components"]["schemas"][BODIES[path]]
    optional = schema["properties"].keys() - set(schema["required"]) - example.keys()
    for name in optional:
        field = schema["properties"][name]
        kinds = field.get("type", []), field.get("anyOf", []), field.get("enum", [])
        may_be_null = "null" in kinds[0] or {"type": "null"} in kinds[1] or None in kinds[2]
        assert may_be_null or name == "user", name
    assert http.post(path, json=example | dict.fromkeys(optional)).status_code == 200


def test_unknown_fields_are_forbidden_where_the_server_is_strict(written, told):
    for settings, expected in (({}, True), ({"strict_params": True}, False)):
        schemas = written(**settings)["components"]["schemas"]
        forms = ("ResponseFormat", "JsonSchemaFormat", "Tool", "FunctionDefinition", "CalledTool")
        for name in (*BODIES.values(), *forms, "CalledFunction", "Message", "StreamOptions"):
            assert schemas[name]["additionalProperties"] is expected
        assert schemas["ChatCompletion"]["additionalProperties"] is False


def test_a_budget_of_reasoning_is_there_where_the_server_knows_reasoning(written):
    name = "max_reasoning_tokens"
    for style, expected in ((None, False), (ReasoningStyle.QWEN3, True)):
        schemas = written(reasoning_style=style)["components"]["schemas"]
        field = schemas["ChatBody"]["properties"][name]
        assert ("integer" in field.get("type", ())) is expected, field
        assert (field.get("enum") == [None]) is not expected, field
        assert "--reasoning-parser" in field["description"]


def test_a_key_is_asked_for_where_the_server_asks_for_it(written, told):
    assert "securitySchemes" not in told["components"]
    assert all("401" not in each["responses"] for each in operations(told).values())
    for metrics_public in (False, True):
        locked = written(api_key="x", metrics_public=metrics_public)
        assert locked["components"]["securitySchemes"].keys() == {"bearer"}
        public = PUBLIC_PATHS.union(["/metrics"] if metrics_public else [])
        for (_, path), operation in operations(locked).items():
            assert ("security" in operation) == (path not in public), path
            assert ("401" in operation["responses"]) == (path not in public), path


def test_every_code_that_the_server_gives_is_there(told):
    serve = Path(duetjax.__file__).parent / "serve"
    written = []
    for file in serve.glob("*.py"):
        calls = [x for x in ast.walk(ast.parse(file.read_text())) if isinstance(x, ast.Call)]
        faults = [call for call in calls if getattr(call.func, "id", "") == "HttpError"]
        written += [argument for call in faults for argument in call.args[1:2]]
        written += [k.value for call in calls for k in call.keywords if k.arg == "code"]
    given = {each.value for each in written if isinstance(each, ast.Constant)}
    assert len(given) > 10
    assert given <= set(told["components"]["schemas"]["Code"]["enum"])
    error = told["components"]["schemas"]["Fault"]
    assert set(error["required"]) == {"message", "type", "param", "code"}
