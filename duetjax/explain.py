"""`duetjax explain`: what Foresight predicts of one load on every split, and what duet would do.

From profiles alone: no GPU, no weights, no jax. Decides nothing itself; `policy` does.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from reprlib import repr as short
from typing import Self

import numpy as np
from numpy.typing import NDArray

from duetjax.config import ConfigError, EngineConfig
from duetjax.policy.duet import DuetPolicy, Prospect, Sizes, bounds
from duetjax.policy.foresight import Foresight
from duetjax.policy.launch import Lane, Program, Split
from duetjax.policy.partition import Candidates, Choice, Outcome, choose
from duetjax.policy.policies import Aggregate, Decision, Details, Load
from duetjax.policy.profiles import Basis, HardwareProfile, ModelProfile
from duetjax.policy.roofline import Attention
from duetjax.profile_files import (
    Kind,
    by_name,
    read_hardware_profile,
    read_model_profile,
    shipped,
    shipped_file,
)

_PREFILL = re.compile(r"(\d{1,8})(?::(\d{1,8}))?", re.ASCII)
_DECODE = re.compile(r"(\d{1,8})x(\d{1,8})", re.ASCII)
_MOST_BUDGET = 65_536
_MOST_TOKENS = 2**24  # of a prompt or a context; any sum of them stays within the roofline's bounds


@dataclass(frozen=True, slots=True)
class ExplainRequest:
    """The flags of `duetjax explain`, by their names; prefill and decode as they were typed.

    kv_cache_dtype: as in `EngineConfig`; "auto" leaves what the model's profile says.
    """

    model: str | None = None
    gpu: str | None = None
    prefill: Sequence[str] = ()
    decode: Sequence[str] = ()
    tbt_slo_ms: float = 50.0
    max_num_batched_tokens: int = 8192
    hardware_profile: Path | None = None
    model_profile: Path | None = None
    attention: str = Attention.FUSED
    kv_cache_dtype: str = "auto"


@dataclass(frozen=True, slots=True, eq=False)
class Times:
    """What was foreseen on every split: ms of a decode step [S], of prefill launches [S, J]."""

    splits: Sequence[Split]
    decode_ms: NDArray[np.float64]
    prefill_tokens: Sequence[int]
    prefill_ms: NDArray[np.float64]

    @classmethod
    def of(cls, found: Candidates) -> Self:
        """Of candidates, which were not asked for all of them yet."""
        beside = [found.prefill_ms(s) for s in range(len(found.splits))]
        return cls(found.splits, np.array(found.decode_ms), found.prefill_tokens, np.array(beside))


@dataclass(frozen=True, slots=True, eq=False)
class Explanation:
    """Predictions for one load, and what `DuetPolicy` makes of them.

    factor: of the roofline's times in all others. mixed_*: the launch on the whole device, and its
    bucket. candidates: every split's times. on_splits: what each split is best used for, within
    all bounds but the objective. chosen: None where the mixed launch keeps the objective.
    """

    model: ModelProfile
    hardware: HardwareProfile
    details: Details
    factor: float
    mixed_tokens: int
    mixed_bucket: int
    mixed_ms: float
    candidates: Times
    on_splits: tuple[Choice, ...]
    chosen: Choice | None
    decision: Decision

    @property
    def tbt_slo_ms(self) -> float:
        """The objective: the longest that a decode step may take."""
        return self.details.tbt_slo_ms


def explain(request: ExplainRequest) -> Explanation:
    """Raises `ConfigError` with one line that says what to do, and what there is to choose from."""
    if request.attention not in list(Attention):
        choices = " or ".join(Attention)
        raise ConfigError(f"--attention {short(request.attention)}: choose {choices}")
    details, budget = _details(request), request.max_num_batched_tokens
    kv_bytes = EngineConfig(kv_cache_dtype=request.kv_cache_dtype).kv_dtype_bytes
    model, hardware = _model_profile(request), _hardware_profile(request)
    if kv_bytes is not None:
        model = replace(model, kv_dtype_bytes=kv_bytes)
    return explained(model, hardware, details, budget, Attention(request.attention))


def explained(
    model: ModelProfile,
    hardware: HardwareProfile,
    details: Details,
    budget: int,
    attention: Attention = Attention.FUSED,
) -> Explanation:
    """What is foretold of one load, at most `budget` tokens being in a launch."""
    foresight = Foresight(model, hardware, attention=attention)
    sizes = _sizes(model, budget, len(details.contexts))
    prompt_tokens = sum(left for _, left in details.prompts)
    policy = DuetPolicy(foresight, sizes)
    decision = policy.decide(Load(len(details.contexts), prompt_tokens, lambda: details))
    mixed_tokens = min(budget, len(details.contexts) + prompt_tokens)
    prospect = Prospect(foresight, sizes, details)
    mixed_ms, within = prospect.mixed_ms(budget), bounds(sizes, details, inf)
    found = prospect.candidates(within.max_prefill_ms, mixed_ms)
    alone = []
    for split in foresight.splits:
        on_split = Prospect(foresight, sizes, replace(details, split=split))
        each = on_split.candidates(within.max_prefill_ms, mixed_ms)
        alone.append(choose(each, within, None))
    chosen = policy.last_choice
    return Explanation(
        model=model,
        hardware=hardware,
        details=details,
        factor=foresight.calibration.factor(Lane.WHOLE, Program.PREFILL),
        mixed_tokens=mixed_tokens,
        mixed_bucket=sizes.bucket(Program.PREFILL, mixed_tokens),
        mixed_ms=mixed_ms,
        candidates=Times.of(found),
        on_splits=tuple(
            [chosen if chosen and chosen.split == each.split else each for each in alone]
        ),
        chosen=chosen,
        decision=decision,
    )


def lines(told: Explanation) -> Iterator[str]:
    """The explanation as text: the mixed launch, a row for each split, the reason, the sources."""
    contexts = told.details.contexts
    prompts = ", ".join(f"{left} after {start}" for start, left in told.details.prompts)
    met = "meets" if told.mixed_ms <= told.tbt_slo_ms else "misses"
    hardware = told.hardware
    yield f"{told.model.served_as} on {hardware.name}, {hardware.cores} cores (SMs on a GPU)"
    yield f"{len(contexts)} rows decode at {contexts.mean():g} tokens; prompt tokens: {prompts}"
    yield (
        f"mixed launch of {told.mixed_tokens} tokens on the whole device (program prefill"
        f" {told.mixed_bucket}): {told.mixed_ms:.2f} ms, {met} the objective of"
        f" {told.tbt_slo_ms:g} ms"
    )
    yield ""
    yield from _table(told)
    yield ""
    yield _why(told)
    yield (
        f"predictions: the roofline's x {told.factor:g}, which is assumed until launches have been"
        " measured"
    )
    yield (
        f"profiles: model derived (compiled for {told.model.compiled_for}); hardware"
        f" {_basis(hardware)}"
    )


_COLUMNS = (
    ("decode/prefill cores", 22),
    ("decode step ms", 16),
    ("prefill ms", 12),
    ("prompt tokens", 15),
    ("steps k", 9),
    ("tokens/s", 10),
    ("objective", 11),
)


def _table(told: Explanation) -> Iterator[str]:
    if not told.on_splits:
        yield f"{told.hardware.name} cannot be divided"
        return
    yield "".join(f"{name:>{width}}" for name, width in _COLUMNS)
    for each in told.on_splits:
        assert each.split is not None, each
        cells = (
            f"{'> ' if each is told.chosen else ''}{each.split.decode:3}/{each.split.prefill:<3}",
            f"{each.decode_ms:.2f}",
            f"{each.prefill_ms:.2f}",
            each.prefill_tokens,
            each.k,
            f"{each.throughput:.0f}",
            "met" if each.decode_ms <= told.tbt_slo_ms else "missed",
        )
        yield "".join(f"{cell:>{width}}" for cell, (_, width) in zip(cells, _COLUMNS, strict=True))


def _why(told: Explanation) -> str:
    """What duet does, and the optimiser's reason in its own words."""
    choice, decision = told.chosen, told.decision
    if choice is None:
        return "duet: one mixed launch, as it keeps the objective; nothing is split"
    if isinstance(decision, Aggregate):
        if choice.outcome is Outcome.DECODE_ALONE:
            return f"duet: decode and prefill in turn, as {choice.reason}"
        return f"duet: mixed launches of {decision.budget} tokens, as {choice.reason}"
    split, steps = decision.split, "1 step" if decision.k == 1 else f"{decision.k} steps"
    return (
        f"duet: {split.decode} cores decode, {steps} a launch, and {split.prefill} prefill, as"
        f" {choice.reason}"
    )


