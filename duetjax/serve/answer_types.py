"""The shapes of all that routes answer, for the schemas at /openapi.json.

A field that is not required is there where the request asked for it.
"""

from typing import Annotated, Any, Literal, NotRequired, TypedDict

from pydantic import WithJsonSchema

from duetjax.engine import CompletedLaunches
from duetjax.serve.limits import Limits
from duetjax.serve.protocol import ModelName, TokenId

type Code = Annotated[str, WithJsonSchema({"type": "string", "enum": "error_codes"})]
"""What programs branch on."""


class Fault(TypedDict):
    """What was wrong; param: the field at fault."""

    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    code: Code


class Error(TypedDict):
    """Every answer that is not a success, and the last event of a stream that failed."""

    error: Fault


class CachedTokens(TypedDict):
    """Where tokens of prompts came from."""

    cached_tokens: int


class ReasoningCount(TypedDict):
    """What of an answer is reasoning, where the server knows how the model marks it."""

    reasoning_tokens: int


class Usage(TypedDict):
    """Tokens of one call; each prompt counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: NotRequired[ReasoningCount]


class ChatTokenLogprob(TypedDict):
    """A token; bytes are null for an id without a token."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(ChatTokenLogprob):
    """A sampled token and the most likely ones in its place."""

    top_logprobs: list[ChatTokenLogprob]


class ChatLogprobs(TypedDict):
    """The tokens of a chat choice or chunk."""

    content: list[ChatLogprob]
    refusal: None


class FunctionCall(TypedDict):
    """arguments: the text of a JSON object, as the model wrote it."""

    name: str
    arguments: str


class ToolCall(TypedDict):
    """A tool that the assistant calls."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class FunctionCallDelta(TypedDict):
    """A piece of one; name in its first."""

    name: NotRequired[str]
    arguments: str


class ToolCallDelta(TypedDict):
    """A piece of the call with an index; id and type in its first."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionCallDelta


class AssistantMessage(TypedDict):
    """The assistant's turn; content is null where there is nothing but tool calls."""

    role: Literal["assistant"]
    content: str | None
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCall]]


class AssistantDelta(TypedDict):
    """A piece of the assistant's turn; role in its first."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCallDelta]]


class _Choice(TypedDict):
    index: int
    token_ids: NotRequired[list[TokenId]]


class ChatChoice(_Choice):
    """One whole generation."""

    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatChunkChoice(_Choice):
    """A piece of one; finish_reason on its last."""

    delta: AssistantDelta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None


class _ChatAnswer(TypedDict):
    id: str
    created: int
    model: ModelName
    prompt_token_ids: NotRequired[list[TokenId]]


class Timings(TypedDict):
    """How long a choice's parts took; launches is null where a stop string ended it."""

    index: int
    queue_ms: float
    prefill_ms: float
    decode_ms: float
    ttft_ms: float
    launches: int | None


class ChatCompletion(_ChatAnswer):
    """The answer to a conversation."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage
    duetjax_timings: NotRequired[list[Timings]]


class ChatCompletionChunk(_ChatAnswer):
    """One event of it; usage on a last one without choices, where stream_options asks for it."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: NotRequired[Usage | None]
    duetjax_timings: NotRequired[list[Timings]]


class CompletionLogprobs(TypedDict):
    """The tokens of a completion choice or chunk, by columns."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class _CompletionChoice(_Choice):
    text: str
    logprobs: CompletionLogprobs | None
    prompt_token_ids: NotRequired[list[TokenId]]


class CompletionChoice(_CompletionChoice):
    """One whole continuation."""

    finish_reason: Literal["stop", "length"]


class CompletionChunkChoice(_CompletionChoice):
    """A piece of one; finish_reason on its last."""

    finish_reason: Literal["stop", "length"] | None


class _CompletionAnswer(TypedDict):
    id: str
    object: Literal["text_completion"]
    created: int
    model: ModelName


class Completion(_CompletionAnswer):
    """The continuations of prompts."""

    choices: list[CompletionChoice]
    usage: Usage
    duetjax_timings: NotRequired[list[Timings]]


class CompletionChunk(_CompletionAnswer):
    """One event of them; usage on a last one without choices, where stream_options asks for it."""

    choices: list[CompletionChunkChoice]
    usage: NotRequired[Usage | None]
    duetjax_timings: NotRequired[list[Timings]]


class Model(TypedDict):
    """A name under which the model is served."""

    id: ModelName
    object: Literal["model"]
    created: int
    owned_by: Literal["duetjax"]
    max_model_len: int


class ModelList(TypedDict):
    """All of them."""

    object: Literal["list"]
    data: list[Model]


class Tokenized(TypedDict):
    """Token ids of a prompt or conversation."""

    count: int
    max_model_len: int
    tokens: list[TokenId]


class Detokenized(TypedDict):
    """The text of token ids."""

    prompt: str


class Health(TypedDict):
    """All is well."""

    status: Literal["ok"]


class Liveness(Health):
    """The engine's thread is alive; silence_s: since it last looked for work."""

    silence_s: float


ANSWERS: tuple[Any, ...] = (
    *(Error, ChatCompletion, ChatCompletionChunk, Completion, CompletionChunk),
    *(ModelList, Limits, Tokenized, Detokenized, Health, Liveness, CompletedLaunches),
)
