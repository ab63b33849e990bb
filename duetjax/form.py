"""What an answer has to be, and how its text is taken apart."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

from duetjax.policy.request import Constraint, Reasoning
from duetjax.text.answer import (
    END_THINK,
    THINK,
    AnswerParser,
    ReasoningStyle,
    ToolStyle,
    begins_reasoning,
)

TAIL_TOKENS = 16
"""Of a prompt, to tell by whether its answer begins in reasoning."""


@dataclass(frozen=True, slots=True)
class Form:
    """What there is to know of an answer's form before it is there.

    constraint: what its tokens are kept to. parser: makes what takes its text apart.
    counts_reasoning: whether its reasoning is counted; reasoning_begun: the prompt opens it.
    param: the field of a request that a grammar came from. look: what is wrong with that grammar,
    "" if nothing is, once somebody has looked; None where nobody does.
    """

    constraint: Constraint | None = None
    parser: Callable[[], AnswerParser] | None = None
    counts_reasoning: bool = False
    reasoning_begun: bool = False
    param: str = "response_format"
    look: Future[str] | None = None


PLAIN = Form()


def form_of(
    prompt_end: str,
    *,
    grammar: str | None,
    reasoning: ReasoningStyle | None,
    tools: ToolStyle | None,
    max_reasoning_tokens: int | None = None,
    single_call: bool = False,
) -> Form:
    """Of the answer to a prompt with that end, by what is asked of it.

    grammar: of what comes behind its reasoning. reasoning, tools: how the model spells them; None
    where none are looked for. single_call: the answer ends with its first call.
    """
    begun = reasoning is not None and begins_reasoning(reasoning, prompt_end)
    bound = None
    is_closed = prompt_end.rstrip().endswith(END_THINK)  # a model may open it again all the same
    if reasoning is not None and not (is_closed and grammar is not None):
        bound = Reasoning(THINK, END_THINK, begun, max_reasoning_tokens)
    constraint = None
    if grammar is not None:
        constraint = Constraint(grammar, bound)
    elif bound is not None and max_reasoning_tokens is not None:
        constraint = Constraint(None, bound)
    parser = None
    if reasoning is not None or tools is not None:
        parser = partial(
            AnswerParser,
            reasoning=reasoning,
            tools=tools,
            begins_reasoning=begun,
            single_call=single_call,
        )
    return Form(constraint, parser, reasoning is not None, begun)
