"""Workloads: which requests come when. Windows of them, other rates, generated ones, their prompts.

A workload is a list of `Arrival` in order of `at`. `traces.py` reads recorded ones from files.
"""

import math
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice, repeat

import numpy as np

from duetjax.config import ConfigError

BLOCK_TOKENS = 512
"""Tokens of a prompt's block, as in Mooncake's traces."""
MOST_REQUESTS = 10_000_000
"""More are not generated."""

_IDS = 2**30
"""Below it the first tokens of blocks, from it on those of private parts."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request of a workload.

    at: seconds since its beginning. prompt_tokens, output_tokens: at least 1. blocks: ids of the
    prompt's first blocks of BLOCK_TOKENS tokens: prompts whose ids begin alike begin with the same
    tokens. Empty: like no other.
    """

    at: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()


def within(arrivals: Iterable[Arrival], seconds: float, start: float = 0.0) -> list[Arrival]:
    """Those with start <= at < start + seconds; their times are counted from `start` on.

    seconds may be infinite. Raises `ConfigError` for what is no window.
    """
    if not 0.0 <= start < math.inf:
        raise ConfigError(f"a window's start must be at least 0 s, not {start:g}")
    if not seconds > 0.0:
        raise ConfigError(f"a window must have more than 0 s, not {seconds:g}")
    end = start + seconds
    return [_moved(each, each.at - start) for each in arrivals if start <= each.at < end]


def scaled(arrivals: Iterable[Arrival], factor: float) -> list[Arrival]:
    """The same with all times multiplied: order and burstiness stay."""
    return [_moved(each, each.at * factor) for each in arrivals]


def repeated(arrivals: Sequence[Arrival], times: int) -> list[Arrival]:
    """So often one after the other, a mean gap between them; the blocks of each time are its own.

    Raises `ConfigError` where no time passes.
    """
    span = len(arrivals) / mean_rate(arrivals)
    period = span + span / (len(arrivals) - 1)
    ids = 1 + max([max(each.blocks, default=0) for each in arrivals])
    return [
        replace(
            each, at=each.at + n * period, blocks=tuple([block + n * ids for block in each.blocks])
        )
        for n in range(times)
        for each in arrivals
    ]


def mean_rate(arrivals: Sequence[Arrival]) -> float:
    """Requests per second: their number over the time from the first to the last.

    Raises `ConfigError` where no time passes.
    """
    span = arrivals[-1].at - arrivals[0].at if arrivals else 0.0
    if span <= 0.0:
        raise ConfigError(
            f"no two of {len(arrivals)} requests come at different times, so they have no rate;"
            " take a longer window"
        )
    return len(arrivals) / span


def at_rate(arrivals: Sequence[Arrival], rate: float) -> list[Arrival]:
    """`scaled` so that `mean_rate` is `rate`. Raises `ConfigError` where that cannot be."""
    _check_above_0("rate", rate)
    return scaled(arrivals, mean_rate(arrivals) / rate)


def prompt_of(arrival: Arrival, number: int) -> tuple[int, ...]:
    """The prompt's token ids, below 2**31. number: of this request alone, below 2**30.

    A block's tokens follow from its id, which is below 2**53, those after the blocks from `number`.
    A page of KV is found by its tokens and all before them, so first tokens tell prompts apart:
    the others are 0. A last block that goes beyond the prompt ends with it.
    """
    assert 0 <= number < _IDS, f"request number {number} is not below 2**30"
    shared: list[int] = []
    for block in arrival.blocks:
        upper, lower = divmod(block, _IDS - 1)
        shared += (1 + lower, upper)
        shared += _REST_OF_BLOCK
    num_private = arrival.prompt_tokens - len(shared)
    if num_private <= 0:
        return tuple(shared[: arrival.prompt_tokens])
    return (*shared, _IDS + number) + (0,) * (num_private - 1)


_REST_OF_BLOCK = (0,) * (BLOCK_TOKENS - 2)


def _moved(arrival: Arrival, at: float) -> Arrival:
    return Arrival(at, arrival.prompt_tokens, arrival.output_tokens, arrival.blocks)


# Generated workloads.


@dataclass(frozen=True, slots=True)
class _Kind:
    """How a workload is drawn. prompt, output: quantiles of the tokens, see _SHARES."""

    prompt: tuple[int, ...]
    output: tuple[int, ...]
    rate: float | None
    cv: float
    has_conversations: bool = False


_SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1.0)
"""Which quantiles a `_Kind` has. Between two of them a length's logarithm is linear."""

# Quantiles computed from the traces: Azure LLM inference 2023 (Microsoft, CC-BY 4.0) and the
# conversation trace of Mooncake (FAST '25). Prompt and output are drawn independently: their
# correlation is between -0.11 and 0.07 in all three. Mooncake's times are multiples of 3 s, the
# requests in 3 s vary as a Poisson process's do (variance 1.1 x mean), hence its CV.
_KINDS = {
    "azure-code": _Kind(
        prompt=(3, 147, 578, 1469, 2744, 5188, 7303, 7436, 7436, 7436, 7437, 7437),
        output=(6, 7, 9, 13, 24, 55, 90, 171, 251, 359, 825, 1899),
        rate=2.57,
        cv=13.0,
    ),
    "azure-conversation": _Kind(
        prompt=(2, 207, 396, 1020, 1189, 2734, 4083, 4098, 4142, 4831, 6179, 14050),
        output=(7, 54, 85, 129, 395, 424, 451, 540, 601, 643, 954, 1000),
        rate=5.53,
        cv=1.1,
    ),
    "mooncake-conversation": _Kind(
        prompt=(891, 964, 2306, 6909, 15367, 27367, 39550, 66449, 85400, 100810, 121301, 126195),
        output=(1, 24, 156, 350, 472, 597, 698, 892, 1119, 1568, 2000, 2000),
        rate=3.40,
        cv=1.0,
        has_conversations=True,
    ),
}
FIXED = "fixed:"
KINDS = (*_KINDS, f"{FIXED}PROMPTxOUTPUT")
"""What can be generated, as messages name it."""


