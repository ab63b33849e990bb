"""What one client may ask for, how much may wait, and how long anything may take: all by flags."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from duetjax.config import MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_STOP_IDS, ConfigError, flag

_MAX_SECONDS = 1e6
_UNBOUNDED = (
    "max_prompt_characters",
    "max_num_queued_reqs",
    "max_num_queued_tokens",
    "ttft_slo_ms",
)


def _limit[T: int | None](default: T, text: str, *, least: int = 1, most: int = 2**31 - 1) -> T:
    return field(default=default, metadata={"help": text, "range": (least, most)})


def _seconds(default: float, text: str) -> float:
    metadata = {"help": f"{text}; 0: for ever", "range": (0.0, _MAX_SECONDS)}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one server; each is a flag of `duetjax serve` and is shown at /v1/limits.

    Whoever exceeds one is told so and counted in duetjax_refused_requests_total by its name.
    None is no bound. max_prompt_characters: None is 8 for each token of max_model_len.
    max_choices: prompts times n. max_num_queued_reqs: generations that wait beyond those that can
    run at once. max_num_queued_tokens: of prompts whose first token has not come; a prompt that
    finds none waiting is taken whatever its length. ttft_slo_ms: objective for the time to first
    token of requests that bring none; who would miss it by prediction is turned away.
    """

    max_body_bytes: int = _limit(2 * 2**20, "of a request's body")
    max_header_bytes: int = _limit(64 * 2**10, "of a request's headers", least=1024)
    max_headers: int = _limit(100, "headers of a request")
    max_prompt_characters: int | None = _limit(
        None, "of a request's prompt, before it is tokenised; default: 8 x max_model_len"
    )
    max_prompts: int = _limit(32, "prompts of a request")
    max_n: int = _limit(8, "completions of a prompt")
    max_choices: int = _limit(64, "prompts x n of a request")
    max_messages: int = _limit(1024, "messages of a conversation")
    max_tools: int = _limit(128, "tools of a conversation")
    max_schema_bytes: int = _limit(64 * 2**10, "of the JSON schema of an answer or of a tool")
    max_schema_depth: int = _limit(64, "objects and lists within each other in a schema", most=200)
    max_stop_strings: int = _limit(4, "stop strings")
    max_stop_characters: int = _limit(256, "characters of a stop string")
    max_stop_token_ids: int = _limit(MAX_STOP_IDS, "stop_token_ids", most=MAX_STOP_IDS)
    max_logit_bias: int = _limit(MAX_LOGIT_BIAS, "entries of logit_bias", most=MAX_LOGIT_BIAS)
    max_logprobs: int = _limit(5, "logprobs of a completion", least=0, most=MAX_LOGPROBS)
    max_top_logprobs: int = _limit(20, "top_logprobs of a chat", least=0, most=MAX_LOGPROBS)
    max_num_queued_reqs: int | None = _limit(
        256, "so many may wait for a slot, others get 429; 0: nobody waits", least=0
    )
    max_num_queued_tokens: int | None = _limit(2**20, "prompt tokens that may wait, then 429")
    ttft_slo_ms: float | None = field(
        default=None,
        metadata={
            "help": "429 where the first token is predicted to come later; default: never",
            "range": (1e-3, 1e9),
        },
    )
    header_timeout_s: float = _seconds(10.0, "for a request's headers to come")
    body_timeout_s: float = _seconds(30.0, "for its body to come")
    keep_alive_s: float = _seconds(5.0, "for the next request on a connection")
    queue_timeout_s: float = _seconds(60.0, "in the queue, then 503")
    request_timeout_s: float = _seconds(600.0, "from a request to its last token")
    slow_reader_timeout_s: float = _seconds(30.0, "without room to write to a client")

    def __post_init__(self) -> None:
        for each in fields(self):
            value, (least, most) = getattr(self, each.name), each.metadata["range"]
            if value is None and each.name in _UNBOUNDED:
                continue
            kind = "an integer" if type(least) is int else "a number"
            fits = type(value) is int or (type(value) is float and type(least) is float)
            if not (fits and least <= value <= most):
                raise ConfigError(f"{flag(each.name)} {value}: give {kind} from {least} to {most}")

    def characters(self, max_model_len: int) -> int:
        """Of a prompt, before it is tokenised: no text of so many could fit."""
        return self.max_prompt_characters or 8 * max_model_len

    def document(self, *, max_model_len: int, max_num_seqs: int) -> Mapping[str, Any]:
        """All bounds by name, those of the engine too; null where there is none."""
        return asdict(self) | {
            "max_prompt_characters": self.characters(max_model_len),
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
        }


OFFLINE = Limits(
    max_num_queued_reqs=None,
    max_num_queued_tokens=None,
    queue_timeout_s=0.0,
    request_timeout_s=0.0,
)
"""For work that nobody waits for at a socket: nothing is too late or too much at once."""
