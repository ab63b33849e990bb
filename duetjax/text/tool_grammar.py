"""Grammars of answers that call tools, in llguidance's dialect of Lark."""

import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

from duetjax.config import InvalidRequest
from duetjax.text.answer import END_TOOL_CALL, TOOL_CALL, ToolStyle

JSON_LAYOUT: Final = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
"""llguidance's options for JSON on one line, as Python writes it and chat templates show calls:
with free space, a model can write nothing else for ever."""
_NEWLINES: Final = r"/\n{0,2}/"


def tool_grammar(
    style: ToolStyle,
    tools: Sequence[Mapping[str, Any]],
    *,
    name: str | None = None,
    parallel: bool,
    may_answer: bool = False,
    tag_ids: Mapping[str, int] = MappingProxyType({}),
) -> str:
    """The grammar of one tool call, or with `parallel` of one or more; `AnswerParser` reads them.

    tools: {"type": "function", "function": {"name", "parameters", "strict"}} as in OpenAI's API;
    arguments follow the JSON schema `parameters`, or are any object. Of a tool that is not strict,
    what llguidance knows no way to enforce is let pass. name: of the only tool to call.
    may_answer: the answer may also be a text, or with hermes a text and then calls.

    tag_ids: of the tokenizer's added tokens by text; others than tags are not looked at. llguidance
    takes those like <tool_call> for special, whatever the tokenizer calls them, and no text of a
    grammar matches a special token: it must be named by its id.

    Raises `InvalidRequest` for a name that no tool has, and for parameters that are no object.
    """
    functions = [tool["function"] for tool in tools]
    chosen = [each for each in functions if name in (None, each["name"])]
    if not chosen:
        raise InvalidRequest(f"tool_choice: no tool is called {name!r}", param="tool_choice")
    begin, key, end, separator = _frame(style, tag_ids)
    between = f" ({json.dumps(separator)} call)*" if parallel else ""
    if not may_answer:
        lines = [f"start: {_NEWLINES} call{between}"]
    elif style is ToolStyle.LLAMA3_JSON:
        lines = [f"start: {_NEWLINES} call{between} | TEXT", r"TEXT: /([^{\s](?s:.*))?/"]
    elif TOOL_CALL in tag_ids:  # which no text can hold
        lines = [f"start: TEXT (call{between})?", r"TEXT: /(?s:.*)/"]
    else:
        text, lead = rf"TEXT: /(?s:.*)/ & ~/(?s:.*){TOOL_CALL}(?s:.*)/", rf"/(?s:.*){TOOL_CALL}\n/"
        lines = [f"start: TEXT | lead object{between}", text, f"lead[lazy]: {lead}"]
    lines.append(f"call: {begin} object")
    lines.append("object: " + " | ".join(f"object_{index}" for index in range(len(chosen))))
    for index, function in enumerate(chosen):
        head = f'{{"name": {json.dumps(function["name"], ensure_ascii=False)}, "{key}": '
        arguments = f"{json.dumps(head)} %json {json.dumps(_schema(function))}"
        lines.append(f'object_{index}: {arguments} "}}" {end}')
    return json.dumps({"grammars": [{"lark_grammar": "\n".join(lines)}]})


def _frame(style: ToolStyle, tag_ids: Mapping[str, int]) -> tuple[str, str, str, str]:
    """What is before a call's object, the arguments' key, what is behind it and between calls."""
    match style:
        case ToolStyle.HERMES:
            begin, end = _tag(TOOL_CALL, tag_ids), _tag(END_TOOL_CALL, tag_ids)
            return f'{begin} "\\n"', "arguments", f'"\\n" {end}', "\n"
        case ToolStyle.LLAMA3_JSON:
            return "", "parameters", "", "; "


def _schema(function: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON schema of a function's arguments, as a `%json` of its own: its references hold."""
    parameters = function.get("parameters")
    if parameters is None:
        parameters = {}
    if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
        raise InvalidRequest(
            f"tools: parameters of {function['name']!r} must be the JSON schema of an object",
            param="tools",
        )
    layout = {**JSON_LAYOUT, "lenient": not function.get("strict")}
    return {**parameters, "type": "object", "x-guidance": layout}


def _tag(tag: str, tag_ids: Mapping[str, int]) -> str:
    return f"<[{tag_ids[tag]}]>" if tag in tag_ids else json.dumps(tag)
