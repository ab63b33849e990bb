"""`duetjax generate`: a prompt answered here, or a file of them."""

import argparse
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from duetjax.cli_end import shutting_down
from duetjax.cli_flags import (
    EPILOG,
    Commands,
    add_engine_flags,
    add_parser_flags,
    engine_settings,
    styles,
)
from duetjax.config import ConfigError, EngineConfig, SamplingParams, flag
from duetjax.serve.limits import OFFLINE

_CHOICES = ("temperature", "top_p", "top_k", "min_p")  # flags that are in SamplingParams


def add_generate(commands: Commands) -> None:
    """Adds `duetjax generate`."""
    generate = commands.add_parser(
        "generate", help="answer a prompt, or a file of them", epilog=EPILOG
    )
    generate.add_argument("prompt", nargs="?", help="the prompt; without it, standard input")
    generate.add_argument(
        *("-i", "--input"),
        type=Path,
        metavar="FILE",
        help="answer a file: OpenAI's batch format if .jsonl, else a prompt a line; needs --output",
    )
    generate.add_argument(
        *("-o", "--output"),
        type=Path,
        metavar="FILE",
        help="the results, a JSON line each in the order of --input; failed lines say why",
    )
    generate.add_argument("--model", help="folder, preset name or hub id")
    generate.add_argument(
        "--raw", action="store_true", help="continue the text itself, without the chat template"
    )
    add_parser_flags(generate)
    generate.add_argument("--max-tokens", type=int, help="default: until the context is full")
    generate.add_argument("--temperature", type=float, help="0 is greedy; default: the model's")
    generate.add_argument("--top-p", type=float, help="default: the model's")
    generate.add_argument("--top-k", type=int, help="default: the model's")
    generate.add_argument("--min-p", type=float, help="default: the model's")
    generate.add_argument("--stop", action="append", default=[], help="end before this text")
    add_engine_flags(generate)
    generate.set_defaults(run=_generate)


def _generate(args: argparse.Namespace) -> int:
    from duetjax.llm import LLM

    chosen = {name: value for name in _CHOICES if (value := getattr(args, name)) is not None}
    params = SamplingParams(**chosen, max_tokens=args.max_tokens, stop=args.stop)  # checked early
    if args.input is not None or args.output is not None:
        return _generate_file(args, chosen)
    prompt = sys.stdin.read() if args.prompt is None else args.prompt
    llm = LLM(
        args.model,
        tokenizer=args.tokenizer,
        chat_template=args.chat_template,
        load_format=args.load_format,
        reasoning_parser=args.reasoning_parser,
        tool_call_parser=args.tool_call_parser,
        **engine_settings(args),
    )
    with llm:
        defaults = llm.get_default_sampling_params()
        params = replace(defaults, **chosen, max_tokens=params.max_tokens, stop=params.stop)
        if args.raw or not llm.has_chat_template:
            deltas = llm.stream(prompt, params)
        else:
            deltas = llm.stream_chat([{"role": "user", "content": prompt}], params)
        for delta in deltas:
            print(delta.text, end="", flush=True)
    print()
    return 0


def _generate_file(args: argparse.Namespace, chosen: dict[str, Any]) -> int:
    """Answers --input into --output; chosen: the parameters that flags gave."""
    from duetjax import batch
    from duetjax.build import ModelRequest, load
    from duetjax.build_service import build_service
    from duetjax.constrain.checker import GrammarChecker
    from duetjax.run_batch import run_batch

    if args.max_tokens is not None:
        chosen["max_tokens"] = args.max_tokens
    if args.stop:
        chosen["stop"] = args.stop
    _check_files(args, chosen)
    total = batch.count_requests(args.input)
    request = ModelRequest(args.model, args.tokenizer, args.chat_template, args.load_format)
    with batch.ResultFile(args.output) as output:
        model = load(request, EngineConfig(**engine_settings(args)), needs_tokenizer=True)
        service = build_service(model, filter(None, (model.name, args.model)))
        plain = None
        if not batch.is_batch_format(args.input):
            chat = service.tokenizer.has_chat_template and not args.raw
            plain = batch.PlainText(batch.CHAT if chat else batch.COMPLETIONS, chosen)
            until_full = replace(service.defaults, max_tokens=model.max_model_len)
            service = replace(service, defaults=until_full)
        together = 2 * model.engine.num_slots
        checker = GrammarChecker(places=together)  # nobody is turned away
        service = replace(
            service,
            limits=OFFLINE,
            watchdog_s=args.watchdog_s,
            checker=checker,
            **styles(args),
        )
        requests = batch.read_requests(args.input, plain)
        with closing(checker), shutting_down(model.engine):
            num_failed = run_batch(service, requests, output, total, together)
            output.finish()
    print(f"duetjax: {args.output}: {total} results, {num_failed} of them errors", file=sys.stderr)
    return 0


def _check_files(args: argparse.Namespace, chosen: dict[str, Any]) -> None:
    from duetjax.batch import is_batch_format

    if args.input is None or args.output is None:
        raise ConfigError("--input and --output go together; give both")
    if args.prompt is not None:
        raise ConfigError("give a prompt or --input, not both")
    if args.input.resolve() == args.output.resolve():
        raise ConfigError("--output would overwrite --input; name another file")
    names = [*chosen, *(["raw"] if args.raw else [])]
    if names and is_batch_format(args.input):
        raise ConfigError(
            f"{', '.join(map(flag, names))}: each line of a .jsonl file says this itself; leave it"
            " out"
        )
