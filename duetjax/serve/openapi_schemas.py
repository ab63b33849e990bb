"""The JSON schemas of all that requests and answers hold, with one server's bounds in them.

Pydantic makes them of their types; what those leave to others to check is added here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, override

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from duetjax.config import INTEGER_RANGES, MAX_STOP_IDS, RANGES
from duetjax.serve.answer_types import ANSWERS
from duetjax.serve.context import Service
from duetjax.serve.debug import FOR_TRACES
from duetjax.serve.protocol import WITHOUT_EFFECT, ChatBody, CompletionBody
from duetjax.serve.tokenization import MOST_TOKENS_A_POSITION, DetokenizeBody, TokenizeBody

type Schema = dict[str, Any]

_GENERATING = (ChatBody, CompletionBody)
_TYPES = (*_GENERATING, TokenizeBody, DetokenizeBody, *ANSWERS)
_NULL = {"type": "null"}
_NOT_NULL = {"not": _NULL}
_BY_NAME = ("enum", "maximum", "maxItems", "maxLength", "maxProperties")

_NOTES = {
    "max_tokens": "A prompt and its output have at most {max_model_len} tokens.",
    "max_completion_tokens": "Another name of max_tokens; where both are sent they must agree.",
    "min_tokens": "At most max_tokens.",
    "top_k": "0 and -1 keep all tokens.",
    "logit_bias": "By token id.",
    "stop": "Ends the text before it.",
    "stop_token_ids": f"With the model's own end-of-sequence ids at most {MAX_STOP_IDS}.",
    "n": "For each prompt; prompts x n is at most {max_choices}.",
    "stream_options": "Needs stream: true.",
    "priority": "Lower goes first.",
    "cache_salt": "Computed prompts are shared by requests with the same one alone.",
    "prompt": "Has at least one token.",
    "messages": "Together at most {max_prompt_characters} characters.",
    "response_format": "Not beside tools that may be called. A schema is kept to, strict or not; it"
    " has at most {max_schema_bytes} bytes, and {max_schema_depth} levels.",
    "tools": "Need a server started with --tool-call-parser.",
    "tool_choice": "Without it auto, where there are tools.",
    "max_reasoning_tokens": "Needs a server started with --reasoning-parser.",
    "chat_template_kwargs": "Only variables that the model's chat template names.",
    "top_logprobs": "Needs logprobs: true.",
    "echo": "Not together with logprobs.",
}
"""What a schema cannot say of the fields of generating requests."""


def schemas(service: Service, error_codes: tuple[str, ...]) -> dict[str, Schema]:
    """Of every type by name, as they stand in an OpenAPI document's components."""
    _, document = TypeAdapter.json_schemas(
        [(kind, "validation", TypeAdapter(kind)) for kind in _TYPES],
        ref_template="#/components/schemas/{model}",
        schema_generator=_Untitled,
    )
    named: dict[str, Schema] = document["$defs"]
    for kind in _GENERATING:
        _complete(named[kind.__name__]["properties"], kind.neutral)
    if service.reasoning_style is None:
        _refuse(named["ChatBody"]["properties"], "max_reasoning_tokens")
    _complete_forms(named)
    named["TokenizeBody"]["oneOf"] = [
        {"properties": {name: {"type": kind}}, "required": [name]}
        for name, kind in (("prompt", "string"), ("messages", "array"))
    ]
    _complete_limits(named["Limits"])
    _complete_launch(named["CompletedLaunch"])
    for schema in named.values():
        if schema.get("additionalProperties"):  # a request's
            schema["additionalProperties"] = not service.strict_params
            _allow_nulls(schema)
        elif "properties" in schema:
            schema["additionalProperties"] = False
    bounded: dict[str, Schema] = _with_bounds(named, _bounds(service, error_codes))
    return bounded


