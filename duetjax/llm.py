"""The Python API: `LLM` generates from prompts, in the caller's process, on the server's engine.

from duetjax import LLM, SamplingParams
with LLM() as llm:                              # no model named: the demo checkpoint
    [out] = llm.generate("What is TTFT?", SamplingParams(max_tokens=64))
    print(out.outputs[0].text)
"""

import itertools
import queue
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from enum import StrEnum
from pathlib import Path
from reprlib import repr as short
from typing import Any, Self, cast

from tqdm import tqdm

from duetjax.build import LoadedModel, ModelRequest, load
from duetjax.completion import (
    Completion,
    Delta,
    EncodedPrompt,
    RequestOutput,
    check_alive,
    request_output,
)
from duetjax.config import (
    MAX_PRIORITY,
    ConfigError,
    EngineConfig,
    InvalidRequest,
    SamplingParams,
)
from duetjax.form import Form
from duetjax.policy.request import NewRequest, StepOutputs
from duetjax.policy.request import RequestOutput as EngineOutput
from duetjax.text.answer import ReasoningStyle, ToolStyle
from duetjax.text.tokenizer import Tokenizer

type Prompt = str | Sequence[int]
type Message = Mapping[str, Any]
type Arrival = tuple[EngineOutput, float]
"""An output, and when it reached this process (seconds of time.perf_counter)."""


