"""What requests ask of the form of their answers, checked."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial

from duetjax.config import InvalidRequest
from duetjax.constrain.checker import CheckerBusy
from duetjax.constrain.grammars import check_schema, enforceable, json_grammar
from duetjax.form import PLAIN, TAIL_TOKENS, Form, form_of
from duetjax.policy.request import Constraint
from duetjax.serve.call import Call
from duetjax.serve.context import Context, Service
from duetjax.serve.errors import HttpError
from duetjax.serve.formats import CallMode, NamedTool, ResponseFormat
from duetjax.serve.protocol import ChatBody
from duetjax.text.tool_grammar import tool_grammar


@dataclass(frozen=True, slots=True)
class Grammar:
    """Of an answer, as the engine takes it; look: see `Form`."""

    text: str
    look: Future[str]


async def wait_for_look(context: Context, call: Call) -> None:
    """Until the grammar of a call has been looked at, in places of the queue.

    Raises `InvalidRequest` for a grammar that cannot be used, what `QueueBound.places` does, and
    with what every call is given up.
    """
    if call.form.look is None:
        return
    with context.queue.places(len(call.choices)):
        fault = await context.dispatcher.unless_given_up(asyncio.wrap_future(call.form.look))
    if fault:
        raise InvalidRequest(f"the schema cannot be used: {fault}", param=call.form.param)


def completion_form(service: Service, wanted: ResponseFormat | None) -> Form:
    """Of a completion; raises `InvalidRequest` or `HttpError`."""
    grammar = _json_grammar(service, wanted)
    return PLAIN if grammar is None else Form(Constraint(grammar.text), look=grammar.look)


def chat_form(
    service: Service, body: ChatBody, grammar: Grammar | None, prompt: Sequence[int]
) -> Form:
    """Of the next turn of a conversation.

    grammar: see `chat_grammar`. prompt: as the chat template wrote it, whose end says whether the
    answer begins in reasoning.
    """
    form = form_of(
        service.tokenizer.decode(prompt[-TAIL_TOKENS:], skip_special_tokens=False),
        grammar=None if grammar is None else grammar.text,
        reasoning=service.reasoning_style,
        tools=service.tool_style if body.calls_tools else None,
        max_reasoning_tokens=body.max_reasoning_tokens,
        single_call=not body.parallel_tool_calls,
    )
    return replace(
        form,
        param="tools" if body.calls_tools else "response_format",
        look=None if grammar is None else grammar.look,
    )


def chat_grammar(service: Service, body: ChatBody) -> Grammar | None:
    """Of the next turn of a conversation; None for any text.

    Raises `InvalidRequest` or `HttpError`.
    """
    check_tools(service, body)
    if body.max_reasoning_tokens is not None and service.reasoning_style is None:
        raise InvalidRequest(
            "max_reasoning_tokens needs a server that was started with --reasoning-parser",
            param="max_reasoning_tokens",
            code="unsupported_parameter",
        )
    if not body.calls_tools:
        return _json_grammar(service, body.response_format)
    if body.response_format is not None and body.response_format.wanted is not None:
        raise InvalidRequest(
            "response_format cannot be kept by an answer that may call tools; send one of them, or"
            ' tool_choice: "none"',
            param="response_format",
            code="unsupported_parameter",
        )
    return _call_grammar(service, body)


def check_tools(service: Service, body: ChatBody) -> None:
    """Raises `InvalidRequest` for tools that this server cannot call, or that contradict."""
    names = [tool.function.name for tool in body.tools]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidRequest(f"tools has {twice!r} more than once; name each once", param="tools")
    choice = body.tool_choice
    named = choice.function.name if isinstance(choice, NamedTool) else None
    if not names and (named is not None or choice is CallMode.REQUIRED):
        raise InvalidRequest("tool_choice asks for a call, but there are no tools", param="tools")
    if named is not None and named not in names:
        raise InvalidRequest(
            f"tool_choice names {named!r}, which is not among the tools: {', '.join(names)}",
            param="tool_choice",
        )
    if body.calls_tools and service.tool_style is None:
        raise InvalidRequest(
            "tools need a server that was started with --tool-call-parser; leave them out, or send"
            ' tool_choice: "none"',
            param="tools",
            code="unsupported_parameter",
        )
    limits = service.limits
    for tool in body.tools:
        parameters = tool.function.parameters or {}
        check_schema(parameters, limits.max_schema_bytes, limits.max_schema_depth, "tools")


def _json_grammar(service: Service, wanted: ResponseFormat | None) -> Grammar | None:
    schema = None if wanted is None else wanted.wanted
    if schema is None:
        return None
    limits, param = service.limits, "response_format"
    grammar = json_grammar(
        schema, max_bytes=limits.max_schema_bytes, max_depth=limits.max_schema_depth, param=param
    )
    return Grammar(grammar, _look(service, grammar))


def _call_grammar(service: Service, body: ChatBody) -> Grammar | None:
    """Of an answer that must call, or may and then has to call strictly; None where it is free."""
    choice, tools = body.tool_choice, [tool.as_template_value() for tool in body.tools]
    may_answer = choice is CallMode.AUTO
    if may_answer and not any(tool.function.strict for tool in body.tools):
        return None
    assert service.tool_style is not None, "checked before"
    named = choice.function.name if isinstance(choice, NamedTool) else None
    grammar = partial(
        tool_grammar,
        service.tool_style,
        enforceable(tools),
        name=named,
        parallel=body.parallel_tool_calls and named is None,
        may_answer=may_answer,
    )
    look = _look(service, grammar())  # with tags spelled, as the checker has no model's tokens
    return Grammar(grammar(tag_ids=service.tokenizer.added_ids), look)


def _look(service: Service, grammar: str) -> Future[str]:
    try:
        return service.checker.look(grammar)
    except CheckerBusy as error:
        raise HttpError(429, "queue_full", str(error), headers={"retry-after": "1"}) from None
