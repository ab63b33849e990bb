"""The request bodies of OpenAI's API as this server takes them.

Strict: "5" and true are not integers. An explicit null counts as left out. Fields that nobody
knows are accepted and named to the caller; fields that would change the output in ways not
offered are refused unless they hold the value that changes nothing.

In the JSON schemas of these models a bound that is the server's stands by its name; see
`request_schemas`.
"""

import re
from abc import abstractmethod
from collections.abc import Mapping
from reprlib import repr as short
from typing import Annotated, Any, ClassVar, Literal, Self

import orjson
from pydantic import FailFast, Field, ValidationInfo, WithJsonSchema, model_validator
from pydantic.functional_validators import PlainValidator
from pydantic_core import PydanticCustomError

from duetjax.config import MAX_BIAS, MAX_PRIORITY, InvalidRequest
from duetjax.serve.fields import AtMost, Body, Bounded, check_limit, parsed
from duetjax.serve.formats import CalledTool, CallMode, ResponseFormat, ToolChoice, Tools
from duetjax.serve.limits import Limits

NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "best_of": (1,),
    "suffix": ("",),
    "functions": ([],),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "audio": (),
    "modalities": (["text"],),
}
_NO_TOOLS: Mapping[str, tuple[object, ...]] = {"tools": ([],), "tool_choice": ("none", "auto")}
WITHOUT_EFFECT = ("user",)


type ModelName = Annotated[str, WithJsonSchema({"type": "string", "enum": "model_names"})]
"""One that is served, which is for each route to check."""

TEXT = {"type": "string", "maxLength": "max_prompt_characters"}
TOKEN_ID = {"type": "integer", "minimum": 0, "maximum": "last_token_id"}
type TokenId = Annotated[int, WithJsonSchema(TOKEN_ID)]
"""One of the vocabulary, which is for each route to check."""


class StreamOptions(Body):
    """What a stream carries beside its chunks."""

    include_usage: bool = False


def _stop_strings(value: object, info: ValidationInfo) -> tuple[str, ...]:
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(s, str) and s for s in strings):
        raise ValueError("must be a non-empty string or a list of them")
    check_limit(len(strings), "max_stop_strings", "strings", info)
    check_limit(max(map(len, strings), default=0), "max_stop_characters", "characters", info)
    return tuple(strings)


def _biases(value: object, info: ValidationInfo) -> dict[str, Any]:
    """An object of bounded size; keys and values are `SamplingParams`' business."""
    if not isinstance(value, dict):
        raise ValueError("must be an object of token ids and biases")
    check_limit(len(value), "max_logit_bias", "entries", info)
    return value


_STOP_STRING = {"type": "string", "minLength": 1, "maxLength": "max_stop_characters"}
_STOP_STRINGS = {"type": "array", "items": _STOP_STRING, "maxItems": "max_stop_strings"}
_STOP = {"anyOf": [_STOP_STRING, _STOP_STRINGS]}
_LOGIT_BIAS = {
    "type": "object",
    "propertyNames": {"pattern": "^[0-9]{1,10}$"},
    "additionalProperties": {"type": "number", "minimum": -MAX_BIAS, "maximum": MAX_BIAS},
    "maxProperties": "max_logit_bias",
}


class GenerationBody(Body):
    """The fields that both generating routes share; ranges are `SamplingParams`' business."""

    prompt_field: ClassVar[str]  # where the prompt stands, for errors about its length
    neutral: ClassVar[Mapping[str, tuple[object, ...]]] = NEUTRAL

    model: ModelName
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    min_tokens: int = 0
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Annotated[dict[str, Any], PlainValidator(_biases), WithJsonSchema(_LOGIT_BIAS)] = (
        Field(default_factory=dict)
    )
    seed: int | None = None
    stop: Annotated[tuple[str, ...], PlainValidator(_stop_strings), WithJsonSchema(_STOP)] = ()
    stop_token_ids: Annotated[
        list[TokenId], FailFast(), Bounded("max_stop_token_ids", "token ids")
    ] = Field(default_factory=list)
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    n: Annotated[int, Field(ge=1), AtMost("max_n")] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    response_format: ResponseFormat | None = None
    priority: int = Field(default=0, ge=-MAX_PRIORITY, le=MAX_PRIORITY)
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None

    @classmethod
    def parse(cls, body: Mapping[str, Any], limits: Limits) -> Self:
        """Checks a JSON object; `InvalidRequest` names the first field at fault."""
        given = {k: v for k, v in body.items() if v is not None and k not in WITHOUT_EFFECT}
        for name in [name for name in cls.neutral if name in given]:
            _check_neutral(name, given.pop(name), cls.neutral[name])
        checked = parsed(cls, given, limits)
        if checked.stream_options is not None and not checked.stream:
            raise InvalidRequest("stream_options needs stream: true", param="stream_options")
        return checked

    @property
    def asked_max_tokens(self) -> int | None:
        """Under either of its two names; None where the request leaves it open."""
        old, new = self.max_tokens, self.max_completion_tokens
        if None not in (old, new) and old != new:
            raise InvalidRequest(
                f"max_tokens is {old} but max_completion_tokens is {new}; send one of them",
                param="max_tokens",
            )
        return new if old is None else old

    @property
    @abstractmethod
    def asked_logprobs(self) -> int | None:
        """How many of the most likely tokens to report beside each one; None for no logprobs."""


type PromptInput = tuple[str | tuple[int, ...], ...]


