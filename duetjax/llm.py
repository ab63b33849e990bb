"""The Python API: `LLM` generates from prompts, in the caller's process, on the server's engine.

from duetjax import LLM, SamplingParams
with LLM() as llm:                              # no model named: the demo checkpoint
    [out] = llm.generate("What is TTFT?", SamplingParams(max_tokens=64))
    print(out.outputs[0].text)
"""

import itertools
import queue
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self, cast

from tqdm import tqdm

from duetjax.build import LoadedModel, ModelRequest, load
from duetjax.config import ConfigError, EngineConfig, InvalidRequest, SamplingParams
from duetjax.engine import EngineDead
from duetjax.policy.request import FinishReason, TokenLogprob
from duetjax.policy.request import RequestOutput as EngineOutput
from duetjax.text.stream import TextStream
from duetjax.text.tokenizer import Tokenizer

type Prompt = str | Sequence[int]
type Message = Mapping[str, Any]
type Arrival = tuple[EngineOutput, float]
"""An output, and when it reached this process (seconds of time.perf_counter)."""


@dataclass(frozen=True, slots=True)
class Timings:
    """When things happened to one completion, in seconds since its submission.

    token_times: when each token reached this process; the first one is the TTFT, and the
    differences are the times between tokens.
    """

    token_times: tuple[float, ...]

    @property
    def ttft(self) -> float | None:
        """Time to first token; None where there was none."""
        return self.token_times[0] if self.token_times else None

    @property
    def tbt(self) -> tuple[float, ...]:
        """Times between consecutive tokens."""
        return tuple(b - a for a, b in itertools.pairwise(self.token_times))


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One completion of a prompt.

    finish_reason: "stop" or "length"; "abort" if the LLM was closed meanwhile; "error" if the
    model computed NaN or infinity for this completion, which then is what came before that.
    logprobs: one for each of token_ids; None where the parameters do not ask for them. Token ids
    and logprobs include a token or string that ended the completion, text does not.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    timings: Timings
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A prompt and its `n` completions, in order. prompt is None where token ids were given."""

    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of a streamed completion; finish_reason is set on the last one.

    token_ids and logprobs are told as they are sampled, and may be ahead of the text.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(slots=True)
class _Completion:
    """A completion in the making: collects what the engine sends; no stream, no text."""

    stream: TextStream | None
    submitted: float
    logprobs: list[TokenLogprob] | None
    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    token_times: list[float] = field(default_factory=list)
    finish: str | None = None

    def take(self, output: EngineOutput, now: float) -> Delta:
        """Adds one step's tokens; `finish` is set when a stop string or the engine ended it."""
        finish, text = output.finish, ""
        if self.stream is not None:
            if finish is None:
                delta = self.stream.push(output.token_ids)
            else:
                at_stop_id = finish is FinishReason.STOP
                delta = self.stream.end(output.token_ids, at_stop_id=at_stop_id)
            text = delta.text
            finish = FinishReason.STOP if delta.stopped else finish
        self.finish = None if finish is None else finish.value
        self.text.append(text)
        self.token_ids += output.token_ids
        self.token_times += [now - self.submitted] * len(output.token_ids)
        if self.logprobs is None:
            return Delta(text, output.token_ids, self.finish)
        self.logprobs += output.logprobs
        return Delta(text, output.token_ids, self.finish, output.logprobs)

    def output(self, index: int) -> CompletionOutput:
        """The finished completion."""
        assert self.finish is not None, f"completion {index} has not finished"
        return CompletionOutput(
            index=index,
            text="".join(self.text),
            token_ids=tuple(self.token_ids),
            finish_reason=self.finish,
            timings=Timings(tuple(self.token_times)),
            logprobs=None if self.logprobs is None else tuple(self.logprobs),
        )


