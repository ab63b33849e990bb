"""Puts a serving engine together: model folder -> tokenizer -> engine, on a device or without one.

The one place that knows every part; `cli` and `llm` build their engine here. Loads no jax unless a
device is to compute something.
"""

import logging
import random
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from duetjax import build_sim
from duetjax.checkpoint.generation import GenerationDefaults
from duetjax.checkpoint.source import LoadFormat, ModelSource, SourceKind, resolve_model
from duetjax.config import (
    ConfigError,
    DeviceName,
    EngineConfig,
    InvalidRequest,
    ModelConfig,
    SamplingParams,
)
from duetjax.engine import Engine
from duetjax.engine_process import EngineProcess
from duetjax.form import PLAIN, TAIL_TOKENS, Form, form_of
from duetjax.log_lines import LogFormat
from duetjax.planning import check_profiles
from duetjax.policy.request import NewRequest, new_requests
from duetjax.text.answer import ReasoningStyle, ToolStyle
from duetjax.text.tokenizer import Tokenizer

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelRequest:
    """Which model to load: the --model, --tokenizer, --chat-template and --load-format flags."""

    model: str | None = None
    tokenizer: str | None = None
    chat_template: Path | None = None
    load_format: str = "auto"


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to serve; `engine` is built but not started.

    tokenizer is None for a preset named without --tokenizer. generation: what the model's makers
    recommend where a request leaves a parameter out. compilations: how many programs XLA has
    compiled in this process. notice: what is to be said of its answers; usually nothing.
    """

    name: str
    config: ModelConfig
    tokenizer: Tokenizer | None
    generation: GenerationDefaults
    max_model_len: int
    engine: Engine
    _seeds: random.Random = field(repr=False)
    compilations: Callable[[], int] = field(default=lambda: 0, repr=False)
    notice: str = ""

    def new_requests(
        self, request_id: str, prompt: tuple[int, ...], params: SamplingParams, form: Form = PLAIN
    ) -> tuple[NewRequest, ...]:
        """The engine's requests for a prompt's n completions; draws a seed where none is given.

        form: as `form` makes it of params that ask for one.
        """
        if params.seed is None:
            params = replace(params, seed=self._seeds.getrandbits(62))
        return new_requests(
            request_id,
            prompt,
            params,
            eos_token_ids=self.generation.eos_token_ids,
            room=max(1, self.max_model_len - len(prompt)),
            constraint=form.constraint,
        )

    def form(
        self,
        prompt: tuple[int, ...],
        params: SamplingParams,
        *,
        reasoning: ReasoningStyle | None = None,
        tools: ToolStyle | None = None,
        single_call: bool = False,
    ) -> Form:
        """What is asked of the answers to a prompt; `InvalidRequest` where that cannot be kept.

        reasoning, tools, single_call: see `form_of`.
        """
        if params.max_reasoning_tokens is not None and reasoning is None:
            raise InvalidRequest(
                "max_reasoning_tokens needs a reasoning_parser; name one as the model is loaded",
                param="max_reasoning_tokens",
            )
        if params.structured_outputs is None and reasoning is None and tools is None:
            return PLAIN
        if self.tokenizer is None:
            raise InvalidRequest(
                f"model {self.name} has no tokenizer to tell by what an answer may be",
                param="structured_outputs",
            )
        return form_of(
            self.tokenizer.decode(prompt[-TAIL_TOKENS:], skip_special_tokens=False),
            grammar=self._grammar(params),
            reasoning=reasoning,
            tools=tools,
            max_reasoning_tokens=params.max_reasoning_tokens,
            single_call=single_call,
        )

    @staticmethod
    def _grammar(params: SamplingParams) -> str | None:
        if params.structured_outputs is None:
            return None
        from duetjax.constrain.grammars import check_together, grammar_of  # loads llguidance

        check_together(params)
        return grammar_of(params.structured_outputs)

    @property
    def defaults(self) -> SamplingParams:
        """generation_config.json's recommendations over the API's defaults."""
        sampling = self.generation.sampling
        if sampling.max_tokens is None:
            return replace(sampling, max_tokens=SamplingParams().max_tokens)
        return sampling


def load(
    request: ModelRequest,
    engine: EngineConfig,
    *,
    needs_tokenizer: bool = False,
    own_process: bool = False,
    log_format: LogFormat = LogFormat.TEXT,
) -> LoadedModel:
    """Loads weights and compiles every program, saying what it does; takes seconds to minutes.

    With --device sim there is neither, and it takes a moment. own_process: the engine is an
    `EngineProcess`, and does this there; log_format: of what it logs.
    Raises `DuetJAXError` with one line for whatever the caller can mend.
    """
    check_profiles(engine)
    is_simulated = engine.device == DeviceName.SIM
    load_format = request.load_format
    if is_simulated and load_format == LoadFormat.AUTO:
        load_format = LoadFormat.DUMMY  # no weights are looked for
    source = resolve_model(request.model, load_format=load_format)
    with ExitStack() as on_failure:
        process = None
        if own_process:  # which loads jax while this one loads the tokenizer
            process = EngineProcess.load(request, engine, log_format)
            on_failure.callback(process.kill)
        else:
            _describe(source)
        tokenizer = _tokenizer(source, request)
        if tokenizer is None and needs_tokenizer:
            raise ConfigError(
                f"model {source.name} has no tokenizer; name a folder with --tokenizer"
            )
        loaded = partial(
            LoadedModel,
            name=source.name,
            config=source.config,
            tokenizer=tokenizer,
            generation=source.generation,
            _seeds=random.Random(engine.seed),
        )
        if process is not None:
            process.wait_ready()
            on_failure.pop_all()
            return loaded(
                engine=process,
                max_model_len=process.max_model_len,
                notice=process.notice,
                compilations=lambda: process.num_compilations,
            )
    if is_simulated:
        client, max_model_len, notice = build_sim.build_engine(source, tokenizer, engine)
        return loaded(engine=client, max_model_len=max_model_len, notice=notice)
    from duetjax.build_device import build_engine  # loads jax
    from duetjax.runtime import compilations

    client, plan = build_engine(source, engine, load_format=load_format, tokenizer=tokenizer)
    return loaded(engine=client, max_model_len=plan.max_model_len, compilations=compilations.count)


def _describe(source: ModelSource) -> None:
    _log.info(source.description)
    if source.generation.ignored:
        _log.warning(
            "generation_config.json: %s not supported, ignored",
            ", ".join(source.generation.ignored),
        )


def _tokenizer(source: ModelSource, request: ModelRequest) -> Tokenizer | None:
    if request.tokenizer is not None:
        folder: Path | None = Path(request.tokenizer)
    else:
        folder = source.folder
    if folder is None:
        assert source.kind is SourceKind.PRESET, f"{source.kind} without a folder"
        return None
    return Tokenizer.from_folder(folder, chat_template=request.chat_template)
