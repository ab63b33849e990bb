"""The request bodies of OpenAI's API as this server takes them.

Strict: "5" and true are not integers. An explicit null counts as left out. Fields that nobody
knows are accepted and named to the caller; fields that would change the output in ways not
offered are refused unless they hold the value that changes nothing.

In the JSON schemas of these models a bound that is the server's stands by its name; see
`request_schemas`.
"""

import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from reprlib import repr as short
from typing import Annotated, Any, ClassVar, Literal, Self

import orjson
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)
from pydantic.functional_validators import PlainValidator
from pydantic_core import CoreSchema, ErrorDetails, PydanticCustomError

from duetjax.config import MAX_BIAS, MAX_PRIORITY, InvalidRequest
from duetjax.serve.limits import Limits

NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "best_of": (1,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "audio": (),
    "modalities": (["text"],),
}
WITHOUT_EFFECT = ("user",)


class Body(BaseModel):
    """An object of a request; what it does not know it keeps, to be named to the caller."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        return {k: v for k, v in value.items() if v is not None}

    def unknown_fields(self) -> Iterator[str]:
        """Names of the fields given but unknown, with the path to nested ones."""
        yield from self.model_extra or ()
        for name in type(self).model_fields:
            value = getattr(self, name)
            for index, item in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(item, Body):
                    path = f"{name}[{index}]" if isinstance(value, list) else name
                    yield from (f"{path}.{field}" for field in item.unknown_fields())


def parsed[B: Body](kind: type[B], given: Mapping[str, Any], limits: Limits) -> B:
    """A body of a kind; `InvalidRequest` names the first field at fault."""
    try:
        return kind.model_validate(given, context=limits)
    except ValidationError as error:
        raise _invalid(error.errors(include_url=False)[0]) from None


type ModelName = Annotated[str, WithJsonSchema({"type": "string", "enum": "model_names"})]
"""One that is served, which is for each route to check."""

TEXT = {"type": "string", "maxLength": "max_prompt_characters"}
TOKEN_ID = {"type": "integer", "minimum": 0, "maximum": "last_token_id"}
type TokenId = Annotated[int, WithJsonSchema(TOKEN_ID)]
"""One of the vocabulary, which is for each route to check."""


class StreamOptions(Body):
    """What a stream carries beside its chunks."""

    include_usage: bool = False


def _check_limit(size: int, name: str, unit: str, info: ValidationInfo) -> None:
    """Raises what is told and counted as a request beyond one of the server's `Limits`."""
    most = getattr(info.context, name)
    if size > most:
        raise PydanticCustomError(
            "limit",
            "has {size} {unit}; at most {most} are accepted",
            {"size": size, "unit": unit, "most": most, "limit": name},
        )


