"""Grammars of tool calls: whatever tokens they allow, the answer's calls fit their schemas."""

import json
from collections.abc import Mapping
from pathlib import Path
from random import Random

import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from duetjax.config import InvalidRequest
from duetjax.text.answer import AnswerParser, ToolStyle
from duetjax.text.tokenizer import Tokenizer as ServedTokenizer
from duetjax.text.tool_grammar import tool_grammar

DEMO = Path(__file__).resolve().parents[2] / "checkpoints/demo/tokenizer.json"
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
END = "<|end|>"

CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 8},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "unit": {"enum": ["C", "F"]},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
}
TREE = {
    "type": "object",
    "properties": {"root": {"$ref": "#/$defs/node"}},
    "required": ["root"],
    "additionalProperties": False,
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "leaf": {"type": "boolean"},
                "kids": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 1},
            },
            "required": ["leaf"],
            "additionalProperties": False,
        }
    },
}
EMPTY = {"type": "object", "properties": {}, "additionalProperties": False}


def tool(name, parameters=None, **more):
    given = {} if parameters is None else {"parameters": parameters}
    return {"type": "function", "function": {"name": name, **given, **more}}


TOOLS = [tool("weather", CITY, strict=True), tool("weather_tree", TREE), tool("now", EMPTY)]


def fits(value, schema, root):
    """Whether a value is valid against one of the schemas above."""
    if "$ref" in schema:
        return fits(value, root["$defs"][schema["$ref"].rpartition("/")[2]], root)
    if "enum" in schema:
        return value in schema["enum"]
    match schema["type"]:
        case "object":
            known = schema["properties"]
            return (
                isinstance(value, Mapping)
                and set(schema.get("required", ())) <= set(value) <= set(known)
                and all(fits(v, known[k], root) for k, v in value.items())
            )
        case "array":
            items = schema["items"]
            return len(value) <= schema["maxItems"] and all(fits(v, items, root) for v in value)
        case "boolean":
            return isinstance(value, bool)
        case "integer":
            return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
        case "string":
            return isinstance(value, str) and len(value) <= schema["maxLength"]


def of_calls():
    """A tokenizer that learned from calls: its tokens cross the frame and the arguments."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    said = json.dumps({"name": "weather", "arguments": {"city": "Rome", "unit": "C"}})
    tree = json.dumps({"name": "now", "parameters": {"root": {"leaf": True, "kids": []}}})
    tokenizer.train_from_iterator([said, tree, "{}}", '"}}\n', '": {}}\n'] * 8, trainer)
    return tokenizer


def with_tags(tokenizer):
    """As in Qwen's tokenizers: each tag one added token, which is not called special."""
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    return tokenizer


class Model:
    """A tokenizer and what llguidance makes of it."""

    def __init__(self, backend):
        self.backend = backend
        self.end = backend.token_to_id(END)
        self.matched = LLTokenizer(backend.to_str(), eos_token=self.end)
        added = ServedTokenizer(backend.to_str().encode()).added_ids
        self.tag_ids = {tag: added[tag] for tag in TAGS if tag in added}
        closing = ('"', "}", "]", "/", ",", "</think>")
        self.closing = {backend.token_to_id(text) for text in closing} - {None}

    def grammar(self, style, tools=TOOLS, **options):
        return tool_grammar(style, tools, tag_ids=self.tag_ids, **{"parallel": False, **options})

    def allowed(self, matcher):
        mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        return np.flatnonzero(np.unpackbits(mask, bitorder="little")).tolist()

    def walk(self, grammar, dice, opening=""):
        """An answer of tokens that the grammar allows; it ends where it can, half of the time."""
        matcher = LLMatcher(self.matched, grammar)
        tokens = self.backend.encode(opening, add_special_tokens=False).ids
        assert matcher.try_consume_tokens(tokens) == len(tokens)
        while len(tokens) < 2000:
            allowed = self.allowed(matcher)
            assert not matcher.is_error(), matcher.get_error()
            if allowed == [self.end] or (self.end in allowed and dice.random() < 0.5):
                return self.backend.decode(tokens, skip_special_tokens=False)
            allowed = [token for token in allowed if token != self.end]
            closing = self.closing.intersection(allowed)
            choices = sorted(closing) if closing and dice.random() < 0.4 else allowed
            tokens.append(dice.choice(choices))
            assert matcher.consume_token(tokens[-1])
        raise AssertionError("no end")

    def accepts(self, grammar, *texts):
        """Whether the grammar takes these texts in the tokenizer's own tokens, to the end."""
        matcher = LLMatcher(self.matched, grammar)
        encoded = [self.backend.encode(text, add_special_tokens=False).ids for text in texts]
        tokens = [token for ids in encoded for token in ids]
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


