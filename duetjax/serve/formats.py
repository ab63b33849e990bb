"""What requests say of the form of an answer: JSON of a schema, and tools to call."""

import json
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import FailFast, Field, WithJsonSchema, model_validator
from pydantic.functional_validators import PlainValidator

from duetjax.serve.fields import Body, Bounded

_NAME = r"^[a-zA-Z0-9_.-]{1,64}$"


class JsonSchemaFormat(Body):
    """A schema and its name; strict changes nothing, as every schema is kept to."""

    name: Annotated[str, Field(pattern=_NAME)]
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema", default={"type": "object"})
    strict: bool = False


class ResponseFormat(Body):
    """What the whole answer has to be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> Self:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("of type json_schema needs json_schema")
        return self

    @property
    def wanted(self) -> dict[str, Any] | None:
        """The schema of the answer; None for any text."""
        if self.json_schema is not None and self.type == "json_schema":
            return self.json_schema.schema_
        return {"type": "object"} if self.type == "json_object" else None


class FunctionDefinition(Body):
    """A function that the model may call; parameters: the schema of its arguments."""

    name: Annotated[str, Field(pattern=_NAME)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool = False


class Tool(Body):
    """A tool; functions are the only ones."""

    type: Literal["function"]
    function: FunctionDefinition

    def as_template_value(self) -> dict[str, Any]:
        """As OpenAI spells it, which is what chat templates and grammars read."""
        known = set(type(self.function).model_fields) & self.function.model_fields_set
        given = {name: getattr(self.function, name) for name in type(self.function).model_fields}
        return {
            "type": self.type,
            "function": {name: value for name, value in given.items() if name in known},
        }


class CallMode(StrEnum):
    """Whether the answer may, must or must not call tools."""

    NONE = "none"
    AUTO = "auto"
    REQUIRED = "required"


class NamedFunction(Body):
    """The function that must be called."""

    name: str


class NamedTool(Body):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


def _tool_choice(value: object) -> CallMode | NamedTool:
    if isinstance(value, str) and value in list(CallMode):
        return CallMode(value)
    match value:
        case {"type": "function", "function": {"name": str()}}:
            return NamedTool.model_validate(value)
    raise ValueError(
        'must be "none", "auto", "required" or {"type": "function", "function": {"name": "..."}}'
    )


_NAMED = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "properties": {"name": {"type": "string"}},
            "required": ["name"],
        },
    },
    "required": ["type", "function"],
}
_CHOICE = {"anyOf": [{"enum": list(CallMode)}, _NAMED]}

type Tools = Annotated[list[Tool], FailFast(), Bounded("max_tools", "tools")]
"""All that the model may call."""
type ToolChoice = Annotated[
    CallMode | NamedTool, PlainValidator(_tool_choice), WithJsonSchema(_CHOICE)
]
"""Every spelling of tool_choice."""


class CalledFunction(Body):
    """A call of an earlier turn; arguments: the text of a JSON object."""

    name: str
    arguments: str

    @model_validator(mode="after")
    def _has_json_arguments(self) -> Self:
        if not isinstance(_json(self.arguments), dict):
            raise ValueError("has arguments that are not the text of a JSON object")
        return self


class CalledTool(Body):
    """A tool call in the assistant's turn."""

    id: str
    type: Literal["function"]
    function: CalledFunction

    def as_template_value(self) -> dict[str, Any]:
        """What chat templates read: the arguments as an object."""
        function = {"name": self.function.name, "arguments": _json(self.function.arguments)}
        return {"id": self.id, "type": self.type, "function": function}


def _json(text: str) -> Any:  # noqa: ANN401
    """Of arguments as a model wrote them, with numbers of any size; "" says that there are none."""
    try:
        text.encode()
        value = json.loads(text or "{}", parse_constant=_no_constant)
        json.dumps(value, ensure_ascii=False).encode()  # half a character may be spelled, too
        return value
    except (ValueError, RecursionError):
        return None


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")
