"""`duetjax bench`: load on an endpoint or on an engine here, or questions with `--score`."""

import argparse
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from duetjax.cli_end import shutting_down
from duetjax.cli_flags import Commands, add_engine_flags, engine_settings, fields_of, write_picture
from duetjax.config import ConfigError, EngineConfig, flag

if TYPE_CHECKING:
    from duetjax.bench import InProcess
    from duetjax.build import LoadedModel

_OF_ANY_BENCH = ("model", "seed", "tbt_slo_ms")  # flags of an engine that others have too


def add_bench(commands: Commands) -> None:
    """Adds `duetjax bench`."""
    bench = commands.add_parser(
        "bench", help="load an endpoint, and tell what its clients saw; flags as vllm bench serve"
    )
    bench.add_argument(
        "--in-process", action="store_true", help="load an engine here instead, without HTTP"
    )
    bench.add_argument("--base-url", default="http://127.0.0.1:8000", help="default: %(default)s")
    bench.add_argument(
        "--endpoint", default="/v1/completions", help="default: %(default)s; /v1/chat/completions"
    )
    bench.add_argument("--api-key", help="bearer token; default: OPENAI_API_KEY's")
    bench.add_argument("--header", nargs="+", default=(), metavar="NAME=VALUE", help="more headers")
    bench.add_argument(
        "--model",
        help="name in the API, default: the first that is served; in process what to load,"
        " default: the demo",
    )
    load = bench.add_argument_group("load")
    load.add_argument(
        "--trace",
        metavar="FILE|NAME",
        help="as in simulate: Azure's or BurstGPT's CSV, Mooncake's or plain JSONL, or a name to"
        " generate; default: random prompts",
    )
    load.add_argument("--dataset-name", metavar="random", help="what is sent without --trace")
    load.add_argument("--random-input-len", type=int, default=1024, metavar="TOKENS")
    load.add_argument("--random-output-len", type=int, default=128, metavar="TOKENS")
    load.add_argument("--num-prompts", type=int, metavar="N", help="default: 1000, all of a trace")
    load.add_argument(
        *("--request-rate", "--rate"),
        type=float,
        metavar="R",
        help="requests/s; inf: all at once; default: inf, a trace's own",
    )
    load.add_argument(
        "--burstiness", type=float, metavar="B", help="1: Poisson; less: bursts; inf: even"
    )
    load.add_argument(
        "--max-concurrency", type=int, metavar="N", help="so many at a time, others wait"
    )
    load.add_argument("--duration", type=float, metavar="S", help="only so much of the trace")
    load.add_argument("--start", type=float, default=0.0, metavar="S", help="from there on")
    load.add_argument("--num-warmups", type=int, default=0, metavar="N", help="sent before")
    load.add_argument(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="as many tokens as asked for",
    )
    load.add_argument("--temperature", type=float, help="default: the server's")
    load.add_argument("--extra-body", metavar="JSON", help="fields of every request")
    load.add_argument("--request-timeout-s", type=float, default=600.0, metavar="S")
    result = bench.add_argument_group("result")
    result.add_argument("--ttft-slo-ms", type=float, default=1000.0, help="default: 1000")
    result.add_argument(
        "--goodput", nargs="+", default=(), metavar="NAME:MS", help="of ttft, tpot, e2el"
    )
    result.add_argument(
        "--percentile-metrics",
        default="ttft,tpot,itl,e2el,worst_tbt",
        metavar="A,B",
        help="default: %(default)s",
    )
    result.add_argument(
        "--metric-percentiles", default="99", metavar="P,P", help="default: %(default)s"
    )
    result.add_argument("--save-result", action="store_true", help="write it to a file")
    result.add_argument("--save-detailed", action="store_true", help="request by request")
    result.add_argument("--result-filename", type=Path, metavar="FILE")
    score = bench.add_argument_group("score (with --max-concurrency 16, if you give none)")
    score.add_argument(
        "--score", action="store_true", help="ask questions instead: accuracy against tokens"
    )
    score.add_argument(
        "--questions",
        type=Path,
        metavar="FILE",
        help='JSON lines like {"question": "...", "answer": "..."}; default: 40 that ship',
    )
    score.add_argument("--samples", type=int, default=4, metavar="N", help="of each; default: 4")
    score.add_argument(
        "--budgets",
        default="none",
        metavar="B,B",
        help="of reasoning tokens, as in 256,1024,none; default: %(default)s",
    )
    score.add_argument("--max-tokens", type=int, metavar="N", help="of a whole answer")
    score.add_argument("--top-p", type=float, help="default: the server's")
    score.add_argument("--plot", type=Path, metavar="FILE", help="also draw it, as SVG")
    add_engine_flags(bench, "with --in-process (--seed and --tbt-slo-ms: always)")
    bench.set_defaults(run=_bench)


def _bench(args: argparse.Namespace) -> int:
    from duetjax import bench as command
    from duetjax import bench_score

    load, score = asdict(command.BenchRequest()), asdict(bench_score.ScoreRequest())
    if args.score:
        _refuse_flags(args, load, score, "not for --score")
        return _score(args)
    _refuse_flags(args, score, load, "for --score alone")
    report = command.bench(fields_of(command.BenchRequest, args), _in_process(args))
    for line in command.lines(report):
        print(line)
    print(json.dumps(report.document))
    if report.was_stopped:
        return 130
    return 0 if report.has_answers else 1


def _score(args: argparse.Namespace) -> int:
    from duetjax import bench_score as command

    if args.in_process:
        raise ConfigError("--in-process is not for --score; leave it out")
    _in_process(args)  # refuses the flags of an engine
    report = command.score(fields_of(command.ScoreRequest, args))
    for line in command.lines(report):
        print(line)
    print(json.dumps(report.document))
    if args.plot is not None and report.has_answers:
        write_picture(args.plot, command.draw(report))
    if report.was_stopped:
        return 130
    return 0 if report.has_answers else 1


def _refuse_flags(
    args: argparse.Namespace, others: Mapping[str, object], own: Mapping[str, object], why: str
) -> None:
    """Those that only the other half of a command has, unless they are as usual."""
    for name, usual in others.items():
        if name not in own and getattr(args, name) != usual:
            raise ConfigError(f"{flag(name)} is {why}; leave it out")


def _in_process(args: argparse.Namespace) -> "InProcess | None":
    """The engine to load, where there is to be one. Raises `ConfigError`."""
    from duetjax.bench import InProcess
    from duetjax.build import ModelRequest, load

    if not args.in_process:
        for name, usual in (asdict(ModelRequest()) | asdict(EngineConfig())).items():
            if name not in _OF_ANY_BENCH and getattr(args, name) != usual:
                raise ConfigError(f"{flag(name)} needs --in-process; give that too")
        return None
    request, engine = fields_of(ModelRequest, args), EngineConfig(**engine_settings(args))

    @contextmanager
    def loaded() -> Iterator["LoadedModel"]:
        model = load(request, engine)
        with shutting_down(model.engine):
            yield model

    return InProcess(request, engine, loaded)