@dataclass(frozen=True, slots=True)
class _AtMost:
    """Metadata of a number that a limit bounds."""

    limit: str

    def __get_pydantic_core_schema__(
        self, kind: object, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return AfterValidator(self._check).__get_pydantic_core_schema__(kind, handler)

    def __get_pydantic_json_schema__(
        self, core: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return handler(core) | {"maximum": self.limit}

    def _check(self, value: int, info: ValidationInfo) -> int:
        most = getattr(info.context, self.limit)
        if value > most:
            context = {"value": value, "most": most, "limit": self.limit}
            raise PydanticCustomError("limit", "is {value}; at most {most} is accepted", context)
        return value


@dataclass(frozen=True, slots=True)
class _Bounded:
    """Metadata of a list whose length a limit bounds, before its items are looked at."""

    limit: str
    unit: str

    def __get_pydantic_core_schema__(
        self, kind: object, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return BeforeValidator(self._check).__get_pydantic_core_schema__(kind, handler)

    def __get_pydantic_json_schema__(
        self, core: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return handler(core) | {"maxItems": self.limit}

    def _check(self, value: object, info: ValidationInfo) -> object:
        if isinstance(value, list):
            _check_limit(len(value), self.limit, self.unit, info)
        return value


def _stop_strings(value: object, info: ValidationInfo) -> tuple[str, ...]:
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(s, str) and s for s in strings):
        raise ValueError("must be a non-empty string or a list of them")
    _check_limit(len(strings), "max_stop_strings", "strings", info)
    _check_limit(max(map(len, strings), default=0), "max_stop_characters", "characters", info)
    return tuple(strings)


def _biases(value: object, info: ValidationInfo) -> dict[str, Any]:
    """An object of bounded size; keys and values are `SamplingParams`' business."""
    if not isinstance(value, dict):
        raise ValueError("must be an object of token ids and biases")
    _check_limit(len(value), "max_logit_bias", "entries", info)
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
    logit_bias: Annotated[dict[str, Any], PlainValidator(_biases), WithJsonSchema(_LOGIT_BIAS)] = {}
    seed: int | None = None
    stop: Annotated[tuple[str, ...], PlainValidator(_stop_strings), WithJsonSchema(_STOP)] = ()
    stop_token_ids: Annotated[
        list[TokenId], FailFast(), _Bounded("max_stop_token_ids", "token ids")
    ] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    n: Annotated[int, Field(ge=1), _AtMost("max_n")] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    priority: int = Field(default=0, ge=-MAX_PRIORITY, le=MAX_PRIORITY)
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None

    @classmethod
    def parse(cls, body: Mapping[str, Any], limits: Limits) -> Self:
        """Checks a JSON object; `InvalidRequest` names the first field at fault."""
        given = {k: v for k, v in body.items() if v is not None and k not in WITHOUT_EFFECT}
        for name in [name for name in NEUTRAL if name in given]:
            _check_neutral(name, given.pop(name))
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
    _check_limit(len(value), "max_prompts", "prompts", info)
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

    prompt: Annotated[PromptInput, PlainValidator(_prompts), WithJsonSchema(_PROMPT)]
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0), _AtMost("max_logprobs")] | None = None

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


def _text(value: object) -> str:
    """A message's content; text parts are joined by line feeds, as vLLM does."""
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
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str, PlainValidator(_text), WithJsonSchema(_CONTENT)]
    name: str | None = None
    tool_call_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_tool_calls(cls, value: object) -> object:
        if not isinstance(value, dict) or "tool_calls" not in value:
            return value
        if value["tool_calls"] not in (None, []):
            raise PydanticCustomError("unsupported_parameter", "tool_calls are not supported")
        return {name: given for name, given in value.items() if name != "tool_calls"}

    def as_template_value(self) -> dict[str, str]:
        """What chat templates see; they know OpenAI's developer role as system."""
        value = self.model_dump(include=set(type(self).model_fields), exclude_none=True)
        return value | {"role": "system" if self.role == "developer" else self.role}


type Messages = Annotated[list[Message], FailFast(), _Bounded("max_messages", "messages")]
"""A conversation."""


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    prompt_field = "messages"

    messages: Annotated[Messages, Field(min_length=1)]
    chat_template_kwargs: dict[str, bool | str] = {}
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0), _AtMost("max_top_logprobs")] = 0

    @property
    def asked_logprobs(self) -> int | None:
        """top_logprobs, which needs logprobs."""
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
        return self.top_logprobs if self.logprobs else None


def _check_neutral(name: str, value: object) -> None:
    neutral = NEUTRAL[name]
    if any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in neutral):
        return
    hint = " or send ".join(["leave it out", *(orjson.dumps(v).decode() for v in neutral)])
    raise InvalidRequest(
        f"{name} {short(value)} is not supported; {hint}", param=name, code="unsupported_parameter"
    )


def _invalid(error: ErrorDetails) -> InvalidRequest:
    path = [p if isinstance(p, str) else f"[{p}]" for p in error["loc"]]
    param = ".".join(path).replace(".[", "[")
    message = error["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if error["type"] == "missing":
        message = "is required"
    elif error["type"] not in ("value_error", "unsupported_parameter", "limit"):
        message += f", not {short(error['input'])}"
    code = error["type"] if error["type"] == "unsupported_parameter" else "invalid_value"
    reason = error.get("ctx", {}).get("limit")
    return InvalidRequest(f"{param}: {message}", param=param, code=code, reason=reason)


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
