"""`duetjax plan`: which arrangement of so many GPUs serves the most under the objectives.

Every way to divide them into replicas of one GPU or several (tensor parallelism), and into pairs
of a prefill and a decode side. One replica of each is simulated, under a load like that of all.
"""

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from duetjax.config import ConfigError
from duetjax.simulate import (
    DISAGGREGATED,
    Case,
    Figures,
    Setup,
    check_policy,
    fits,
    highest_rate,
    run_all,
)
from duetjax.simulate_report import SimulateRequest, objectives_of, setup_of, shown

_HOUR = 3600.0
_PRECISION = 0.05


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """The flags of `duetjax plan`. load: what is simulated, of which policy and rate do not count.

    policies: of replicas. attainment: share of the requests that must keep both objectives. price:
    of a GPU for an hour, in any currency.
    """

    load: SimulateRequest
    gpus: int
    policies: tuple[str, ...]
    attainment: float
    price: float | None


@dataclass(frozen=True, slots=True)
class Arrangement:
    """replicas alike, each of `shards` GPUs; a disaggregated one of twice as many."""

    policy: str
    replicas: int
    shards: int

    @property
    def gpus(self) -> int:
        """Of all replicas."""
        return self.replicas * self.shards * (2 if self.policy == DISAGGREGATED else 1)

    def __str__(self) -> str:
        each = "GPU" if self.shards == 1 else f"{self.shards} GPUs (tensor parallel)"
        if self.policy == DISAGGREGATED:
            return f"{self.replicas} x prefill on {each}, decode on as many"
        return f"{self.replicas} x {each}"


@dataclass(frozen=True, slots=True)
class Ranked:
    """What an arrangement serves. rate: of all replicas, requests/s; why_not: it cannot be, or 0.

    figures: of one replica, at that rate.
    """

    arrangement: Arrangement
    rate: float
    figures: Figures | None
    why_not: str = ""


def plan(request: PlanRequest) -> list[Ranked]:
    """All arrangements, the one that serves most requests per GPU first.

    Raises `ConfigError` with one line that says what to give, or if none can be.
    """
    if not 1 <= request.gpus <= 1024:
        raise ConfigError(f"--gpus {request.gpus} must be from 1 to 1024")
    for policy in request.policies:
        check_policy(policy)
    if not 0 < request.attainment < 1:
        raise ConfigError(f"--attainment {request.attainment:g} must be above 0 and below 1")
    if request.price is not None and not 0 < request.price < 1e6:
        raise ConfigError(f"--price {request.price:g}: give the price of a GPU for an hour")
    setup, case = setup_of(request.load), Case("", objectives_of(request.load))
    found = list(arrangements(request.gpus, (*request.policies, DISAGGREGATED)))
    evaluate = partial(_ranked, setup, case, request.attainment)
    jobs = request.load.jobs or os.cpu_count() or 1
    ranked = list(shown(run_all(evaluate, found, jobs), len(found)))
    if not any(each.rate for each in ranked):
        reasons = {each.why_not for each in ranked if each.why_not}
        why = "; ".join(sorted(reasons)) or "no rate keeps the objectives"
        raise ConfigError(f"none of {len(found)} arrangements of {request.gpus} GPUs: {why}")
    return sorted(ranked, key=lambda each: -each.rate / each.arrangement.gpus)


def arrangements(gpus: int, policies: tuple[str, ...]) -> Iterator[Arrangement]:
    """Replicas of 1, 2, 4, ... GPUs that use all of them, as far as that goes."""
    shards = 1
    while shards <= gpus:
        for policy in policies:
            size = shards * (2 if policy == DISAGGREGATED else 1)
            if size <= gpus:
                yield Arrangement(policy, gpus // size, shards)
        shards *= 2


def lines(request: PlanRequest, ranked: list[Ranked]) -> Iterator[str]:
    """A row for each, the best first."""
    load, price = request.load, request.price
    yield (
        f"simulation of {request.gpus} x {load.gpu} with {load.model}: highest rate of {load.trace}"
        f" at which {request.attainment:.0%} of the requests keep {load.ttft_slo_ms:g} ms to the"
        f" first token and {load.tbt_slo_ms:g} ms between tokens"
    )
    yield ""
    width = max(len(str(each.arrangement)) for each in ranked) + 2
    head = f"{'arrangement':<{width}}{'policy':>15}{'req/s':>9}{'per GPU':>9}{'out tok/s':>11}"
    yield head + (f"{'tokens per unit of price':>26}" if price else "")
    for each in ranked:
        kind = each.arrangement
        text = f"{kind!s:<{width}}{kind.policy:>15}"
        if each.figures is None:
            yield f"{text}  {each.why_not}"
            continue
        output = each.figures.output_per_s * kind.replicas
        text += f"{each.rate:>9.2f}{each.rate / kind.gpus:>9.2f}{output:>11.0f}"
        if price:
            text += f"{output * _HOUR / (price * kind.gpus):>26,.0f}"
        yield text
    yield ""
    yield (
        "simulated, not measured: one replica's rate times their number; communication and what"
        " disaggregation sends are modelled from the interconnect's rate"
    )


def document(request: PlanRequest, ranked: list[Ranked]) -> dict[str, Any]:
    """What the JSON line says."""
    return {
        "simulation": True,
        "gpus": request.gpus,
        "attainment": request.attainment,
        "price": request.price,
        "arrangements": [asdict(each) | {"gpus": each.arrangement.gpus} for each in ranked],
    }


def _ranked(setup: Setup, case: Case, target: float, kind: Arrangement) -> Ranked:
    setup = replace(setup, tensor_parallel=kind.shards)
    case = replace(case, policy=kind.policy)
    try:
        fits(setup, case)
    except ConfigError as error:
        return Ranked(kind, 0.0, None, str(error))
    figures = highest_rate(setup, case, target, precision=_PRECISION)
    if figures is None:
        return Ranked(kind, 0.0, None, "no rate keeps the objectives")
    return Ranked(kind, figures.rate * kind.replicas, figures)
