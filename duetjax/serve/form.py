"""What requests ask of the form of their answers, checked."""

from collections.abc import Sequence
from functools import partial

from duetjax.config import InvalidRequest
from duetjax.constrain.checker import CheckerBusy
from duetjax.constrain.grammars import check_schema, json_grammar
from duetjax.form import PLAIN, TAIL_TOKENS, Form, form_of
from duetjax.policy.request import Constraint
from duetjax.serve.context import Service
from duetjax.serve.errors import HttpError
from duetjax.serve.formats import CallMode, ResponseFormat, ToolChoice
from duetjax.serve.protocol import ChatBody
from duetjax.text.tool_grammar import tool_grammar


def completion_form(service: Service, wanted: ResponseFormat | None) -> Form:
    """Of a completion; raises `InvalidRequest`."""
    grammar = _json_grammar(service, wanted)
    return PLAIN if grammar is None else Form(Constraint(grammar))


def chat_form(service: Service, body: ChatBody, prompt: Sequence[int]) -> Form:
    """Of the next turn of a conversation; raises `InvalidRequest`.

    prompt: as the chat template wrote it, whose end says whether the answer begins in reasoning.
    """
    check_tools(service, body)
    style = service.reasoning_style
    if body.max_reasoning_tokens is not None and style is None:
        raise InvalidRequest(
            "max_reasoning_tokens needs a server that was started with --reasoning-parser",
            param="max_reasoning_tokens",
            code="unsupported_parameter",
        )
    calls = body.calls_tools
    grammar = _json_grammar(service, body.response_format)
    if grammar is not None and calls:
        raise InvalidRequest(
            "response_format cannot be kept by an answer that may call tools; send one of them, or"
            ' tool_choice: "none"',
            param="response_format",
            code="unsupported_parameter",
        )
    if calls:
        grammar = _call_grammar(service, body)
    end = service.tokenizer.decode(prompt[-TAIL_TOKENS:], skip_special_tokens=False)
    return form_of(
        end,
        grammar=grammar,
        reasoning=style,
        tools=service.tool_style if calls else None,
        max_reasoning_tokens=body.max_reasoning_tokens,
    )


def check_tools(service: Service, body: ChatBody) -> None:
    """Raises `InvalidRequest` for tools that this server cannot call, or that contradict."""
    names = [tool.function.name for tool in body.tools]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidRequest(f"tools has {twice!r} more than once; name each once", param="tools")
    choice = body.tool_choice or ToolChoice(CallMode.AUTO)
    if choice.mode is CallMode.REQUIRED and not names:
        raise InvalidRequest("tool_choice asks for a call, but there are no tools", param="tools")
    if choice.name is not None and choice.name not in names:
        raise InvalidRequest(
            f"tool_choice names {choice.name!r}, which is not among the tools: {', '.join(names)}",
            param="tool_choice",
        )
    if body.calls_tools and service.tool_style is None:
        raise InvalidRequest(
            "tools need a server that was started with --tool-call-parser; leave them out, or send"
            ' tool_choice: "none"',
            param="tools",
            code="unsupported_parameter",
        )


def _json_grammar(service: Service, wanted: ResponseFormat | None) -> str | None:
    schema = None if wanted is None else wanted.wanted
    if schema is None:
        return None
    limits, param = service.limits, "response_format"
    grammar = json_grammar(
        schema, max_bytes=limits.max_schema_bytes, max_depth=limits.max_schema_depth, param=param
    )
    _try(service, grammar, param)
    return grammar


def _call_grammar(service: Service, body: ChatBody) -> str | None:
    """Of an answer that must call, or may and then has to call strictly; None where it is free."""
    choice = body.tool_choice or ToolChoice(CallMode.AUTO)
    is_required = choice.mode is CallMode.REQUIRED
    if not is_required and not any(tool.function.strict for tool in body.tools):
        return None
    assert service.tool_style is not None, "checked before"
    limits = service.limits
    for tool in body.tools:
        parameters = tool.function.parameters or {}
        check_schema(parameters, limits.max_schema_bytes, limits.max_schema_depth, "tools")
    grammar = partial(
        tool_grammar,
        service.tool_style,
        [tool.as_template_value() for tool in body.tools],
        name=choice.name,
        parallel=body.parallel_tool_calls and choice.name is None,
        may_answer=not is_required,
    )
    _try(service, grammar(), "tools")  # with tags spelled, as the checker has no model's tokens
    return grammar(tag_ids=service.tokenizer.added_ids)


def _try(service: Service, grammar: str, param: str) -> None:
    try:
        service.checker.check(grammar, param)
    except CheckerBusy as error:
        raise HttpError(429, "queue_full", str(error), headers={"retry-after": "1"}) from None
