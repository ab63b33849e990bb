"""Schemas and tools that are hostile, or that contradict what else is asked."""

from typing import Any

from faults import Faults
from faulty import asking, harm, lifted, server, setting

from duetjax.constrain import grammars
from duetjax.serve import form
from duetjax.text.answer import ToolStyle

FAULTS = Faults("Schemas and tools", server, harm)
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]
CALLS = {"tool_style": ToolStyle.HERMES}

unchecked = setting(form, "_look", lambda *_: None)


def keeping(schema: dict[str, Any]):
    """An attack: an answer of this schema."""
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    return asking(COMPLETIONS, prompt="a", max_tokens=1, response_format=wanted)


def nested(depth: int) -> dict[str, Any]:
    """Lists in lists."""
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


FAULTS.add(
    "a schema of 1 MB",
    keeping({"description": "x" * 2**20}),
    expected="400 invalid_value",
    guard="max_schema_bytes",
    off=lifted("max_schema_bytes"),
)
FAULTS.add(
    "a schema 150 deep",
    keeping(nested(75)),
    expected="400 invalid_value",
    guard="max_schema_depth",
    off=setting(grammars, "_measured", lambda *_: (0, 0.0)),
)
for name, schema in (
    (
        "a schema that refers to itself alone",
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
    ),
    ("a schema with a keyword that is not enforced", {"not": {"type": "string"}}),
    ("a pattern that is none", {"type": "string", "pattern": "("}),
):
    FAULTS.add(
        name,
        keeping(schema),
        expected="400 invalid_value",
        guard="the look at a grammar before the engine's",
        off=unchecked,
    )


def calling(**asked: Any):
    """An attack: a conversation with tools."""
    tool = {"type": "function", "function": {"name": "f"}}
    return asking(CHAT, messages=HELLO, max_tokens=1, **{"tools": [tool]} | asked)


for name, attack, expected in (
    (
        "a call that is required, of no tool",
        calling(tools=[], tool_choice="required"),
        "400 invalid_value",
    ),
    (
        "two tools of one name",
        calling(tools=[{"type": "function", "function": {"name": "f"}}] * 2),
        "400 invalid_value",
    ),
):
    FAULTS.add(
        name,
        attack,
        expected=expected,
        guard="the look at tools",
        off=setting(form, "check_tools", lambda *_: None),
        settings=CALLS,
    )
FAULTS.add(
    "10^4 tools",
    calling(tools=[{"type": "function", "function": {"name": f"f{i}"}} for i in range(10**4)]),
    expected="400 invalid_value",
    guard="max_tools",
    off=lifted("max_tools"),
    settings=CALLS,
)

test_guarded, test_unguarded = FAULTS.tests()
