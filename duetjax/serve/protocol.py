"""The request bodies of OpenAI's API as this server takes them.

Strict: "5" and true are not integers. An explicit null counts as left out. Fields that nobody
knows are accepted and named to the caller; fields that would change the output in ways not
offered are refused unless they hold the value that changes nothing.
"""

import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from reprlib import repr as short
from typing import Annotated, Any, ClassVar, Literal, Self

import orjson
from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError, model_validator
from pydantic.functional_validators import PlainValidator
from pydantic_core import ErrorDetails, PydanticCustomError

from duetjax.config import (
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_PRIORITY,
    MAX_STOP_IDS,
    InvalidRequest,
)

MAX_N = 8
MAX_PROMPTS = 32
MAX_MESSAGES = 1024
MAX_STOPS, MAX_STOP_CHARACTERS = 4, 256
MAX_COMPLETION_LOGPROBS = 5
"""Of what one request may hold."""

_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "best_of": (1,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "audio": (),
    "modalities": (["text"],),
}
_WITHOUT_EFFECT = ("user",)


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


def parsed[B: Body](kind: type[B], given: Mapping[str, Any]) -> B:
    """A body of a kind; `InvalidRequest` names the first field at fault."""
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise _invalid(error.errors(include_url=False)[0]) from None


class StreamOptions(Body):
    """What a stream carries beside its chunks."""

    include_usage: bool = False


def _stop_strings(value: object) -> tuple[str, ...]:
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(s, str) and s for s in strings):
        raise ValueError("must be a non-empty string or a list of them")
    if len(strings) > MAX_STOPS or any(len(s) > MAX_STOP_CHARACTERS for s in strings):
        raise ValueError(
            f"may have at most {MAX_STOPS} strings of at most {MAX_STOP_CHARACTERS} characters"
        )
    return tuple(strings)


def _biases(value: object) -> dict[str, Any]:
    """An object of bounded size; keys and values are `SamplingParams`' business."""
    if not isinstance(value, dict):
        raise ValueError("must be an object of token ids and biases")
    if len(value) > MAX_LOGIT_BIAS:
        raise ValueError(f"has {len(value)} entries; at most {MAX_LOGIT_BIAS} are possible")
    return value


class GenerationBody(Body):
    """The fields that both generating routes share; ranges are `SamplingParams`' business."""

    prompt_field: ClassVar[str]  # where the prompt stands, for errors about its length

    model: str
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
    logit_bias: Annotated[dict[str, Any], PlainValidator(_biases)] = {}
    seed: int | None = None
    stop: Annotated[tuple[str, ...], PlainValidator(_stop_strings)] = ()
    stop_token_ids: Annotated[list[int], FailFast(), Field(max_length=MAX_STOP_IDS)] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    n: int = Field(default=1, ge=1, le=MAX_N)
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    priority: int = Field(default=0, ge=-MAX_PRIORITY, le=MAX_PRIORITY)
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None

    @classmethod
    def parse(cls, body: Mapping[str, Any]) -> Self:
        """Checks a JSON object; `InvalidRequest` names the first field at fault."""
        given = {k: v for k, v in body.items() if v is not None and k not in _WITHOUT_EFFECT}
        for name in [name for name in _NEUTRAL if name in given]:
            _check_neutral(name, given.pop(name))
        checked = parsed(cls, given)
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


def _prompts(value: object) -> PromptInput:
    """Every spelling of prompt as a tuple of texts or of token id tuples."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not value:
        raise ValueError("must be a string, or a non-empty list of strings or of token ids")
    if type(value[0]) is int:
        return (_token_ids(value),)
    if len(value) > MAX_PROMPTS:
        raise ValueError(f"has {len(value)} prompts; at most {MAX_PROMPTS} per request")
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


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt_field = "prompt"

    prompt: Annotated[PromptInput, PlainValidator(_prompts)]
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MAX_COMPLETION_LOGPROBS)] | None = None

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
        if kind is None or not isinstance(part.get("text"), str):
            raise ValueError('has a part that is not {"type": "text", "text": "..."}')
    return "\n".join(part["text"] for part in value)


class Message(Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str, PlainValidator(_text)]
    name: str | None = None
    tool_call_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_tool_calls(cls, value: object) -> object:
        if isinstance(value, dict) and value.get("tool_calls"):
            raise PydanticCustomError("unsupported_parameter", "tool_calls are not supported")
        return value

    def as_template_value(self) -> dict[str, str]:
        """What chat templates see; they know OpenAI's developer role as system."""
        value = self.model_dump(include=set(type(self).model_fields), exclude_none=True)
        return value | {"role": "system" if self.role == "developer" else self.role}


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    prompt_field = "messages"

    messages: Annotated[list[Message], FailFast(), Field(min_length=1, max_length=MAX_MESSAGES)]
    chat_template_kwargs: dict[str, bool | str] = {}
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] = 0

    @property
    def asked_logprobs(self) -> int | None:
        """top_logprobs, which needs logprobs."""
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
        return self.top_logprobs if self.logprobs else None


def _check_neutral(name: str, value: object) -> None:
    neutral = _NEUTRAL[name]
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
    elif error["type"] not in ("value_error", "unsupported_parameter"):
        message += f", not {short(error['input'])}"
    code = error["type"] if error["type"] == "unsupported_parameter" else "invalid_value"
    return InvalidRequest(f"{param}: {message}", param=param, code=code)


_PLAIN_NAME = re.compile(r"[A-Za-z0-9_.\[\]-]{1,64}")


def ignored_header(body: GenerationBody) -> dict[str, str]:
    """`x-duetjax-ignored` with the unknown fields' names, for a response; empty if none.

    Names are the client's: what could not stand in a header is shown as "?", and 16 are enough.
    """
    names = []
    for name, _ in zip(body.unknown_fields(), range(16), strict=False):
        names.append(name if _PLAIN_NAME.fullmatch(name) else "?")
    return {"x-duetjax-ignored": ", ".join(names)} if names else {}