MODELS = {
    "demo": Model(Tokenizer.from_file(str(DEMO))),
    "demo with tags": Model(with_tags(Tokenizer.from_file(str(DEMO)))),
    "of calls": Model(of_calls()),
    "of calls with tags": Model(with_tags(of_calls())),
}
EVERY_MODEL = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
EVERY_STYLE = pytest.mark.parametrize("style", ToolStyle)


def parts(text, style, reasoning=None):
    parser = AnswerParser(reasoning=reasoning, tools=style)
    first, last = parser.push(text), parser.end()
    assert last.calls == ()
    calls = [(call.name, json.loads(call.arguments)) for call in first.calls]
    return first.reasoning + last.reasoning, first.content + last.content, calls


# --- every allowed answer is calls


@EVERY_MODEL
@EVERY_STYLE
def test_every_answer_is_one_call_whose_arguments_fit_its_schema(model, style):
    dice, grammar = Random(1), model.grammar(style)
    names = set()
    for _ in range(40):
        text = model.walk(grammar, dice)
        _, content, [(name, arguments)] = parts(text, style)
        assert content == "", text
        schemas = {each["function"]["name"]: each["function"]["parameters"] for each in TOOLS}
        assert fits(arguments, schemas[name], schemas[name]), text
        names.add(name)
    assert names == {"weather", "weather_tree", "now"}


@EVERY_MODEL
@EVERY_STYLE
def test_in_parallel_an_answer_is_one_call_or_more(model, style):
    dice, grammar = Random(2), model.grammar(style, parallel=True)
    counts = set()
    for _ in range(25):
        text = model.walk(grammar, dice)
        _, content, calls = parts(text, style)
        assert content == "", text
        counts.add(len(calls))
    assert min(counts) == 1
    assert max(counts) > 1


@EVERY_MODEL
@EVERY_STYLE
def test_a_named_tool_is_the_only_one_called(model, style):
    dice, grammar = Random(3), model.grammar(style, name="weather")
    for _ in range(10):
        _, _, [(name, arguments)] = parts(model.walk(grammar, dice), style)
        assert name == "weather"
        assert fits(arguments, CITY, CITY)


@EVERY_MODEL
@EVERY_STYLE
def test_a_tool_without_parameters_takes_any_object(model, style):
    dice, grammar = Random(4), model.grammar(style, [tool("f"), tool("g", {})])
    for _ in range(10):
        text = model.walk(grammar, dice)
        _, content, [(name, arguments)] = parts(text, style)
        assert (content, name in "fg", type(arguments)) == ("", True, dict)
    assert model.accepts(grammar, spelled(style, "f", {"a": [1, {"b": None}], "c": "x"}))


@EVERY_MODEL
@EVERY_STYLE
def test_an_answer_may_be_a_text_where_calls_are_not_required(model, style):
    grammar = model.grammar(style, may_answer=True)
    rome = spelled(style, "weather", {"city": "Rome", "unit": "C"})
    wrong = rome.replace('"C"', '"K"')
    begins = style is ToolStyle.HERMES  # with a text before the calls
    for text, allowed in (
        ("", True), ("It rains.\n{}", True), (rome, True), (wrong, False),
        (f"Let me look.\n{rome}", True), (f"Let me look.\n{wrong}", not begins),
    ):  # fmt: skip
        assert model.accepts(grammar, text) is allowed, text


