"""`duetjax bench`: load from a trace or a generator against an endpoint, and what its clients saw.

Flags in, a table, a result file and a JSON line out. Flags and fields are called as those of
`vllm bench serve` where it has them. With --in-process an engine takes the endpoint's place.
"""

import asyncio
import json
import os
import resource
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import partial
from math import isinf
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from duetjax.bench_client import Address, Client, Record
from duetjax.bench_endpoint import Endpoint
from duetjax.bench_load import CHAT, COMPLETIONS, LoadRequest, Prompts, arrivals_of
from duetjax.bench_report import GOODPUT, METRICS, Measured, Objectives, Outcome
from duetjax.bench_report import lines as table
from duetjax.bench_run import Run, Target
from duetjax.config import ConfigError, EngineConfig, SamplingParams, flag
from duetjax.sim.workload import Arrival, mean_rate

if TYPE_CHECKING:
    from duetjax.bench_in_process import OwnEngine
    from duetjax.build import LoadedModel, ModelRequest

_OF_HTTP = ("base_url", "endpoint", "api_key", "header", "extra_body")
_LEAST = {"max_concurrency": 1, "num_warmups": 0}
SECRET = ("api_key", "header")
"""Flags that no result tells."""


@dataclass(frozen=True, slots=True)
class BenchRequest(LoadRequest):
    """The flags of `duetjax bench`, by their names."""

    base_url: str = "http://127.0.0.1:8000"
    endpoint: str = COMPLETIONS
    api_key: str | None = None
    header: Sequence[str] = ()
    model: str | None = None
    dataset_name: str | None = None
    max_concurrency: int | None = None
    num_warmups: int = 0
    ignore_eos: bool = True
    temperature: float | None = None
    extra_body: str | None = None
    request_timeout_s: float = 600.0
    ttft_slo_ms: float = 1000.0
    tbt_slo_ms: float = 50.0
    goodput: Sequence[str] = ()
    percentile_metrics: str = "ttft,tpot,itl,e2el,worst_tbt"
    metric_percentiles: str = "99"
    save_result: bool = False
    save_detailed: bool = False
    result_filename: Path | None = None


@dataclass(frozen=True, slots=True)
class InProcess:
    """What --in-process measures. loaded: loads it, and ends its engine when it is left."""

    model: "ModelRequest"
    engine: EngineConfig
    loaded: Callable[[], AbstractContextManager["LoadedModel"]]


@dataclass(frozen=True, slots=True)
class Report:
    """What came of a benchmark. document: the JSON line; metrics: of the table's lower half."""

    document: Mapping[str, object]
    metrics: Sequence[str]
    was_stopped: bool

    @property
    def has_answers(self) -> bool:
        """Whether any request was answered."""
        return bool(self.document["completed"])


def bench(request: BenchRequest, in_process: InProcess | None = None) -> Report:
    """Sends the load and measures; Ctrl-C ends it, and what was seen until then is told.

    in_process: None is an endpoint. Writes the result's file where one was asked for. Raises
    `ConfigError` with one line that names the flag and says what to give.
    """
    objectives, (metrics, percentiles) = _objectives(request), _statistics(request)
    _check(request)
    arrivals = arrivals_of(request)
    measure = partial(_measure, request, arrivals)
    if in_process is None:
        client = client_of(request.base_url, request.api_key, request.header)
        extra = _extra(request)
        allow_many_connections()
        find = partial(Endpoint.find, client, request.endpoint, request.model, extra)
        target, outcome = asyncio.run(measure(find))
    else:
        _check_in_process(request)
        with in_process.loaded() as model:
            target, outcome = asyncio.run(measure(partial(_begin, request, in_process, model)))
    measured = Measured(outcome)
    document = _asked_for(request, in_process, target, arrivals)
    document |= measured.document(metrics, percentiles, objectives)
    if request.save_result or request.save_detailed or request.result_filename is not None:
        _save(request, document | (measured.detailed() if request.save_detailed else {}))
    return Report(document, metrics, outcome.was_stopped)


