"""What soak.py asks of a server: what production sends, good and bad."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MODEL = "duetjax-demo"
MAX_BODY_BYTES = 32 * 2**10
_CHAT, _COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_TEXT = (
    "what is a prefill launch and when does the scheduler split the device for decode because the"
    " pages of a prompt are cached by tokens so a stream goes on while others wait in the queue"
)


@dataclass(frozen=True, slots=True)
class Ask:
    """A request. expected: statuses that it may get; choices: of a 200, else without meaning."""

    message: bytes
    expected: frozenset[int]
    streams: bool = False
    choices: int = 1


def message(path: str, body: bytes, headers: Sequence[str] = (), method: str = "POST") -> bytes:
    """An HTTP request."""
    lines = [f"{method} {path} HTTP/1.1", "host: soak", "content-type: application/json", *headers]
    if body or method == "POST":
        lines.append(f"content-length: {len(body)}")
    return "\r\n".join((*lines, "", "")).encode() + body


class Requests:
    """Draws requests; the same seed draws the same ones. max_model_len: the server's."""

    def __init__(self, seed: int, max_model_len: int) -> None:
        self._draw = random.Random(seed)
        self._most = max_model_len
        self._systems = [self._text(size) for size in (20, 40, 80)]

    def good(self, *, stream: bool | None = None, short: bool = False) -> Ask:
        """One that is to be answered, or told to come later."""
        draw = self._draw
        streams = draw.random() < 0.7 if stream is None else stream
        is_chat = draw.random() < 0.5
        body, prompts = self._chat() if is_chat else self._completion()
        body |= {"model": MODEL, "stream": streams} | self._sampling(is_chat=is_chat)
        if short:
            body |= {"max_tokens": draw.randint(1, 8), "n": 1}
        if streams and draw.random() < 0.3:
            body["stream_options"] = {"include_usage": True}
        headers = []
        if draw.random() < 0.2:
            headers.append(f"x-slo-tbt-ms: {draw.choice((20, 50, 200))}")
        if draw.random() < 0.1:
            headers.append(f"x-slo-ttft-ms: {draw.choice((500, 5000))}")
        path = _CHAT if is_chat else _COMPLETIONS
        sent = message(path, json.dumps(body).encode(), headers)
        choices = prompts * body.get("n", 1)
        return Ask(sent, frozenset((200, 429, 503, 504)), streams, choices)

    def bad(self) -> Ask:
        """One that is refused for what it says, or for a full queue."""
        path, sent, status = self._draw.choice(self._faults())
        body = sent if isinstance(sent, bytes) else json.dumps({"model": MODEL} | sent).encode()
        return Ask(message(path, body), frozenset((status, 429)))

    def oversized(self) -> Ask:
        """One whose body, or headers, are beyond the server's limits."""
        if self._draw.random() < 0.3:
            headers = [f"x-{number}: 0" for number in range(200)]
            return Ask(message(_CHAT, b"{}", headers), frozenset((400, 431)))
        body = json.dumps({"model": MODEL, "prompt": "a" * MAX_BODY_BYTES}).encode()
        return Ask(message(_COMPLETIONS, body), frozenset((413,)))

    def many_bytes(self) -> Ask:
        """A stream whose events are long."""
        top = {"model": MODEL, "logprobs": True, "top_logprobs": 20, "ignore_eos": True}
        body, _ = self._chat()
        body |= top | {"stream": True, "max_tokens": 80}
        sent = message(_CHAT, json.dumps(body).encode())
        return Ask(sent, frozenset((200, 429, 503, 504)), streams=True)

    def _faults(self) -> Sequence[tuple[str, dict[str, Any] | bytes, int]]:
        prompt = {"prompt": "Once"}
        return (
            (_COMPLETIONS, b"{", 400),
            (_COMPLETIONS, prompt | {"temperature": "hot"}, 400),
            (_COMPLETIONS, prompt | {"max_tokens": -1}, 400),
            (_COMPLETIONS, prompt | {"n": 99}, 400),
            (_COMPLETIONS, prompt | {"logprobs": 99}, 400),
            (_COMPLETIONS, {"prompt": [5] * self._most}, 400),
            (_COMPLETIONS, {"prompt": [10**6]}, 400),
            (_COMPLETIONS, prompt | {"model": "other"}, 404),
            (_CHAT, {"messages": []}, 400),
            (_CHAT, {"messages": [{"role": "nobody", "content": "a"}]}, 400),
            (_CHAT, {"messages": [{"role": "user", "content": self._text(2 * self._most)}]}, 400),
            ("/v1/nothing", b"{}", 404),
        )

    def _chat(self) -> tuple[dict[str, Any], int]:
        turns = [{"role": "user", "content": self._text(self._draw.choice((3, 10, 60)))}]
        if self._draw.random() < 0.6:
            turns.insert(0, {"role": "system", "content": self._draw.choice(self._systems)})
        return {"messages": turns}, 1

    def _completion(self) -> tuple[dict[str, Any], int]:
        draw = self._draw
        match draw.randrange(4):
            case 0:
                return {
                    "prompt": [draw.randrange(10, 2000) for _ in range(draw.choice((8, 200)))]
                }, 1
            case 1:
                return {"prompt": [self._text(5), self._text(20)]}, 2
            case 2:
                return {"prompt": self._text(5), "echo": True}, 1
            case _:
                return {"prompt": f"{draw.choice(self._systems)} {self._text(4)}"}, 1

    def _sampling(self, *, is_chat: bool) -> dict[str, Any]:
        draw = self._draw
        body: dict[str, Any] = {"max_tokens": draw.choice((1, 4, 16, 16, 32, 64, 128))}
        optional: tuple[tuple[float, dict[str, Any]], ...] = (
            (0.3, {"temperature": draw.choice((0.0, 0.7, 1.0)), "top_p": 0.9}),
            (0.4, {"seed": draw.randrange(100)}),
            (0.2, {"stop": draw.choice((" the", [".", "\n"], "e"))}),
            (0.2, {"n": draw.choice((2, 3, 4))}),
            (0.2, {"priority": draw.choice((-1, 1, 3))}),
            (0.2, {"ignore_eos": True}),
            (0.1, {"frequency_penalty": 0.5, "presence_penalty": 0.1, "repetition_penalty": 1.1}),
            (0.1, {"logit_bias": {"17": 2, "400": -100}}),
            (0.1, {"min_tokens": 1, "top_k": 20, "min_p": 0.05}),
            (0.1, {"cache_salt": draw.choice("ab")}),
            (0.1, {"stop_token_ids": [draw.randrange(10, 2000)], "a_field_of_nobody": 1}),
        )
        for share, fields in optional:
            if draw.random() < share:
                body |= fields
        if is_chat and draw.random() < 0.15:
            body |= {"logprobs": True, "top_logprobs": 5}
        return body

    def _text(self, words: int) -> str:
        return " ".join(self._draw.choices(_TEXT.split(), k=words))