@dataclass(frozen=True, slots=True)
class Spec:
    """A workload to generate.

    kind: one of `KINDS`; fixed:1024x128 means 1024 prompt and 128 output tokens each time. rate:
    requests per second; None: the trace's own, which `fixed` lacks. seconds: how long they come.
    seed: at least 0. cv: coefficient of variation of the gaps between requests: 1 is a Poisson
    process, more is bursts, 0 is even spacing; None: the trace's own, for `fixed` 1.
    Raises `ConfigError` for what cannot be.
    """

    kind: str
    rate: float | None = None
    seconds: float = 600.0
    seed: int = 0
    cv: float | None = None

    def __post_init__(self) -> None:
        kind = _kind(self.kind)
        rate = kind.rate if self.rate is None else self.rate
        if rate is None:
            raise ConfigError(f"{self.kind} has no rate of its own; give requests per second")
        _check_above_0("rate", rate)
        _check_above_0("seconds", self.seconds)
        if not rate * self.seconds <= MOST_REQUESTS:
            raise ConfigError(
                f"{rate:g} requests/s for {self.seconds:g} s are more than {MOST_REQUESTS:,};"
                " choose fewer seconds or a lower rate"
            )
        if self.seed < 0:
            raise ConfigError(f"seed must be at least 0, not {self.seed}")
        if self.cv is not None and self.cv != 0 and not 0.01 <= self.cv <= 100:
            raise ConfigError(f"cv must be 0 or from 0.01 to 100, not {self.cv:g}")


def is_generated(name: str) -> bool:
    """Whether a name is meant for `generate`, whatever else may be called so."""
    return name in _KINDS or name.startswith(FIXED)


def generate(spec: Spec) -> list[Arrival]:
    """A workload of rate x seconds requests, the first at 0, the same for equal specs.

    Gaps are gamma distributed and scaled to fill the seconds, so that the rate is exact. At a CV
    as high as azure-code's, hundreds of requests come in one instant, which the trace spreads over
    seconds. The n-th request's lengths depend on kind and seed only.

    Lengths keep the quantiles of the trace, p50 and p99 among them, and its mean within 5 %; none
    is outside the trace's range. mooncake-conversation has blocks as well: every prompt begins with
    block 0, and with probability 0.45 it goes on with the longest of the last 16 conversations
    that it can hold. So about 39 % of the prompts share more than block 0 with an earlier one, and
    about 37 % of all blocks are an earlier prompt's, as in the trace.
    """
    kind = _kind(spec.kind)
    rate = kind.rate if spec.rate is None else spec.rate
    assert rate is not None, f"{spec} was checked"
    num = max(1, round(rate * spec.seconds))
    times, prompts, outputs, turns = (
        np.random.default_rng(seed) for seed in np.random.SeedSequence(spec.seed).spawn(4)
    )
    at = spec.seconds * _shares_of_time(times, num, kind.cv if spec.cv is None else spec.cv)
    prompt = _lengths(prompts, num, kind.prompt)
    blocks = _conversations(turns, prompt) if kind.has_conversations else repeat(())
    return list(map(Arrival, at.tolist(), prompt, _lengths(outputs, num, kind.output), blocks))


def _kind(name: str) -> _Kind:
    if not name.startswith(FIXED):
        if (kind := _KINDS.get(name)) is None:
            raise ConfigError(f"{name} cannot be generated; choose {', '.join(KINDS)}")
        return kind
    lengths = re.fullmatch(r"([1-9][0-9]{0,6})x([1-9][0-9]{0,6})", name.removeprefix(FIXED))
    if lengths is None:
        raise ConfigError(f"{name} must have two numbers of tokens, as fixed:1024x128 has")
    prompt, output = ((int(length),) * len(_SHARES) for length in lengths.groups())
    return _Kind(prompt, output, rate=None, cv=1.0)


def _check_above_0(name: str, value: float) -> None:
    if not 0.0 < value < math.inf:
        raise ConfigError(f"{name} must be a number above 0, not {value:g}")


def _shares_of_time(draw: np.random.Generator, num: int, cv: float) -> np.ndarray:
    """When requests come, from 0 on, as shares of the whole; the last gap ends at 1."""
    gaps = draw.gamma(cv**-2, size=num) if cv else np.ones(num)
    ends = np.cumsum(gaps)
    return np.concatenate(([0.0], ends[:-1])) / (ends[-1] or 1.0)


def _lengths(draw: np.random.Generator, num: int, quantiles: tuple[int, ...]) -> list[int]:
    logarithms = np.interp(draw.random(num), _SHARES, np.log(quantiles))
    lengths: list[int] = np.rint(np.exp(logarithms)).astype(np.int64).tolist()
    return lengths


def _conversations(draw: np.random.Generator, prompts: list[int]) -> Iterator[tuple[int, ...]]:
    """The whole blocks of each prompt; every prompt has one at least."""
    fresh = count(1)
    recent: deque[tuple[int, ...]] = deque(maxlen=16)
    for tokens, chance in zip(prompts, draw.random(len(prompts)).tolist(), strict=True):
        num_blocks = tokens // BLOCK_TOKENS
        fitting = [blocks for blocks in recent if len(blocks) <= num_blocks]
        before: tuple[int, ...] = (0,)
        if chance < 0.45 and fitting:
            before = max(fitting, key=len)
            recent.remove(before)
        recent.append((*before, *islice(fresh, num_blocks - len(before))))
        yield recent[-1]
