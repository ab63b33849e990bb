"""What the Python API gives back, and `Completion`, which makes it of the engine's tokens."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

from duetjax.config import InvalidRequest, SamplingParams
from duetjax.engine import Engine, EngineDead
from duetjax.form import PLAIN, Form
from duetjax.policy.request import FinishReason, TokenLogprob
from duetjax.policy.request import RequestOutput as EngineOutput
from duetjax.text.answer import AnswerDelta, AnswerParser, CallDelta, followed
from duetjax.text.stream import TextStream
from duetjax.text.tokenizer import Tokenizer


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
class ToolCall:
    """A call of a tool; arguments: the text of a JSON object, as the model wrote it."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One completion of a prompt, as far as it has come.

    finish_reason: None while it goes on; then "stop" or "length"; "abort" if it was aborted or the
    LLM was closed meanwhile; "error" if the model computed NaN or infinity for this completion,
    "constraint" if it could not go on under its grammar; then it is what came before that.
    logprobs: one for each of token_ids; None where the parameters do not ask for them. Token ids
    and logprobs include a token or string that ended the completion, text does not. Both are told
    as they are sampled, and may be ahead of the text of a completion that goes on.
    reasoning, tool_calls: what the model's parsers have told apart from the text; "tool_calls" is
    the finish_reason then.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
    timings: Timings
    logprobs: tuple[TokenLogprob, ...] | None = None
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A prompt and its `n` completions, in order; finished: whether all of them are.

    prompt is None where token ids or a conversation were given. num_cached_tokens: how many of its
    tokens came from the prefix cache; with n above 1, for the completion that found fewest.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    finished: bool
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of a streamed completion; finish_reason is set on the last one.

    token_ids and logprobs are told as they are sampled, and may be ahead of the text. reasoning,
    tool_calls: see `CompletionOutput`; of a call, its first piece has the name.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    reasoning: str = ""
    tool_calls: tuple[CallDelta, ...] = ()


@dataclass(slots=True)
class Completion:
    """A completion in the making: collects what the engine sends.

    stream: None for a model without a tokenizer; then there is no text. submitted: seconds of the
    clock that `take` is told the time by. parser: takes the text apart, where it has parts.
    min_tokens: a parser that needs no more text ends it, but not before so many. num_cached_tokens:
    None until its first output.
    """

    stream: TextStream | None
    submitted: float
    logprobs: list[TokenLogprob] | None
    parser: AnswerParser | None = None
    min_tokens: int = 0
    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    token_times: list[float] = field(default_factory=list)
    finish: str | None = None
    num_cached_tokens: int | None = None
    reasoning: list[str] = field(default_factory=list)
    calls: dict[int, list[CallDelta]] = field(default_factory=dict)

    @classmethod
    def begin(
        cls, tokenizer: Tokenizer | None, params: SamplingParams, now: float, form: Form = PLAIN
    ) -> Self:
        """An empty one. Raises `InvalidRequest` for stop strings where there is no text."""
        stream = None
        if tokenizer is not None:
            stream = TextStream(
                tokenizer,
                tuple(params.stop or ()),
                params.include_stop_str_in_output,
                min_tokens=params.min_tokens,
            )
        elif params.stop:
            raise InvalidRequest("stop strings need a model with a tokenizer", param="stop")
        parser = None if form.parser is None else form.parser()
        logprobs: list[TokenLogprob] | None = None if params.logprobs is None else []
        return cls(stream, now, logprobs, parser, params.min_tokens)

    def take(self, output: EngineOutput, now: float) -> Delta:
        """Adds one step's tokens; `finish` is set when the engine ended it.

        So it is by a stop string, and by a call that is whole, if the parser takes but one.
        """
        finish, text = output.finish, ""
        if self.stream is not None:
            if finish is None:
                delta = self.stream.push(output.token_ids)
            else:
                at_stop_id = finish is FinishReason.STOP
                delta = self.stream.end(output.token_ids, at_stop_id=at_stop_id)
            text = delta.text
            finish = FinishReason.STOP if delta.stopped else finish
        if self.num_cached_tokens is None:
            self.num_cached_tokens = output.num_cached_tokens
        self.finish = None if finish is None else finish.value
        self.token_ids += output.token_ids
        parts = self._apart(text)
        self.text.append(parts.content)
        self.token_times += [now - self.submitted] * len(output.token_ids)
        logprobs = None if self.logprobs is None else output.logprobs
        if self.logprobs is not None:
            self.logprobs += output.logprobs
        told = parts.content, output.token_ids, self.finish, logprobs
        return Delta(*told, parts.reasoning, parts.calls)

    def _apart(self, text: str) -> AnswerDelta:
        """A piece of the text in its parts."""
        if self.parser is None:
            return AnswerDelta(text)
        parts = self.parser.push(text)
        is_over = self.parser.is_over and len(self.token_ids) >= self.min_tokens
        if is_over and self.finish in (None, FinishReason.LENGTH):
            self.finish = FinishReason.STOP.value
        if self.finish is not None:
            parts = followed(parts, self.parser.end())
            if self.parser.num_calls and self.finish == FinishReason.STOP:
                self.finish = "tool_calls"
        self.reasoning.append(parts.reasoning)
        for call in parts.calls:
            self.calls.setdefault(call.index, []).append(call)
        return parts

    def output(self, index: int) -> CompletionOutput:
        """The completion as it is now."""
        return CompletionOutput(
            index=index,
            text="".join(self.text),
            token_ids=tuple(self.token_ids),
            finish_reason=self.finish,
            timings=Timings(tuple(self.token_times)),
            logprobs=None if self.logprobs is None else tuple(self.logprobs),
            reasoning="".join(self.reasoning),
            tool_calls=tuple(
                ToolCall(pieces[0].name or "", "".join(piece.arguments for piece in pieces))
                for pieces in self.calls.values()
            ),
        )


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt as it was given and as token ids; text: None where it was not given as a text.

    may_call: whether it offers tools; single_call: its answer ends with its first call.
    """

    text: str | None
    token_ids: tuple[int, ...]
    may_call: bool = False
    single_call: bool = False


def request_output(
    request_id: str, prompt: EncodedPrompt, completions: Sequence[Completion]
) -> RequestOutput:
    """A prompt and its completions as they are now."""
    cached = [c.num_cached_tokens for c in completions if c.num_cached_tokens is not None]
    return RequestOutput(
        request_id=request_id,
        prompt=prompt.text,
        prompt_token_ids=prompt.token_ids,
        outputs=tuple(c.output(index) for index, c in enumerate(completions)),
        finished=all(c.finish is not None for c in completions),
        num_cached_tokens=min(cached, default=0),
    )


def check_alive(engine: Engine, output: EngineOutput) -> None:
    """Raises `EngineDead` for an output that says so; one that failed alone is none."""
    if output.finish is FinishReason.ERROR and engine.failure is not None:
        raise EngineDead(f"the engine failed: {engine.failure!r}")