class BaseLLM(ABC):
    """What `LLM` and `AsyncLLM` share: the model they load, and how they read what is asked.

    model: a folder, preset name or hub id; None is the bundled demo. tokenizer: another folder to
    take the tokenizer from. chat_template: a file to use instead of the model's template.
    load_format: "auto" or "dummy" (random weights). reasoning_parser: "qwen3" or "deepseek_r1",
    tool_call_parser: "hermes" or "llama3_json": how the model spells reasoning and tool calls,
    which are then told apart from the text. Everything else is a field of `EngineConfig`,
    max_model_len also "auto" or -1, which is what fits, as if it were left out.
    Raises `DuetJAXError` with one line that says what to do.
    """

    @abstractmethod
    def _start(self) -> None:
        """Starts the loaded model's engine."""

    def __init__(
        self,
        model: str | None = None,
        *,
        tokenizer: str | None = None,
        chat_template: Path | None = None,
        load_format: str = "auto",
        reasoning_parser: str | None = None,
        tool_call_parser: str | None = None,
        **engine: Any,
    ) -> None:
        self._reasoning_style = _style(ReasoningStyle, "reasoning_parser", reasoning_parser)
        self._tool_style = _style(ToolStyle, "tool_call_parser", tool_call_parser)
        names = [field.name for field in fields(EngineConfig)]
        if unknown := engine.keys() - set(names):
            raise ConfigError(
                f"{type(self).__name__} has no setting {', '.join(sorted(unknown))}; there are"
                f" {', '.join(names)}"
            )
        if engine.get("max_model_len") in ("auto", -1):
            del engine["max_model_len"]
        request = ModelRequest(model, tokenizer, chat_template, load_format)
        config = EngineConfig(**engine)
        self._model = load(request, config)
        self._numbers = itertools.count()
        self._start()
        self._model.engine.watch(config.watchdog_s)

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` can be used."""
        tokenizer = self._model.tokenizer
        return tokenizer is not None and tokenizer.has_chat_template

    def get_default_sampling_params(self) -> SamplingParams:
        """The model's own defaults, from its generation_config.json."""
        return self._model.defaults

    def _encode(self, prompt: Prompt) -> EncodedPrompt:
        if not isinstance(prompt, str | Sequence):
            kind = type(prompt).__name__
            raise InvalidRequest(f"a prompt is a text or a list of token ids, not a {kind}")
        if isinstance(prompt, str):
            return EncodedPrompt(prompt, tuple(self._tokenizer().encode(prompt)))
        return EncodedPrompt(None, tuple(prompt))

    def _encode_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        template_kwargs: Mapping[str, object] | None,
        *,
        single_call: bool,
    ) -> EncodedPrompt:
        ids = self._tokenizer().encode_chat(messages, tools=tools, template_kwargs=template_kwargs)
        return EncodedPrompt(None, tuple(ids), may_call=bool(tools), single_call=single_call)

    def _form(self, prompt: EncodedPrompt, params: SamplingParams) -> Form:
        return self._model.form(
            prompt.token_ids,
            params,
            reasoning=self._reasoning_style,
            tools=self._tool_style if prompt.may_call else None,
            single_call=prompt.single_call,
        )

    def _tokenizer(self) -> Tokenizer:
        if self._model.tokenizer is None:
            raise InvalidRequest(
                f"model {self._model.name} has no tokenizer: give token ids, or name a folder that"
                " has one as `tokenizer`"
            )
        return self._model.tokenizer


class LLM(BaseLLM):
    """A model with its engine, ready to generate; close it, or use it in a `with` block.

    The settings are those of `BaseLLM`. Methods may be called from several threads.
    """

    def _start(self) -> None:
        self._queues: dict[str, queue.SimpleQueue[Arrival]] = {}
        self._model.engine.start(self._route)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: int | Sequence[int] = 0,
    ) -> list[RequestOutput]:
        """Completes prompts, batched; one result per prompt, in order.

        prompts: a text, a list of token ids, or a list of these. sampling_params: one for all or
        one each; None is the model's defaults. priority: one for all or one each; lower goes
        first. Raises `InvalidRequest` for a prompt or parameter that cannot be served; then
        nothing of the batch goes on running. A completion that fails alone does not raise: its
        finish_reason is "error", and the others are whole.
        """
        encoded = [self._encode(prompt) for prompt in _batch(prompts)]
        return self._run(encoded, sampling_params, priority, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        parallel_tool_calls: bool = True,
        chat_template_kwargs: Mapping[str, object] | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation or a list of them, through the model's chat template.

        tools: that the model may call, as in OpenAI's API; its calls are told apart from the text
        with a tool_call_parser. parallel_tool_calls: False ends an answer as soon as its first call
        is whole, but not before min_tokens. chat_template_kwargs: further variables of the
        template.
        """
        single = bool(messages) and isinstance(messages[0], Mapping)
        batch = cast(Sequence[Sequence[Message]], [messages] if single else messages)
        encoded = [
            self._encode_chat(m, tools, chat_template_kwargs, single_call=not parallel_tool_calls)
            for m in batch
        ]
        return self._run(encoded, sampling_params, 0, use_tqdm)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Iterator[Delta]:
        """Completes one prompt piece by piece; dropping the iterator aborts the generation."""
        _check_single(sampling_params)
        return self._stream(self._encode(prompt), sampling_params)

    def stream_chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        parallel_tool_calls: bool = True,
        chat_template_kwargs: Mapping[str, object] | None = None,
    ) -> Iterator[Delta]:
        """Answers one conversation piece by piece; dropping the iterator aborts it. See `chat`."""
        _check_single(sampling_params)
        encoded = self._encode_chat(
            messages, tools, chat_template_kwargs, single_call=not parallel_tool_calls
        )
        return self._stream(encoded, sampling_params)

    def close(self) -> None:
        """Ends what is running and frees the engine; safe to call twice."""
        self._model.engine.shutdown(timeout=30)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(
        self,
        prompts: list[EncodedPrompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        priority: int | Sequence[int],
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        wanted = self._model.defaults if sampling_params is None else sampling_params
        params = _one_each(wanted, "sampling_params", len(prompts))
        priorities = _one_each(priority, "priorities", len(prompts))
        ids = [f"llm-{next(self._numbers)}" for _ in prompts]
        groups: list[list[Completion]] = []
        with self._call() as call:
            for name, prompt, one, order in zip(ids, prompts, params, priorities, strict=True):
                form = self._form(prompt, one)
                requests = self._model.new_requests(name, prompt.token_ids, one, form)
                groups.append(call.submit(prioritised(requests, order), one, form))
            total = sum(map(len, groups))
            with tqdm(total=total, desc="generating", disable=not use_tqdm) as bar:
                for completion, _ in call.deltas():
                    bar.update(completion.finish is not None)
        return [request_output(*result) for result in zip(ids, prompts, groups, strict=True)]

    def _stream(self, prompt: EncodedPrompt, params: SamplingParams | None) -> Iterator[Delta]:
        params = self._model.defaults if params is None else params
        with self._call() as call:
            name = f"llm-{next(self._numbers)}"
            form = self._form(prompt, params)
            requests = self._model.new_requests(name, prompt.token_ids, params, form)
            call.submit(requests, params, form)
            for _, delta in call.deltas():
                yield delta

    def _call(self) -> "_Call":
        return _Call(self._model, self._queues)

    def _route(self, outputs: StepOutputs) -> None:
        """On the engine thread: hands each output to the call that waits for it, if one does."""
        now = time.perf_counter()
        for output in outputs:
            waiting = self._queues.get(output.id)
            if waiting is not None:
                waiting.put((output, now))


class _Call:
    """The generations of one API call; leaving it aborts those that have not ended."""

    def __init__(self, model: LoadedModel, queues: dict[str, queue.SimpleQueue[Arrival]]) -> None:
        self._model = model
        self._queues = queues
        self._inbox: queue.SimpleQueue[Arrival] = queue.SimpleQueue()
        self._live: dict[str, Completion] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for request_id in list(self._live):
            self._model.engine.abort(request_id)
            self._forget(request_id)

    def submit(
        self, requests: Sequence[NewRequest], params: SamplingParams, form: Form
    ) -> list[Completion]:
        """Starts the n completions of a prompt."""
        completions = []
        for new in requests:
            now = time.perf_counter()
            completion = Completion.begin(self._model.tokenizer, params, now, form)
            self._live[new.id] = completion
            self._queues[new.id] = self._inbox
            self._model.engine.submit(new)
            completions.append(completion)
        return completions

    def deltas(self) -> Iterator[tuple[Completion, Delta]]:
        """What arrives, until every completion has ended; raises if the engine dies."""
        while self._live:
            output, arrived = self._inbox.get()
            completion = self._live.get(output.id)
            if completion is None:
                continue  # its stop string came first
            check_alive(self._model.engine, output)
            delta = completion.take(output, arrived)
            if completion.finish is not None:
                if output.finish is None:
                    self._model.engine.abort(output.id)
                self._forget(output.id)
            yield completion, delta

    def _forget(self, request_id: str) -> None:
        del self._live[request_id], self._queues[request_id]


def prioritised(
    requests: Iterable[NewRequest], priority: int, cache_salt: str = ""
) -> tuple[NewRequest, ...]:
    """The same requests with a priority and a salt for the prefix cache."""
    if type(priority) is not int or abs(priority) > MAX_PRIORITY:
        wanted = f"an integer from -{MAX_PRIORITY} to {MAX_PRIORITY}"
        raise InvalidRequest(f"priority must be {wanted}, not {short(priority)}", param="priority")
    return tuple(replace(new, priority=priority, cache_salt=cache_salt) for new in requests)


def _batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt (a text or token ids) as a list of one; a list of them as it is."""
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        return [cast(Prompt, prompts)]
    return cast(list[Prompt], list(prompts))


def _style[S: StrEnum](kind: type[S], name: str, value: str | None) -> S | None:
    if value is None or value in list(kind):
        return None if value is None else kind(value)
    raise ConfigError(f"{name} {short(value)}: give one of {', '.join(kind)}, or None")


def _check_single(params: SamplingParams | None) -> None:
    if params is not None and params.n != 1:
        raise InvalidRequest(f"n must be 1 for a stream, not {params.n}", param="n")


def _one_each[T](value: T | Sequence[T], name: str, count: int) -> Sequence[T]:
    if not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise InvalidRequest(f"{len(value)} {name} were given for {count} prompts")
    return value