def _basis(hardware: HardwareProfile) -> str:
    names: dict[Basis, list[str]] = {basis: [] for basis in Basis}
    for name, origin in hardware.origins.items():
        names[origin.basis].append(name)
    return "; ".join(f"{basis} ({', '.join(of)})" for basis, of in names.items() if of)


def _details(request: ExplainRequest) -> Details:
    """The load that --prefill and --decode describe; k may be as large as the policy lets it."""
    if not (request.prefill and request.decode):
        raise ConfigError(
            "--prefill and --decode: give both, such as --prefill 4096 --decode 64x2048"
        )
    if not 0 < request.tbt_slo_ms < 1e9:
        raise ConfigError(f"--tbt-slo-ms {request.tbt_slo_ms:g}: give milliseconds above 0")
    groups = [_numbers(_DECODE, "--decode", text, "64x2048") for text in request.decode]
    rows, budget = sum(rows for rows, _ in groups), request.max_num_batched_tokens
    if not rows < budget <= _MOST_BUDGET:
        raise ConfigError(
            f"--max-num-batched-tokens {budget}: give more than the {rows} rows of --decode and at"
            f" most {_MOST_BUDGET}"
        )
    prompts = [_numbers(_PREFILL, "--prefill", text, "4096:1024") for text in request.prefill]
    return Details(
        contexts=np.concatenate([np.full(rows, context) for rows, context in groups]),
        prompts=tuple([(cached, tokens) for tokens, cached in prompts]),
        tbt_slo_ms=request.tbt_slo_ms,
        max_k=_MOST_TOKENS,
    )


