"""`duetjax serve`: the endpoint, from its flags to its end by a signal."""

import argparse
import logging
import os
import signal
import sys
from dataclasses import fields, replace
from pathlib import Path

from duetjax.cli_end import discard_output, shutting_down
from duetjax.cli_flags import (
    EPILOG,
    Commands,
    add_engine_flags,
    add_parser_flags,
    engine_settings,
    fields_of,
    styles,
)
from duetjax.config import ConfigError, EngineConfig, flag
from duetjax.log_lines import LogFormat
from duetjax.serve.limits import Limits

_log = logging.getLogger("duetjax")


def add_serve(commands: Commands) -> None:
    """Adds `duetjax serve`."""
    serve = commands.add_parser("serve", help="serve the OpenAI API over HTTP", epilog=EPILOG)
    serve.add_argument("model", nargs="?", help="folder, preset name or hub id")
    serve.add_argument("--model", dest="model_flag", metavar="MODEL", help="the same")
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=int, default=8000, help="0: any free port")
    serve.add_argument(
        "--api-key", help="demand this key as a bearer token; default: DUETJAX_API_KEY's"
    )
    serve.add_argument("--served-model-name", action="append", help="name in the API; repeatable")
    serve.add_argument(
        "--shutdown-timeout", type=float, default=30.0, metavar="S", help="seconds to finish in"
    )
    serve.add_argument(
        "--strict-params", action="store_true", help="refuse unknown parameters, with 400"
    )
    add_parser_flags(serve)
    serve.add_argument(
        "--enable-auto-tool-choice",
        action="store_true",
        help="taken for vLLM's sake: --tool-call-parser is enough",
    )
    serve.add_argument(
        "--log-format",
        choices=list(map(str, LogFormat)),
        default=str(LogFormat.TEXT),
        help="of the log on standard error: lines for people (default), or one JSON object a line",
    )
    serve.add_argument("--metrics-public", action="store_true", help="show /metrics without a key")
    serve.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="write a trace of the first seconds, for Perfetto and trace-plot",
    )
    serve.add_argument("--trace-seconds", type=float, default=60.0, metavar="S", help="default: 60")
    serve.add_argument(
        "--disable-frontend-multiprocessing",
        action="store_true",
        help="run the engine in the server's own process",
    )
    serve.add_argument(
        *("--tensor-parallel", "--tensor-parallel-size"),
        type=int,
        default=1,
        help=argparse.SUPPRESS,
    )
    _add_limit_flags(serve)
    add_engine_flags(serve)
    serve.set_defaults(run=_serve)


def _add_limit_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("limits")
    for each in fields(Limits):
        of_time = each.name.endswith(("_s", "_ms"))
        note = "" if each.default is None else "; default: %(default)s"
        group.add_argument(
            flag(each.name),
            type=float if of_time else int,
            default=each.default,
            metavar="MS" if each.name.endswith("_ms") else "S" if of_time else "N",
            help=each.metadata["help"] + note,
        )


def _serve(args: argparse.Namespace) -> int:
    from duetjax.build import ModelRequest, load
    from duetjax.build_service import build_service
    from duetjax.serve.server import HttpServer, bind
    from duetjax.serve.tracing import TraceFile

    signal.signal(signal.SIGTERM, _end_by_signal)  # until the server drains on it
    if args.tensor_parallel != 1:
        raise ConfigError(
            f"--tensor-parallel {args.tensor_parallel}: DuetJAX serves on one GPU; leave it out, or"
            " see what several would do with duetjax compile, simulate or plan"
        )
    if args.model and args.model_flag:
        raise ConfigError("name the model once: as an argument or with --model")
    if not args.host:
        raise ConfigError("--host is empty; name an address, or 0.0.0.0 for all")
    if not 0 <= args.shutdown_timeout <= 1e6:
        raise ConfigError(f"--shutdown-timeout {args.shutdown_timeout}: give seconds up to 10^6")
    api_key = os.environ.get("DUETJAX_API_KEY") if args.api_key is None else args.api_key
    if api_key is not None and not api_key.strip():
        raise ConfigError("--api-key, or DUETJAX_API_KEY, is empty; give a key, or leave it out")
    limits = fields_of(Limits, args)
    trace = None if args.trace is None else TraceFile(args.trace, args.trace_seconds)
    request = ModelRequest(
        args.model or args.model_flag, args.tokenizer, args.chat_template, args.load_format
    )
    with bind(args.host, args.port) as listener:
        model = load(
            request,
            EngineConfig(**engine_settings(args)),
            needs_tokenizer=True,
            own_process=not args.disable_frontend_multiprocessing,
            log_format=LogFormat(args.log_format),
        )
        service = build_service(model, args.served_model_name or ())
        service = replace(
            service,
            api_key=api_key,
            limits=limits,
            strict_params=args.strict_params,
            metrics_public=args.metrics_public,
            watchdog_s=args.watchdog_s,
            tbt_slo_ms=args.tbt_slo_ms,
            **styles(args),
        )
        if service.tool_style is not None and not service.tokenizer.supports_tools:
            _log.warning("the model's chat template does not show it the tools that it may call")
        server = HttpServer(service, listener, shutdown_timeout=args.shutdown_timeout, trace=trace)
        notice = f" ({model.notice})" if model.notice else ""
        with shutting_down(model.engine):
            server.run(lambda line: _announce(line + notice))
            _ignore_sigterm()
    return 0


def _end_by_signal(number: int, _frame: object) -> None:
    """What SIGTERM does by default, also to the first process of a container."""
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)
    os._exit(128 + number)  # the kernel spares that one


def _ignore_sigterm() -> None:
    """It is ending already, with the code of what it has done."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _announce(line: str) -> None:
    """Prints it where it can be printed; a server is none the worse where it cannot."""
    try:
        print(line, flush=True)
    except OSError:
        discard_output()
        print(line, file=sys.stderr)