def _prompts(value: object, info: ValidationInfo) -> PromptInput:
    """Every spelling of prompt as a tuple of texts or of token id tuples."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not value:
        raise ValueError("must be a string, or a non-empty list of strings or of token ids")
    if type(value[0]) is int:
        return (_token_ids(value),)
    check_limit(len(value), "max_prompts", "prompts", info)
    if all(isinstance(prompt, str) for prompt in value):
        return tuple(value)
    if all(isinstance(prompt, list) and prompt for prompt in value):
        return tuple(_token_ids(prompt) for prompt in value)
    raise ValueError("must be all strings, or all non-empty lists of token ids")


def _token_ids(value: list[Any]) -> tuple[int, ...]:
    if set(map(type, value)) != {int}:
        wrong = next(v for v in value if type(v) is not int)
        raise ValueError(f"has {short(wrong)} among token ids; they must be integers")
    return tuple(value)


_IDS = {"type": "array", "items": TOKEN_ID, "minItems": 1, "maxItems": "max_prompt_tokens"}
_SEVERAL = {"type": "array", "minItems": 1, "maxItems": "max_prompts"}
_PROMPT = {"anyOf": [TEXT, _IDS, {**_SEVERAL, "items": TEXT}, {**_SEVERAL, "items": _IDS}]}


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt_field = "prompt"
    neutral: ClassVar[Mapping[str, tuple[object, ...]]] = {**NEUTRAL, **_NO_TOOLS}

    prompt: Annotated[PromptInput, PlainValidator(_prompts), WithJsonSchema(_PROMPT)]
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0), AtMost("max_logprobs")] | None = None

    @property
    def asked_logprobs(self) -> int | None:
        """As it says."""
        if self.echo and self.logprobs is not None:
            raise InvalidRequest(
                "echo with logprobs is not supported: logprobs are of generated tokens only; leave"
                " one of them out",
                param="echo",
                code="unsupported_parameter",
            )
        return self.logprobs


def _text(value: object, info: ValidationInfo) -> str:
    """A message's content; text parts are joined by line feeds, as vLLM does."""
    if value is None and info.data.get("tool_calls"):
        return ""
    if value is None:
        raise PydanticCustomError("missing", "is required")
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of text parts")
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise PydanticCustomError(
                "unsupported_parameter",
                "has a part of type {kind}; only text parts are supported",
                {"kind": short(kind)},
            )
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError('has a part that is not {"type": "text", "text": "..."}')
    return "\n".join(part["text"] for part in value)


_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": TEXT},
    "required": ["type", "text"],
}
_CONTENT = {"anyOf": [TEXT, {"type": "array", "items": _PART}]}


class Message(Body):
    """One turn of a conversation; only the assistant's has tool_calls, and then perhaps no content.

    reasoning_content: how it came to its answer, for templates that show it.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    tool_calls: Annotated[list[CalledTool], FailFast(), Bounded("max_tools", "tool calls")] = Field(
        default_factory=list
    )
    content: Annotated[str, PlainValidator(_text), WithJsonSchema(_CONTENT)] = Field(
        default=None, validate_default=True
    )
    name: str | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    @model_validator(mode="after")
    def _calls_as_the_assistant(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"of role {self.role} has tool_calls; only the assistant's may")
        return self

    @property
    def num_characters(self) -> int:
        """Of all that a template may show."""
        calls = sum(len(c.function.name) + len(c.function.arguments) for c in self.tool_calls)
        return len(self.content) + len(self.reasoning_content or "") + calls

    def as_template_value(self) -> dict[str, Any]:
        """What chat templates see; they know OpenAI's developer role as system."""
        plain = {"content", "name", "tool_call_id", "reasoning_content"}
        value: dict[str, Any] = self.model_dump(include=plain, exclude_none=True)
        if self.tool_calls:
            value["tool_calls"] = [call.as_template_value() for call in self.tool_calls]
        return {"role": "system" if self.role == "developer" else self.role} | value


type Messages = Annotated[list[Message], FailFast(), Bounded("max_messages", "messages")]
"""A conversation."""


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    prompt_field = "messages"

    messages: Annotated[Messages, Field(min_length=1)]
    chat_template_kwargs: dict[str, bool | str] = Field(default_factory=dict)
    tools: Tools = Field(default_factory=list)
    tool_choice: ToolChoice = CallMode.AUTO
    parallel_tool_calls: bool = True
    max_reasoning_tokens: int | None = Field(default=None, ge=0)
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0), AtMost("max_top_logprobs")] = 0

    @property
    def asked_logprobs(self) -> int | None:
        """top_logprobs, which needs logprobs."""
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
        return self.top_logprobs if self.logprobs else None

    @property
    def calls_tools(self) -> bool:
        """Whether the answer may call tools."""
        return bool(self.tools) and self.tool_choice is not CallMode.NONE


def _check_neutral(name: str, value: object, neutral: tuple[object, ...]) -> None:
    if any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in neutral):
        return
    hint = " or send ".join(["leave it out", *(orjson.dumps(v).decode() for v in neutral)])
    raise InvalidRequest(
        f"{name} {short(value)} is not supported; {hint}", param=name, code="unsupported_parameter"
    )


_PLAIN_NAME = re.compile(r"[A-Za-z0-9_.\[\]-]{1,64}")


def ignored_header(body: Body, *, strict: bool = False) -> dict[str, str]:
    """`x-duetjax-ignored` with the unknown fields' names, for a response; empty if none.

    Names are the client's: what could not stand in a header is shown as "?", and 16 are enough.
    Strict, it raises `InvalidRequest` for the first of them.
    """
    names = []
    if strict and (unknown := next(body.unknown_fields(), None)) is not None:
        raise InvalidRequest(
            f"{short(unknown)} is not a parameter; leave it out",
            param=unknown[:128],
            code="unsupported_parameter",
        )
    for name, _ in zip(body.unknown_fields(), range(16), strict=False):
        names.append(name if _PLAIN_NAME.fullmatch(name) else "?")
    return {"x-duetjax-ignored": ", ".join(names)} if names else {}
