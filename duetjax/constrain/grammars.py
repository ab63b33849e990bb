"""Grammars as llguidance takes them, made of what requests bring, and the bounds that they keep.

Text of clients is never a program here: a schema is compiled to automata under bounds of size,
depth and work, and a regular expression in it is matched by derivatives, without backtracking.
"""

import functools
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from duetjax.config import InvalidRequest, SamplingParams, StructuredOutputsParams

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

LIMITS: Final = LLParserLimits(
    initial_lexer_fuel=500_000,
    step_lexer_fuel=100_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)
"""Of work and size, at most some 20 ms to compile and some 10 ms for each token."""
_MOST_BYTES: Final = 1 << 20
_MOST_DEPTH: Final = 200
"""Of schemas that a program brings, which is no stranger."""
_LAYOUT: Final["JsonCompileOptions"] = {
    "item_separator": ", ",
    "key_separator": ": ",
    "whitespace_flexible": False,
}
"""On one line, as Python writes it: with free space, a model can write nothing else for ever."""


def json_grammar(
    schema: Mapping[str, Any] | bool,
    *,
    max_bytes: int,
    max_depth: int,
    param: str,
    lenient: bool = False,
) -> str:
    """The grammar of the JSON texts that are valid against a schema.

    lenient: keywords that cannot be enforced are passed over. Raises `InvalidRequest` for a schema
    beyond the bounds; all else that may be wrong with it is found by `fault`.
    """
    if _depth(schema, max_depth) > max_depth:
        raise InvalidRequest(
            f"the schema is nested more than {max_depth} deep; make it flatter",
            param=param,
            reason="max_schema_depth",
        )
    try:
        size = len(json.dumps(schema))
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"the schema is not JSON: {error}", param=param) from None
    if size > max_bytes:
        raise InvalidRequest(
            f"the schema has {size} bytes; at most {max_bytes} are accepted",
            param=param,
            reason="max_schema_bytes",
        )
    wanted: Any = schema if isinstance(schema, Mapping) else json.dumps(schema)
    return LLMatcher.grammar_from_json_schema(wanted, overrides={**_LAYOUT, "lenient": lenient})


def grammar_of(wanted: StructuredOutputsParams) -> str:
    """The grammar of what a program asks for; raises `InvalidRequest` if it cannot be used."""
    if wanted.json is not None or wanted.json_object:
        grammar = json_grammar(
            {"type": "object"} if wanted.json is None else _parsed(wanted.json),
            max_bytes=_MOST_BYTES,
            max_depth=_MOST_DEPTH,
            param="structured_outputs",
        )
    elif wanted.regex is not None:
        grammar = LLMatcher.grammar_from_regex(wanted.regex)
    elif wanted.choice is not None:
        texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in wanted.choice)
        grammar = LLMatcher.grammar_from_lark(f"start: {texts}")
    else:
        grammar = LLMatcher.grammar_from_lark(wanted.grammar or "")
    if reason := fault(grammar):
        raise InvalidRequest(
            f"structured_outputs cannot be used: {reason}", param="structured_outputs"
        )
    return grammar


def check_together(params: SamplingParams) -> None:
    """Raises `InvalidRequest` for parameters that forbid the end of an answer under a grammar."""
    for name, given in (("min_tokens", params.min_tokens), ("ignore_eos", params.ignore_eos)):
        if given:
            raise InvalidRequest(
                f"{name} {given!r} cannot be kept where the answer has to follow a grammar, which"
                f" says where it ends; leave {name} out",
                param=name,
            )


def fault(grammar: str) -> str:
    """Why a grammar cannot be used, in a line; empty where it can."""
    matcher = LLMatcher(_byte_tokenizer(), grammar, log_level=0, limits=LIMITS)
    if not matcher.is_error():
        matcher.compute_bitmask()
    if not matcher.is_error():
        return ""
    error = matcher.get_error().replace("<non-verbose/>", "")
    if error.startswith("NoExtension"):
        return "nothing can match it"
    return " ".join(error.split())[:300]


@functools.cache
def _byte_tokenizer() -> LLTokenizer:
    """Of any model's text, so that a grammar's first token can be looked at."""
    return LLTokenizer("byte")


def _parsed(schema: Mapping[str, Any] | str) -> Any:  # noqa: ANN401 - JSON
    try:
        return json.loads(schema) if isinstance(schema, str) else schema
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(
            f"structured_outputs.json is not JSON: {error}", param="structured_outputs"
        ) from None


def _depth(schema: object, most: int) -> int:
    """How deep objects and lists are nested, counted to one more than `most`."""
    level, depth = [schema], 0
    while level and depth <= most:
        inner: list[object] = []
        for value in level:
            if isinstance(value, Mapping):
                inner += value.values()
            elif isinstance(value, list):
                inner += value
        level, depth = inner, depth + bool(inner)
    return depth
