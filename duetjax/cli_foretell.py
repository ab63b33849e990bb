"""`duetjax explain`, `simulate` and `plan`: what profiles foretell, without the GPU."""

import argparse
import json
from pathlib import Path

from duetjax.cli_flags import (
    POLICIES,
    Commands,
    add_kv_dtype_flag,
    fields_of,
    max_model_len,
    split,
    write_picture,
)


def add_explain(commands: Commands) -> None:
    """Adds `duetjax explain`."""
    explain = commands.add_parser(
        "explain", help="predict a launch on every split of a GPU, and say which one duet takes"
    )
    explain.add_argument("--model", metavar="NAME", help="a model whose profile is shipped")
    explain.add_argument("--model-profile", type=Path, metavar="FILE", help="or a profile's file")
    explain.add_argument(
        "--gpu", metavar="NAME", help="a GPU whose profile is shipped, or how its name begins"
    )
    explain.add_argument("--hardware-profile", type=Path, metavar="FILE", help="or its file")
    explain.add_argument(
        "--prefill",
        action="append",
        default=[],
        metavar="TOKENS[:CACHED]",
        help="prompt tokens to compute, after those in KV already; repeatable",
    )
    explain.add_argument(
        "--decode",
        action="append",
        default=[],
        metavar="ROWSxCONTEXT",
        help="requests that decode, each with so many tokens in KV; repeatable",
    )
    explain.add_argument("--tbt-slo-ms", type=float, default=50.0, help="longest step; default: 50")
    explain.add_argument(
        "--max-num-batched-tokens", type=int, default=8192, help="of a launch; default: 8192"
    )
    explain.add_argument(
        "--attention", default="fused", help="fused (default), or per-request as in the paper"
    )
    add_kv_dtype_flag(explain)
    explain.add_argument("--picture", type=Path, metavar="FILE", help="also draw it, as SVG")
    explain.set_defaults(run=_explain)


def _explain(args: argparse.Namespace) -> int:
    from duetjax.explain import ExplainRequest, explain, lines
    from duetjax.picture import draw

    explanation = explain(fields_of(ExplainRequest, args))
    for line in lines(explanation):
        print(line)
    if args.picture is not None:
        draw(explanation, args.picture)
    return 0


def add_simulate(commands: Commands) -> None:
    """Adds `duetjax simulate`."""
    simulate = commands.add_parser(
        "simulate", help="what a GPU would do under a load, policy by policy, without one"
    )
    _add_load_flags(simulate)
    simulate.add_argument(
        "--policy",
        default="duet,aggregated-slo,aggregated",
        metavar="A,B",
        help=f"which to compare: {POLICIES}, disaggregated; default: %(default)s",
    )
    simulate.add_argument(
        "--rate", metavar="R,R", help="requests/s, one or several; default: the trace's own"
    )
    simulate.add_argument(
        "--split",
        type=split,
        help="static-split: DECODE/PREFILL cores; default: a quarter decodes",
    )
    simulate.add_argument("--look-ahead", type=int, default=16, help="decode steps of a launch")
    simulate.add_argument(
        "--sweep", action="store_true", help="also find the highest rate that keeps the objectives"
    )
    simulate.add_argument("--plot", type=Path, metavar="FILE", help="also draw it, as SVG")
    simulate.set_defaults(run=_simulate)


def _simulate(args: argparse.Namespace) -> int:
    from duetjax import simulate_report as command

    report = command.simulate(fields_of(command.SimulateRequest, args))
    for line in command.lines(report):
        print(line)
    if args.plot is not None:
        write_picture(args.plot, command.draw(report))
    print(json.dumps(command.document(report)))
    return 0


def add_plan(commands: Commands) -> None:
    """Adds `duetjax plan`."""
    plan = commands.add_parser(
        "plan", help="rank arrangements of several GPUs by what they would serve, simulated"
    )
    _add_load_flags(plan)
    plan.add_argument("--gpus", type=int, required=True, metavar="N", help="how many there are")
    plan.add_argument(
        "--policy", default="duet,aggregated-slo", metavar="A,B", help="of replicas; %(default)s"
    )
    plan.add_argument(
        "--attainment", type=float, default=0.9, help="share of requests to keep; default: 0.9"
    )
    plan.add_argument("--price", type=float, help="of a GPU for an hour")
    plan.set_defaults(run=_plan, duration=180.0)


def _plan(args: argparse.Namespace) -> int:
    from duetjax import arrangements as command
    from duetjax.simulate_report import SimulateRequest

    request = command.PlanRequest(
        load=fields_of(SimulateRequest, args),
        gpus=args.gpus,
        policies=tuple(args.policy.split(",")),
        attainment=args.attainment,
        price=args.price,
    )
    ranked = command.plan(request)
    for line in command.lines(request, ranked):
        print(line)
    print(json.dumps(command.document(request, ranked)))
    return 0


def _add_load_flags(parser: argparse.ArgumentParser) -> None:
    """What is simulated: fields of `SimulateRequest`."""
    parser.add_argument("--model", required=True, help="preset name, folder or hub id")
    parser.add_argument("--gpu", required=True, metavar="NAME|FILE", help="a hardware profile")
    parser.add_argument(
        "--trace",
        default="azure-conversation",
        metavar="FILE|NAME",
        help="Azure's or BurstGPT's CSV, Mooncake's or plain JSONL; or a load to generate:"
        " azure-code, azure-conversation, mooncake-conversation, fixed:1024x128",
    )
    parser.add_argument("--tbt-slo-ms", type=float, default=50.0, help="default: 50")
    parser.add_argument("--ttft-slo-ms", type=float, default=1000.0, help="default: 1000")
    parser.add_argument("--duration", type=float, metavar="S", help="only so much of the trace")
    parser.add_argument("--start", type=float, default=0.0, metavar="S", help="from there on")
    parser.add_argument("--seed", type=int, default=0, help="of generated loads and of noise")
    parser.add_argument(
        "--burstiness-cv", type=float, metavar="CV", help="of generated gaps; 1: Poisson, 0: even"
    )
    parser.add_argument(
        "--noise", type=float, default=0.0, help="deviation of durations, such as 0.1; default: 0"
    )
    parser.add_argument(
        "--contention",
        metavar="DECODE/PREFILL",
        help="of lanes, in place of the profile's; 1/1: none",
    )
    parser.add_argument(
        "--tensor-parallel", type=int, default=1, metavar="N", help="GPUs a replica"
    )
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192)
    parser.add_argument("--max-model-len", type=max_model_len)
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    parser.add_argument("--dtype", default="auto")
    add_kv_dtype_flag(parser)
    parser.add_argument(
        "--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=True
    )
    parser.add_argument("--jobs", type=int, metavar="N", help="processes; default: one per core")