class _Untitled(GenerateJsonSchema):
    """Without a title for each field, which would say its name once more."""

    @override
    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def _complete(properties: dict[str, Schema], neutral: Mapping[str, Sequence[object]]) -> None:
    """Adds what `SamplingParams` and `GenerationBody.parse` check."""
    for name, (least, most) in {**RANGES, **INTEGER_RANGES}.items():
        properties[name] |= {"minimum": least, "maximum": most}
    properties["top_p"] |= {"exclusiveMinimum": 0, "maximum": 1}
    for name in ("max_tokens", "max_completion_tokens", "min_tokens"):
        least = 0 if name == "min_tokens" else 1
        properties[name] |= {"minimum": least, "maximum": "max_prompt_tokens"}
    for name, values in neutral.items():
        properties[name] = {"enum": [*values, None], "description": "Other values are refused."}
    for name in WITHOUT_EFFECT:
        properties[name] = {"description": "Without effect."}
    for name in _NOTES.keys() & properties.keys():
        properties[name]["description"] = _NOTES[name]


def _refuse(properties: dict[str, Schema], name: str) -> None:
    """Leaves nothing but null."""
    properties[name] = {"enum": [None], "description": properties[name]["description"]}


def _complete_forms(named: dict[str, Schema]) -> None:
    """Adds what joins the fields of messages and of response formats."""
    assistant = {"role": {"const": "assistant"}}
    named["Message"]["anyOf"] = [
        {
            "required": ["content"],
            "properties": {"content": _NOT_NULL, "tool_calls": {"maxItems": 0}},
        },
        {"required": ["content"], "properties": {**assistant, "content": _NOT_NULL}},
        {
            "required": ["tool_calls"],
            "properties": {**assistant, "tool_calls": {"type": "array", "minItems": 1}},
        },
    ]
    named["ResponseFormat"]["anyOf"] = [
        {"properties": {"type": {"enum": ["text", "json_object"]}}},
        {"required": ["json_schema"], "properties": {"json_schema": _NOT_NULL}},
    ]
    named["CalledFunction"]["properties"]["arguments"] |= {
        "contentMediaType": "application/json",
        "contentSchema": {"type": "object"},
    }


def _complete_launch(schema: Schema) -> None:
    """Leaves out and adds what /debug/steps does."""
    for name in FOR_TRACES:
        del schema["properties"][name]
        schema["required"].remove(name)
    schema["properties"]["dropped"] = {
        "type": "integer",
        "description": "Launches before this one that came too fast for the watcher.",
    }


def _complete_limits(schema: Schema) -> None:
    """Adds what `Limits.document` adds; it leaves nothing out."""
    properties = schema["properties"]
    for each in properties.values():
        del each["default"]
    properties |= {name: {"type": "integer"} for name in ("max_model_len", "max_num_seqs")}
    schema["required"] = list(properties)


def _allow_nulls(schema: Schema) -> None:
    """What may be left out may be null, as `Body` reads it."""
    properties = schema["properties"]
    for name in properties.keys() - set(schema.get("required", ())):
        field = properties[name]
        options = [each for each in field.pop("anyOf", ()) if each != _NULL]
        if len(options) == 1 and isinstance(options[0].get("type"), str):
            field |= options.pop()
        if "$ref" in field:
            options = [{"$ref": field.pop("$ref")}]
        if options:
            field["anyOf"] = [*options, _NULL]
        elif "type" in field:
            field["type"] = [field["type"], "null"]


def _bounds(service: Service, error_codes: tuple[str, ...]) -> Mapping[str, Any]:
    """All that stands by its name in a schema."""
    longest = service.max_model_len
    return asdict(service.limits) | {
        "max_model_len": longest,
        "max_prompt_characters": service.limits.characters(longest),
        "max_prompt_tokens": longest - 1,
        "max_detokenized": MOST_TOKENS_A_POSITION * longest,
        "last_token_id": service.vocab_size - 1,
        "model_names": list(service.model_names),
        "error_codes": list(error_codes),
    }


def _with_bounds(value: Any, bounds: Mapping[str, Any], key: str = "") -> Any:  # noqa: ANN401
    """A schema, or a part of one that stands under `key`, with names replaced."""
    if isinstance(value, dict):
        return {name: _with_bounds(part, bounds, name) for name, part in value.items()}
    if isinstance(value, list):
        return [_with_bounds(part, bounds) for part in value]
    if not isinstance(value, str):
        return value
    if key == "description":
        return value.format_map(bounds)
    return bounds[value] if key in _BY_NAME else value
