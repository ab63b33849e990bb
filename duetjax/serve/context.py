"""What the routes of one endpoint share: the engine, the model's facts, and the bookkeeping."""

from collections.abc import Callable
from dataclasses import dataclass, field

from duetjax.config import SamplingParams
from duetjax.constrain.checker import GrammarChecker
from duetjax.engine import Engine
from duetjax.serve.admission import Admission
from duetjax.serve.dispatch import Dispatcher
from duetjax.serve.limits import Limits
from duetjax.serve.lives import Lives
from duetjax.serve.metrics import Metrics
from duetjax.serve.queue_bound import QueueBound
from duetjax.text.answer import ReasoningStyle, ToolStyle
from duetjax.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Service:
    """The model an endpoint serves, and how.

    model_names: the first is the one that /metrics and the log call it by; requests may use any.
    created: seconds since the epoch, shown at /v1/models. vocab_size: width of the logits.
    defaults: of the parameters that a request leaves out, as the model's makers recommend; its
    max_tokens is None where they recommend none. compilations: how many programs XLA has compiled
    in this process. api_key: None lets everybody in. ping_seconds: silence after which a stream
    says so. strict_params: refuse unknown fields instead of naming them. metrics_public: show
    /metrics without a key. watchdog_s, tbt_slo_ms: see `EngineConfig`; 0 watches nothing.
    tool_style, reasoning_style: how the model spells tool calls and reasoning; None: they are
    neither looked for nor offered. checker: of the grammars that requests bring.
    """

    client: Engine
    tokenizer: Tokenizer
    model_names: tuple[str, ...]
    created: int
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    defaults: SamplingParams
    compilations: Callable[[], int]
    api_key: str | None = field(default=None, repr=False)
    ping_seconds: float = 10.0
    limits: Limits = field(default_factory=Limits)
    strict_params: bool = False
    metrics_public: bool = False
    watchdog_s: float = 0.0
    tbt_slo_ms: float = 50.0
    tool_style: ToolStyle | None = None
    reasoning_style: ReasoningStyle | None = None
    checker: GrammarChecker = field(default_factory=GrammarChecker, repr=False)


@dataclass(frozen=True, slots=True)
class Context:
    """A service at work: all but `service` belong to one app."""

    service: Service
    dispatcher: Dispatcher
    admission: Admission
    metrics: Metrics
    queue: QueueBound
    lives: Lives = field(default_factory=Lives)
