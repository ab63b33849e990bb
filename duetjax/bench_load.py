"""What a benchmark sends, and when: a workload's prompts, and the bodies of HTTP requests."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf, isinf
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from duetjax.config import ConfigError
from duetjax.sim.traces import load
from duetjax.sim.workload import BLOCK_TOKENS, FIXED, Arrival, Spec, generate, scaled

type Tokens = NDArray[np.int64]

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USUAL_PROMPTS = 1000
MOST_TOKENS = 200_000_000
"""Of all prompts together, which are in memory from the start: making them costs time."""

_WORDS = (
    "the of and to in is it you that he was for on are with as his they be at one have this from"
    " or had by hot but some what there we can out other were all your when up use word how said"
)
_PRIVATE = 2**62
"""Above all ids of blocks."""


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """Which requests come when: flags of `duetjax bench` by their names.

    trace: None for prompts of random_input_len random tokens. request_rate: requests/s; inf: all at
    once; None: the trace's own, inf without one. burstiness: of generated gaps, 1 being a Poisson
    process, less more bursts, inf even spacing: their coefficient of variation is its square root's
    inverse; None: 1, or the generated trace's own.
    """

    trace: str | None = None
    random_input_len: int = 1024
    random_output_len: int = 128
    num_prompts: int | None = None
    request_rate: float | None = None
    burstiness: float | None = None
    duration: float | None = None
    start: float = 0.0
    seed: int = 0


def arrivals_of(request: LoadRequest) -> list[Arrival]:
    """The workload. Raises `ConfigError` with one line that names what is wrong."""
    num, rate = request.num_prompts, request.request_rate
    if num is not None and not num > 0:
        raise ConfigError(f"--num-prompts {num}: give 1 or more")
    if rate is not None and not rate > 0:
        raise ConfigError(f"--request-rate {rate:g}: give requests/s above 0, or inf")
    finite = None if rate is None or isinf(rate) else rate
    if request.trace is not None:
        arrivals = load(
            request.trace,
            rate=finite,
            seconds=request.duration,
            start=request.start,
            seed=request.seed,
            cv=_cv(request.burstiness),
        )[:num]
        return scaled(arrivals, 0.0) if rate == inf else arrivals
    if request.duration is not None or request.start != 0.0:
        raise ConfigError("--duration and --start are of a trace; give --trace, or --num-prompts")
    for name, length in (
        ("input", request.random_input_len),
        ("output", request.random_output_len),
    ):
        if not 0 < length < 10**7:
            raise ConfigError(f"--random-{name}-len {length}: give tokens from 1 to 9999999")
    kind = f"{FIXED}{request.random_input_len}x{request.random_output_len}"
    pace, num = finite or 1.0, num or USUAL_PROMPTS
    arrivals = generate(Spec(kind, pace, num / pace, request.seed, _cv(request.burstiness)))
    return arrivals if finite else scaled(arrivals, 0.0)


def _cv(burstiness: float | None) -> float | None:
    if burstiness is None:
        return None
    if not (1e-4 <= burstiness <= 1e4 or isinf(burstiness)) or burstiness < 0:
        raise ConfigError(
            f"--burstiness {burstiness:g}: give a number from 0.0001 to 10000, or inf"
        )
    return float(burstiness**-0.5)


@dataclass(frozen=True, slots=True)
class Prompts:
    """Makes token ids below vocab_size. seed: other prompts for another."""

    vocab_size: int
    seed: int

    def all_of(self, arrivals: Sequence[Arrival]) -> Iterator[Tokens]:
        """One for each, in their order. Raises `ConfigError` for more than memory should hold."""
        if (tokens := sum([each.prompt_tokens for each in arrivals])) > MOST_TOKENS:
            raise ConfigError(
                f"the prompts have {tokens:,} tokens, more than {MOST_TOKENS:,}; choose fewer with"
                " --num-prompts or --duration"
            )
        return (self.of(each, number) for number, each in enumerate(arrivals))

    def of(self, arrival: Arrival, number: int) -> Tokens:
        """number: of this request alone, below 2**62: what its prompt shares with no other."""
        return np.concatenate(list(self._parts(arrival, number)))

    def _parts(self, arrival: Arrival, number: int) -> Iterator[Tokens]:
        """Of the prompt: its blocks, which are alike wherever they appear, and what is its own."""
        left = arrival.prompt_tokens
        for block in arrival.blocks:
            yield self._draw(block, min(left, BLOCK_TOKENS))
            left -= min(left, BLOCK_TOKENS)
        if left:
            yield self._draw(_PRIVATE + number, left)

    def _draw(self, of: int, count: int) -> Tokens:
        draw = np.random.default_rng((self.seed, of))
        return draw.integers(0, self.vocab_size, count)


def body_of(
    endpoint: str, model: str, prompt: Tokens, num_tokens: int, extra: dict[str, Any]
) -> bytes:
    """A request for so many tokens after a prompt: its ids, or for chats as many words."""
    asked: dict[str, Any] = {"prompt": prompt}
    if endpoint == CHAT:
        words = _WORDS.split()
        text = " ".join([words[token % len(words)] for token in prompt.tolist()])
        asked = {"messages": [{"role": "user", "content": text}]}
    asked |= {"model": model, "max_tokens": num_tokens, "stream": True}
    asked |= {"stream_options": {"include_usage": True}}
    return orjson.dumps(asked | extra, option=orjson.OPT_SERIALIZE_NUMPY)