def lines(report: Report) -> Iterator[str]:
    """The report as a table."""
    return table(report.document, report.metrics)


async def _measure[Body](
    request: BenchRequest,
    arrivals: Sequence[Arrival],
    find: Callable[[], Awaitable[Target[Body]]],
) -> tuple[Target[Any], Outcome]:
    """Makes the prompts, warms up and lets all go."""
    target = await find()
    prompts = Prompts(target.vocab_size, request.seed)
    asked = zip(prompts.all_of(arrivals), arrivals, strict=True)
    bodies = [target.body(prompt, each.output_tokens) for prompt, each in asked]
    run = Run(target, max_concurrency=request.max_concurrency, timeout_s=request.request_timeout_s)
    for number in range(request.num_warmups):
        like, record = arrivals[number % len(arrivals)], Record(due=0.0)
        unshared = Arrival(0.0, like.prompt_tokens, like.output_tokens)
        prompt = prompts.of(unshared, len(bodies) + number)
        await run.one(record, target.body(prompt, like.output_tokens))
        if record.error is not None:
            raise ConfigError(f"the first request failed: {record.error}; see the log")
    return target, await run.all_of(arrivals, bodies)


async def _begin(request: BenchRequest, in_process: InProcess, model: "LoadedModel") -> "OwnEngine":
    from duetjax.bench_in_process import OwnEngine

    params = replace(model.defaults, n=1, **_sampling(request))
    return OwnEngine(model, params, in_process.engine.watchdog_s)