def _numbers(pattern: re.Pattern[str], flag: str, text: str, example: str) -> tuple[int, int]:
    found = pattern.fullmatch(text)
    first, second = (int(group or 0) for group in found.groups()) if found else (0, 0)
    if not (0 < first < _MOST_TOKENS and second < _MOST_TOKENS):
        raise ConfigError(
            f"{flag} {short(text)}: write it like {example}, in tokens, each below {_MOST_TOKENS}"
        )
    return first, second


def _sizes(model: ModelProfile, budget: int, rows: int) -> Sizes:
    """The profile's buckets, and one for what exceeds them: Foresight extrapolates."""
    decode = sorted(size for program, size in model.costs if program is Program.DECODE)
    prefill = sorted(size for program, size in model.costs if program is Program.PREFILL)
    return Sizes(
        budget,
        (*decode, *([rows] if rows > decode[-1] else [])),
        (*(size for size in prefill if size < budget), budget),
    )


def _model_profile(request: ExplainRequest) -> ModelProfile:
    names = shipped(Kind.MODEL)
    if (request.model is None) == (request.model_profile is None):
        raise ConfigError(f"give --model ({', '.join(names)}) or --model-profile FILE, one of them")
    if request.model_profile is not None:
        return read_model_profile(request.model_profile)
    if request.model not in names:
        raise ConfigError(
            f"--model {short(request.model)}: no profile of it is shipped, only of"
            f" {', '.join(names)}; make one by `duetjax compile --model MODEL --gpu NAME --out"
            " DIR` and give it as --model-profile DIR/model-profile.json"
        )
    return read_model_profile(shipped_file(Kind.MODEL, request.model))


def _hardware_profile(request: ExplainRequest) -> HardwareProfile:
    names = shipped(Kind.HARDWARE)
    if (request.gpu is None) == (request.hardware_profile is None):
        raise ConfigError(
            f"give --gpu ({', '.join(names)}) or --hardware-profile FILE, one of them"
        )
    if request.hardware_profile is not None:
        return read_hardware_profile(request.hardware_profile)
    assert request.gpu is not None, "one of the two is given"
    name = by_name(request.gpu, names)
    if name is None:
        raise ConfigError(
            f"--gpu {short(request.gpu)}: choose {', '.join(names)}, or give --hardware-profile"
            " FILE"
        )
    return read_hardware_profile(shipped_file(Kind.HARDWARE, name))