class LLM:
    """A model with its engine, ready to generate; close it, or use it in a `with` block.

    model: a folder, preset name or hub id; None is the bundled demo. tokenizer: another folder to
    take the tokenizer from. chat_template: a file to use instead of the model's template.
    load_format: "auto" or "dummy" (random weights). Everything else is a field of `EngineConfig`.
    Raises `DuetJAXError` with one line that says what to do. Methods may be called from several
    threads.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        tokenizer: str | None = None,
        chat_template: Path | None = None,
        load_format: str = "auto",
        **engine: Any,
    ) -> None:
        names = [field.name for field in fields(EngineConfig)]
        if unknown := engine.keys() - set(names):
            raise ConfigError(
                f"LLM has no setting {', '.join(sorted(unknown))}; there are {', '.join(names)}"
            )
        request = ModelRequest(model, tokenizer, chat_template, load_format)
        self._model = load(request, EngineConfig(**engine))
        self._ids = itertools.count()
        self._queues: dict[str, queue.SimpleQueue[Arrival]] = {}
        self._model.engine.start(self._route)

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` can be used."""
        tokenizer = self._model.tokenizer
        return tokenizer is not None and tokenizer.has_chat_template

    def get_default_sampling_params(self) -> SamplingParams:
        """The model's own defaults, from its generation_config.json."""
        return self._model.defaults

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Completes prompts, batched; one result per prompt, in order.

        prompts: a text, a list of token ids, or a list of these. sampling_params: one for all or
        one each; None is the model's defaults. Raises `InvalidRequest` for a prompt or parameter
        that cannot be served; then nothing of the batch goes on running. A completion that fails
        alone does not raise: its finish_reason is "error", and the others are whole.
        """
        batch = _batch(prompts)
        texts = [prompt if isinstance(prompt, str) else None for prompt in batch]
        return self._run(texts, [self._encode(p) for p in batch], sampling_params, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answers one conversation or a list of them, through the model's chat template."""
        single = bool(messages) and isinstance(messages[0], Mapping)
        batch = cast(Sequence[Sequence[Message]], [messages] if single else messages)
        encoded = [tuple(self._tokenizer().encode_chat(m)) for m in batch]
        return self._run([None] * len(batch), encoded, sampling_params, use_tqdm)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Iterator[Delta]:
        """Completes one prompt piece by piece; dropping the iterator aborts the generation."""
        _check_single(sampling_params)
        return self._stream(self._encode(prompt), sampling_params)

    def stream_chat(
        self, messages: Sequence[Message], sampling_params: SamplingParams | None = None
    ) -> Iterator[Delta]:
        """Answers one conversation piece by piece; dropping the iterator aborts it."""
        _check_single(sampling_params)
        return self._stream(tuple(self._tokenizer().encode_chat(messages)), sampling_params)

    def close(self) -> None:
        """Ends what is running and frees the engine; safe to call twice."""
        self._model.engine.shutdown(timeout=30)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(
        self,
        texts: list[str | None],
        prompts: list[tuple[int, ...]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        wanted = self._model.defaults if sampling_params is None else sampling_params
        params = _one_each(wanted, len(prompts))
        groups: list[list[_Completion]] = []
        with self._call() as call:
            for prompt, one in zip(prompts, params, strict=True):
                groups.append(call.submit(prompt, one))
            total = sum(map(len, groups))
            with tqdm(total=total, desc="generating", disable=not use_tqdm) as bar:
                for completion, _ in call.deltas():
                    bar.update(completion.finish is not None)
        return [
            RequestOutput(text, prompt, tuple(c.output(i) for i, c in enumerate(group)))
            for text, prompt, group in zip(texts, prompts, groups, strict=True)
        ]

    def _stream(self, prompt: tuple[int, ...], params: SamplingParams | None) -> Iterator[Delta]:
        with self._call() as call:
            call.submit(prompt, self._model.defaults if params is None else params)
            for _, delta in call.deltas():
                yield delta

    def _call(self) -> "_Call":
        return _Call(self._model, f"llm-{next(self._ids)}", self._queues)

    def _route(self, outputs: tuple[EngineOutput, ...]) -> None:
        """On the engine thread: hands each output to the call that waits for it, if one does."""
        now = time.perf_counter()
        for output in outputs:
            waiting = self._queues.get(output.id)
            if waiting is not None:
                waiting.put((output, now))

    def _encode(self, prompt: Prompt) -> tuple[int, ...]:
        if not isinstance(prompt, str | Sequence):
            kind = type(prompt).__name__
            raise InvalidRequest(f"a prompt is a text or a list of token ids, not a {kind}")
        return tuple(self._tokenizer().encode(prompt) if isinstance(prompt, str) else prompt)

    def _tokenizer(self) -> Tokenizer:
        if self._model.tokenizer is None:
            raise InvalidRequest(
                f"model {self._model.name} has no tokenizer: give token ids, or name a folder that"
                " has one as `tokenizer`"
            )
        return self._model.tokenizer


class _Call:
    """The generations of one API call; leaving it aborts those that have not ended."""

    def __init__(
        self, model: LoadedModel, name: str, queues: dict[str, queue.SimpleQueue[Arrival]]
    ) -> None:
        self._model = model
        self._name = name
        self._queues = queues
        self._inbox: queue.SimpleQueue[Arrival] = queue.SimpleQueue()
        self._live: dict[str, _Completion] = {}
        self._ids = itertools.count()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for request_id in list(self._live):
            self._model.engine.abort(request_id)
            self._forget(request_id)

    def submit(self, prompt: tuple[int, ...], params: SamplingParams) -> list[_Completion]:
        """Starts the n completions of a prompt."""
        completions = []
        name = f"{self._name}-{next(self._ids)}"
        for new in self._model.new_requests(name, prompt, params):
            wanted: list[TokenLogprob] | None = None if params.logprobs is None else []
            completion = _Completion(self._stream(params), time.perf_counter(), wanted)
            self._live[new.id] = completion
            self._queues[new.id] = self._inbox
            self._model.engine.submit(new)
            completions.append(completion)
        return completions

    def deltas(self) -> Iterator[tuple[_Completion, Delta]]:
        """What arrives, until every completion has ended; raises if the engine dies."""
        while self._live:
            output, arrived = self._inbox.get()
            completion = self._live.get(output.id)
            if completion is None:
                continue  # its stop string came first
            if output.finish is FinishReason.ERROR and self._model.engine.failure is not None:
                raise EngineDead(f"the engine failed: {self._model.engine.failure!r}")
            delta = completion.take(output, arrived)
            if completion.finish is not None:
                if output.finish is None:
                    self._model.engine.abort(output.id)
                self._forget(output.id)
            yield completion, delta

    def _stream(self, params: SamplingParams) -> TextStream | None:
        if self._model.tokenizer is not None:
            return TextStream(
                self._model.tokenizer,
                tuple(params.stop or ()),
                params.include_stop_str_in_output,
                min_tokens=params.min_tokens,
            )
        if params.stop:
            raise InvalidRequest("stop strings need a model with a tokenizer", param="stop")
        return None

    def _forget(self, request_id: str) -> None:
        del self._live[request_id], self._queues[request_id]


def _batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt (a text or token ids) as a list of one; a list of them as it is."""
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        return [cast(Prompt, prompts)]
    return cast(list[Prompt], list(prompts))


def _check_single(params: SamplingParams | None) -> None:
    if params is not None and params.n != 1:
        raise InvalidRequest(f"n must be 1 for a stream, not {params.n}", param="n")


def _one_each(
    params: SamplingParams | Sequence[SamplingParams], count: int
) -> Sequence[SamplingParams]:
    if isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise InvalidRequest(f"{len(params)} sampling_params were given for {count} prompts")
    return params