def allow_many_connections() -> None:
    """As many files as the system lets this process open."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


# From flags to settings.


def _objectives(request: BenchRequest) -> Objectives:
    for name in ("ttft_slo_ms", "tbt_slo_ms", "request_timeout_s"):
        if not 0 < (value := getattr(request, name)) < 1e9:
            raise ConfigError(f"{flag(name)} {value:g}: give a number above 0")
    goodput = {}
    for each in request.goodput:
        name, _, text = each.partition(":")
        with suppress(ValueError):
            goodput[name] = float(text)
        if name not in GOODPUT or not goodput.get(name, -1.0) >= 0:
            raise ConfigError(
                f"--goodput {each}: write it like ttft:500, of {', '.join(GOODPUT)}, in ms"
            )
    return Objectives(request.ttft_slo_ms, request.tbt_slo_ms, goodput)


def _statistics(request: BenchRequest) -> tuple[list[str], list[float]]:
    names = [name.strip() for name in request.percentile_metrics.split(",")]
    if wrong := [name for name in names if name not in METRICS]:
        raise ConfigError(f"--percentile-metrics {wrong[0]}: choose from {', '.join(METRICS)}")
    if request.max_concurrency is not None and "client_queue_time" not in names:
        names.append("client_queue_time")
    try:
        shares = [float(share) for share in request.metric_percentiles.split(",")]
    except ValueError:
        shares = [-1.0]
    if not all(0 <= share <= 100 for share in shares):
        given = request.metric_percentiles
        raise ConfigError(f"--metric-percentiles {given}: give numbers up to 100, such as 50,99")
    return names, shares


def _check(request: BenchRequest) -> None:
    """The flags that no other place does."""
    if request.endpoint not in (COMPLETIONS, CHAT):
        raise ConfigError(f"--endpoint {request.endpoint}: choose {COMPLETIONS} or {CHAT}")
    if request.dataset_name is not None and (request.dataset_name != "random" or request.trace):
        raise ConfigError(
            f"--dataset-name {request.dataset_name}: give random, or leave it out for --trace"
        )
    for name, least in _LEAST.items():
        if (value := getattr(request, name)) is not None and value < least:
            raise ConfigError(f"{flag(name)} {value}: give {least} or more")
    file = request.result_filename
    if file is not None and not file.parent.is_dir():
        raise ConfigError(f"--result-filename {file}: its folder is not there")


def _check_in_process(request: BenchRequest) -> None:
    """Before anything is loaded."""
    usual = BenchRequest()
    for name in _OF_HTTP:
        if getattr(request, name) != getattr(usual, name):
            raise ConfigError(f"{flag(name)} is for an endpoint; leave it out with --in-process")
    SamplingParams(**_sampling(request))


def _sampling(request: BenchRequest) -> dict[str, Any]:
    """What the flags say of it, by the names that a body and `SamplingParams` have for it."""
    given: dict[str, Any] = {"ignore_eos": True} if request.ignore_eos else {}
    if request.temperature is not None:
        given["temperature"] = request.temperature
    return given


def _extra(request: BenchRequest) -> dict[str, Any]:
    """Fields of every body."""
    return _sampling(request) | fields_of(request.extra_body)


def fields_of(extra_body: str | None) -> dict[str, Any]:
    """What --extra-body gives. Raises `ConfigError`."""
    try:
        given = orjson.loads(extra_body or "{}")
    except orjson.JSONDecodeError:
        given = None
    if not isinstance(given, dict):
        raise ConfigError(f"--extra-body {extra_body}: give a JSON object")
    return given


def client_of(base_url: str, api_key: str | None, header: Sequence[str]) -> Client:
    """What sends requests, with these headers. Raises `ConfigError`."""
    return Client(Address(base_url, _headers(api_key, header)))


def _headers(api_key: str | None, header: Sequence[str]) -> dict[str, str]:
    key = api_key or os.environ.get("OPENAI_API_KEY")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    for each in header:
        name, is_given, value = each.partition("=")
        if not is_given:
            raise ConfigError(f"--header {each}: write it like x-name=value")
        headers[name.strip()] = value.strip()
    return headers


# The result.


def _asked_for(
    request: BenchRequest,
    in_process: InProcess | None,
    target: Target[Any],
    arrivals: Sequence[Arrival],
) -> dict[str, object]:
    """What the result begins with: how the load was, and all flags but secret ones."""
    is_at_once = arrivals[0].at == arrivals[-1].at
    rate: object = "inf" if is_at_once else request.request_rate or mean_rate(arrivals)
    burstiness = request.burstiness
    if burstiness is None and request.trace is None:
        burstiness = 1.0
    unsaid: Sequence[str] = SECRET if in_process is None else _OF_HTTP
    flags = {name: value for name, value in asdict(request).items() if name not in unsaid}
    if in_process is not None:
        flags |= asdict(in_process.model) | asdict(in_process.engine)
    return {
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": target.backend,
        "backend": target.backend,
        "label": None,
        "model_id": target.model,
        "tokenizer_id": None,
        "num_prompts": len(arrivals),
        "request_rate": rate,
        "burstiness": plain(burstiness),
        "max_concurrency": request.max_concurrency,
        "arguments": {name: plain(value) for name, value in flags.items()},
    }


def _save(request: BenchRequest, document: Mapping[str, object]) -> None:
    file = request.result_filename
    if file is None:
        rate, most = document["request_rate"], request.max_concurrency
        at_most = "" if most is None else f"-concurrency{most}"
        model = str(document["model_id"]).rpartition("/")[2]
        backend = str(document["backend"]).replace(" ", "-")
        name = f"{backend}-{rate}qps{at_most}-{model}-{document['date']}.json"
        file = Path(name)
    write_result(file, document)


def write_result(file: Path, document: Mapping[str, object]) -> None:
    """As one line of JSON. Raises `ConfigError`."""
    try:
        file.write_text(json.dumps(document), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--result-filename {file}: {error.strerror}; name another") from error


def plain(value: object) -> object:
    """A flag's value as JSON has it."""
    if isinstance(value, float) and isinf(value):
        return "inf"
    return str(value) if isinstance(value, Path) else value
