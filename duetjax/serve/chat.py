"""POST /v1/chat/completions: a conversation in, the assistant's next turn out."""

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from duetjax.config import ModelFolderError
from duetjax.serve.call import Call, Delta, check_characters, check_model, make_choices
from duetjax.serve.context import Service
from duetjax.serve.errors import HttpError
from duetjax.serve.form import chat_form, chat_grammar
from duetjax.serve.logprobs import chat_logprobs
from duetjax.serve.protocol import ChatBody, Message, ignored_header
from duetjax.text.answer import CallDelta
from duetjax.text.tokenizer import Tokenizer


def prepare_chat(service: Service, given: dict[str, Any]) -> Call:
    """Checks a request body, renders the chat template and tokenises; not on the event loop.

    Raises `InvalidRequest` or `HttpError`.
    """
    body = ChatBody.parse(given, service.limits)
    check_model(service, body.model)
    grammar = chat_grammar(service, body)
    tools = [tool.as_template_value() for tool in body.tools] if body.calls_tools else []
    prompt = tuple(encode_messages(service, body.messages, body.chat_template_kwargs, tools))
    form = chat_form(service, body, grammar, prompt)
    call_id = f"chatcmpl-{uuid.uuid4().hex}"
    choices = make_choices(
        *(service, body, call_id, [prompt]), usual_max_tokens=None, constraint=form.constraint
    )
    reply = ChatReply(
        head={"id": call_id, "created": int(time.time()), "model": body.model},
        prompt=prompt if body.return_token_ids else None,
        logprobs_of=service.tokenizer if body.logprobs else None,
    )
    return Call(
        choices=choices,
        reply=reply,
        n=body.n,
        prompt_tokens=len(prompt),
        stream=body.stream,
        include_usage=body.stream_options is not None and body.stream_options.include_usage,
        headers=ignored_header(body, strict=service.strict_params),
        form=form,
    )


def encode_messages(
    service: Service,
    messages: Sequence[Message],
    template_kwargs: dict[str, bool | str],
    tools: Sequence[Mapping[str, Any]] = (),
    *,
    add_generation_prompt: bool = True,
) -> list[int]:
    """Token ids of a conversation; raises `InvalidRequest`, or 400 where the template fails."""
    values = [message.as_template_value() for message in messages]
    size = sum(message.num_characters for message in messages)
    check_characters(service, size + sum(len(str(tool)) for tool in tools), "messages")
    try:
        return service.tokenizer.encode_chat(
            values,
            add_generation_prompt=add_generation_prompt,
            template_kwargs=template_kwargs,
            tools=tools,
        )
    except ModelFolderError as error:  # a 5xx would make clients ask again, in vain
        raise HttpError(400, "chat_template_failed", str(error), param="messages") from None


@dataclass(frozen=True, slots=True)
class ChatReply:
    """The chat.completion objects of one call.

    prompt: its token ids, where the client asked for token ids. logprobs_of: the tokenizer that
    names the tokens, where it asked for logprobs.
    """

    head: dict[str, Any]
    prompt: tuple[int, ...] | None
    logprobs_of: Tokenizer | None

    @property
    def is_text_only(self) -> bool:
        """Whether the client asked for neither token ids nor logprobs."""
        return self.prompt is None and self.logprobs_of is None

    def whole(self, choices: Sequence[Delta]) -> dict[str, Any]:
        """The response body, without usage."""
        body = {"object": "chat.completion", **self.head}
        body["choices"] = [
            self._choice(c, "message", self._message(c), c.finish_reason) | self._logprobs(c)
            for c in choices
        ]
        return body | self._prompt_ids()

    def chunk(self, delta: Delta, *, is_first: bool) -> list[dict[str, Any]]:
        """Role first, then text, then the finish reason, each in a chunk of its own."""
        chunks = []
        if is_first:
            opening = Delta(delta.index, "", ())
            role = {"role": "assistant", "content": ""}
            chunks.append(self._chunk(opening, role, None) | self._prompt_ids())
        if delta.reasoning:
            told = Delta(delta.index, "", ())
            chunks.append(self._chunk(told, {"reasoning_content": delta.reasoning}, None))
        has_content = bool(delta.text or delta.logprobs)
        if has_content or (self.prompt is not None and delta.finish_reason is None):
            chunks.append(self._chunk(delta, {"content": delta.text}, None))
        if delta.calls:
            told = Delta(delta.index, "", ())
            calls = [_told_call(call) for call in delta.calls]
            chunks.append(self._chunk(told, {"tool_calls": calls}, None))
        if delta.finish_reason is not None:
            told = Delta(delta.index, "", () if has_content else delta.token_ids)
            chunks.append(self._chunk(told, {}, delta.finish_reason))
        return chunks

    def last(self) -> dict[str, Any]:
        """The chunk that carries usage."""
        return {"object": "chat.completion.chunk", **self.head, "choices": []}

    def _message(self, delta: Delta) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": delta.text}
        if delta.reasoning:
            message["reasoning_content"] = delta.reasoning
        if delta.calls:
            message["tool_calls"] = [
                {name: value for name, value in _told_call(call).items() if name != "index"}
                for call in delta.calls
            ]
            message["content"] = delta.text or None
        return message

    def _chunk(self, delta: Delta, content: dict[str, Any], finish: str | None) -> dict[str, Any]:
        choice = self._choice(delta, "delta", content, finish)
        if delta.logprobs:
            choice |= self._logprobs(delta)
        return self.last() | {"choices": [choice]}

    def _choice(
        self, delta: Delta, key: str, content: dict[str, Any], finish: str | None
    ) -> dict[str, Any]:
        choice = {"index": delta.index, key: content, "logprobs": None, "finish_reason": finish}
        if self.prompt is not None:
            choice["token_ids"] = delta.token_ids
        return choice

    def _logprobs(self, delta: Delta) -> dict[str, Any]:
        if self.logprobs_of is None:
            return {}
        return {"logprobs": chat_logprobs(self.logprobs_of, delta.logprobs)}

    def _prompt_ids(self) -> dict[str, Any]:
        return {} if self.prompt is None else {"prompt_token_ids": self.prompt}


def _told_call(call: CallDelta) -> dict[str, Any]:
    """A piece of a tool call; what identifies it is in its first."""
    function: dict[str, Any] = {"arguments": call.arguments}
    if call.name is None:
        return {"index": call.index, "function": function}
    function = {"name": call.name, **function}
    call_id = f"call_{uuid.uuid4().hex[:24]}"
    return {"index": call.index, "id": call_id, "type": "function", "function": function}
