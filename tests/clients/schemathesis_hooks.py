"""What schemathesis has to know of the server beyond its document; loaded by schemathesis itself.

A body is mended where rules that join several fields would refuse it before anybody looks at the
field that schemathesis has broken, and two checks see that this worked: what is refused is refused
for the broken field, or, if no field is broken, for a rule that no schema can say.
"""

import re

import schemathesis

RULES = (
    r"max_tokens is \d+ but max_completion_tokens is \d+;",
    r"min_tokens \d+ is more than max_tokens \d+;",
    r"the prompt has \d+ tokens and \d+ are to be generated,",
    r"the prompt has \d+ characters;",  # of all messages together
    r"the prompt has no tokens;",
    r"\d+ prompts with n \d+ make \d+ choices;",
    r"top_logprobs needs logprobs: true",
    r"echo with logprobs is not supported:",
    r"chat_template_kwargs: this model's template has no variable ",
    r"token id \d+ in logit_bias is not in \[0, \d+\)",  # a name has no maximum
    r"logit_bias must be given once for each token id,",  # "5" and "05"
    r"messages may not hold the private-use characters ",
    r"messages\[\d+\]\.tool_calls\[\d+\]\.function: has arguments that are not ",
    r"tools has '\w+' more than once;",
    r"tool_choice asks for a call, but there are no tools",
    r"tool_choice names '.*', which is not among the tools:",
    r"tools need a server that was started with --tool-call-parser;",
    r"tools: parameters of '.*' must be the JSON schema of an object",
    r"response_format cannot be kept by an answer that may call tools;",
    r"(min_tokens|ignore_eos) \w+ cannot be kept where the answer has to follow a grammar,",
    r"the schema (cannot be used:|has \d+ bytes;|is nested more than \d+ deep;) ",
    r"a message or a tool is nested more than \d+ deep",
)


@schemathesis.hook
def before_call(context, case, kwargs):
    """JSON Schema takes 5.0 for an integer, this server does not; stream_options needs a stream.

    A trace that may be had takes no time. A name in the query with an empty list is sent at all.
    """
    if case.query:
        case.query = {name: "" if value == [] else value for name, value in case.query.items()}
    if case.path == "/debug/trace" and _is_number((case.query or {}).get("seconds", "5")):
        case.query = {**(case.query or {}), "seconds": "0.01"}
    body = _whole(case.body)
    if isinstance(body, dict) and body.get("stream_options") is not None:
        body["stream"] = body.get("stream") or True
    if repr(body) != repr(case.body):  # 5 == 5.0
        case.body = body


def _is_number(text):
    if isinstance(text, list) and len(text) == 1:  # spelled as what it holds
        text = text[0]
    try:
        return 0 < float(text) <= 60
    except (TypeError, ValueError):
        return False


def _whole(value):
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    if isinstance(value, list):
        return [_whole(item) for item in value]
    if isinstance(value, dict):
        return {name: _whole(item) for name, item in value.items()}
    return value


@schemathesis.check
def refused_for_the_broken_field(context, response, case):
    """Where one field of a body is broken, the error names it."""
    if not _is_400(response, case, "negative"):
        return
    broken = re.match(r"/properties/(\w+)", getattr(case.meta.phase.data, "location", None) or "")
    if broken and str(getattr(case.meta.phase.data, "parameter_location", "")).endswith("BODY"):
        error = response.json()["error"]
        # The two names of one limit are told as the first.
        name = broken[1].replace("max_completion_tokens", "max_tokens")
        told = (error["param"] or "").replace("max_completion_tokens", "max_tokens")
        assert told.startswith(name), f"{name} is broken, but: {error}"


@schemathesis.check
def refused_by_a_known_rule(context, response, case):
    """In place of positive_data_acceptance, which knows of no rules but the schema's."""
    if _is_400(response, case, "positive"):
        error = response.json()["error"]
        assert any(re.match(rule, error["message"]) for rule in RULES), error


def _is_400(response, case, mode):
    return case.meta and case.meta.generation.mode.value == mode and response.status_code == 400
