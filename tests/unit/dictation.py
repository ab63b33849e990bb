"""Servers whose model says what a test dictates, and the parts of its answers."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

from fake_engine import FakeEngine
from serve_setup import MODEL, Served, events, serving

MAX_LEN = 4096
ASKED = [{"role": "user", "content": "hello"}]
TEMPLATE = """\
{%- for tool in tools or [] %}({{ tool | tojson }}){% endfor %}
{%- for m in messages %}[{{ m.role }}]{{ m.content }}
{%- if m.reasoning_content %}~{{ m.reasoning_content }}{% endif %}
{%- for call in m.tool_calls or [] %}
{{- "{" ~ call.id ~ " " ~ call.function.name ~ " " ~ call.function.arguments.city ~ "}" }}
{%- endfor %}
{%- if m.tool_call_id %}#{{ m.tool_call_id }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}>{% endif %}
{%- if opened %}<think>{{ "\\n" }}{% endif %}
{%- if enable_thinking is defined and not enable_thinking %}{{ "<think>\\n\\n</think>\\n\\n" }}
{%- endif %}"""
"""Shows all that a conversation has, and may open or close the reasoning."""

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}


@contextmanager
def dictated(folder: Path, **changes) -> Iterator[Served]:
    """A server with room for long answers; `engine.executor.say` dictates them."""
    engine = FakeEngine(max_len=MAX_LEN, num_pages=4097)
    with serving(folder, engine, max_model_len=MAX_LEN, **changes) as served:
        yield served
        engine.wait_idle()


def chat(http, **body):
    """The response to a conversation."""
    return http.post("/v1/chat/completions", json={"model": MODEL, "messages": ASKED} | body)


def error_of(response) -> dict:
    """The error of a request that was refused."""
    assert response.status_code == 400, response.text
    return response.json()["error"]


def message(http, **body) -> dict:
    """The only choice's message of a whole answer."""
    response = chat(http, **body)
    assert response.status_code == 200, response.text
    [choice] = response.json()["choices"]
    return choice["message"]


def chunks_of(http, path="/v1/chat/completions", **body) -> list[dict]:
    """A stream's events but [DONE]."""
    body = {"model": MODEL, "messages": ASKED, "stream": True} | body
    response = http.post(path, json=body)
    assert response.status_code == 200, response.text
    *chunks, done = events(response.content)
    assert done == "[DONE]"
    return [json.loads(chunk) for chunk in chunks]


def put_together(chunks: list[dict], index: int = 0) -> dict:
    """A choice as a whole answer has it, made of its chunks, whose order is looked at."""
    mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
    opening, *rest = mine
    assert opening["delta"] == {"role": "assistant", "content": ""}, opening
    assert opening["finish_reason"] is None
    *others, last = rest
    assert last["delta"] == {}, last
    assert last["finish_reason"] is not None
    content, reasoning = "", ""
    calls: list[dict] = []
    logprobs = []
    for choice in others:
        delta = choice["delta"]
        assert choice["finish_reason"] is None
        assert len(delta) == 1, delta
        if "reasoning_content" in delta:
            assert (content, calls) == ("", []), "reasoning comes first"
            assert delta["reasoning_content"]
            reasoning += delta["reasoning_content"]
        content += delta.get("content", "")
        for piece in delta.get("tool_calls", ()):
            _add_call(calls, piece)
    for choice in mine:
        logprobs += (choice["logprobs"] or {"content": []})["content"]
    whole = {"role": "assistant", "content": (content or None) if calls else content}
    whole |= {"reasoning_content": reasoning} if reasoning else {}
    whole |= {"tool_calls": calls} if calls else {}
    told = {"message": whole, "finish_reason": last["finish_reason"], "index": index}
    told["logprobs"] = {"content": logprobs, "refusal": None} if logprobs else None
    if "token_ids" in opening:
        told["token_ids"] = [token for choice in mine for token in choice["token_ids"]]
    return told


def _add_call(calls: list[dict], piece: dict) -> None:
    function = piece["function"]
    if piece["index"] == len(calls):
        assert piece.keys() == {"index", "id", "type", "function"}
        assert function.keys() == {"name", "arguments"}
        calls.append({"id": piece["id"], "type": piece["type"], "function": dict(function)})
    else:
        assert piece["index"] == len(calls) - 1, "a call that is over goes on"
        assert piece.keys() == {"index", "function"}
        assert function.keys() == {"arguments"}
        assert function["arguments"]
        calls[-1]["function"]["arguments"] += function["arguments"]


def without_ids(choice: dict) -> dict:
    """A choice whose calls have no ids, which are drawn anew for each answer."""
    told = choice["message"]
    if "tool_calls" not in told:
        return choice
    calls = [{k: v for k, v in call.items() if k != "id"} for call in told["tool_calls"]]
    return choice | {"message": told | {"tool_calls": calls}}


def cuts(random: Random, text: str, count: int = 4) -> list[str]:
    """Stop strings that never come and make pieces of a text wait, so that it comes in others.

    The text's tokens are bytes: without them each piece of a stream is a character.
    """
    starts = [random.randrange(len(text)) for _ in range(count)]
    return [text[at : at + random.randint(1, 60)] + "\0" for at in starts]