# --- what models write is allowed


def spelled(style, name, arguments):
    if style is ToolStyle.LLAMA3_JSON:
        return json.dumps({"name": name, "parameters": arguments}, ensure_ascii=False)
    call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{call}\n</tool_call>"


@EVERY_MODEL
@EVERY_STYLE
def test_a_call_as_templates_show_it_is_allowed_token_by_token(model, style):
    one, many = model.grammar(style), model.grammar(style, parallel=True)
    rome = spelled(style, "weather", {"city": "Rome", "unit": "C"})
    tree = spelled(style, "weather_tree", {"root": {"leaf": True, "kids": [{"leaf": False}]}})
    both = ("; " if style is ToolStyle.LLAMA3_JSON else "\n").join((rome, tree))
    assert [model.accepts(one, text) for text in (rome, f"\n\n{tree}", both)] == [True, True, False]
    assert [model.accepts(many, text) for text in (rome, f"\n\n{tree}", both)] == [True] * 3
    for wrong in (
        "Rome?",
        rome.replace("Rome", "far too long"),
        rome.replace("weather", "whether"),
        rome.replace('"C"', '"K"'),
        rome.replace('"C"', ' "C"'),
        rome.replace(', "unit": "C"', ""),
        rome[:-1],
    ):
        assert not model.accepts(many, wrong), wrong


@EVERY_MODEL
@EVERY_STYLE
def test_any_name_can_be_called(model, style):
    for name in ("get-time_2", 'a"b\\c', "größe"):
        grammar = model.grammar(style, [tool(name, EMPTY)])
        assert model.accepts(grammar, spelled(style, name, {}))
        assert parts(model.walk(grammar, Random(6)), style) == ("", "", [(name, {})])


def test_tags_that_are_tokens_are_forced_as_tokens():
    model = MODELS["demo with tags"]
    matcher = LLMatcher(model.matched, model.grammar(ToolStyle.HERMES))
    assert model.tag_ids["<tool_call>"] in model.allowed(matcher)
    assert model.backend.token_to_id("<") not in model.allowed(matcher)


# --- what tools may ask for


def test_a_tool_that_is_not_strict_may_ask_for_what_cannot_be_enforced():
    odd = {"type": "object", "properties": {"a": {"type": "string", "format": "odd"}}}
    strict = LLMatcher.validate_grammar(
        tool_grammar(ToolStyle.HERMES, [tool("f", odd, strict=True)], parallel=False)
    )
    assert "Unknown format: odd" in strict
    loose = tool_grammar(ToolStyle.HERMES, [tool("f", odd)], parallel=False)
    assert LLMatcher.validate_grammar(loose) == ""


def test_a_tool_has_no_say_in_the_layout():
    given = CITY | {"x-guidance": {"whitespace_flexible": True}}
    grammar = MODELS["demo"].grammar(ToolStyle.LLAMA3_JSON, [tool("f", given)])
    loose = '{"name": "f", "parameters": {"city":   "Rome", "unit": "C"}}'
    assert MODELS["demo"].accepts(grammar, loose.replace("   ", " "))
    assert not MODELS["demo"].accepts(grammar, loose)


@pytest.mark.parametrize("parameters", [{"type": "string"}, {"type": ["object", "null"]}, [], True])
def test_parameters_must_be_of_an_object(parameters):
    with pytest.raises(InvalidRequest, match="parameters of 'f' must be the JSON schema") as caught:
        tool_grammar(ToolStyle.HERMES, [tool("f", parameters)], parallel=False)
    assert caught.value.param == "tools"


def test_a_name_that_no_tool_has_is_refused():
    with pytest.raises(InvalidRequest, match="no tool is called 'nope'") as caught:
        tool_grammar(ToolStyle.HERMES, TOOLS, name="nope", parallel=False)
    assert caught.value.param == "tool_choice"
